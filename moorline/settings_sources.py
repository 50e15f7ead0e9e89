"""What pydantic-settings lacks: refusal of unknown names, one-line errors, who set a value.

A setting has a dotted name (``serving.port``), which is also its place in the TOML file, and a
variable (``MOORLINE_SERVING__PORT``). Values of variables are read as pydantic reads strings; a
tuple is a JSON list. A secret may be given as a file: ``MOORLINE_SERVING__API_KEY_FILE``.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, TomlConfigSettingsSource

from moorline.errors import MoorlineError

ENVIRONMENT_PREFIX = "MOORLINE_"
CONFIG_VARIABLE = "MOORLINE_CONFIG"
NESTING = "__"
SECRET_FILE_SUFFIX = "_FILE"
NOT_SETTINGS = frozenset(
    {
        CONFIG_VARIABLE,
        "MOORLINE_FAILPOINTS",
        "MOORLINE_TEST_KAFKA",
        "MOORLINE_TEST_REQUIRE_KAFKA",
    }
)

# Kubernetes puts these into every container beside a Service named moorline or moorline-*.
_KUBERNETES_SERVICE = re.compile(r"_SERVICE_(HOST|PORT(_\w+)?)$|_PORT_\d+_(TCP|UDP|SCTP)(_\w+)?$")
_KUBERNETES_ADDRESS = re.compile(r"(tcp|udp|sctp)://")


class SettingsError(MoorlineError, ValueError):
    """A setting is unknown or has a bad value; the one line says which and what is allowed."""


def _read_list(value: Any) -> Any:
    if isinstance(value, str):
        with suppress(json.JSONDecodeError):
            value = json.loads(value)
        if not isinstance(value, list):
            raise ValueError('must be a JSON list, such as ["--flag","value"]')
    return value


Arguments = Annotated[tuple[str, ...], BeforeValidator(_read_list)]


def _one_line(value: SecretStr | None) -> SecretStr | None:
    """The secret without what editors put around it: a byte-order mark, the ends of lines."""
    if value is None:
        return None
    text = value.get_secret_value().removeprefix("\ufeff").rstrip("\r\n")
    if not text:
        raise ValueError("must not be empty: leave it out for none")
    if text != text.strip() or not text.isprintable():
        raise ValueError("must be one line without blanks around it or control characters")
    return SecretStr(text)


Secret = Annotated[SecretStr | None, AfterValidator(_one_line)]
"""A key or password, or None; however it was read, it is one line."""


def _read_table(value: Any) -> Any:
    if isinstance(value, str):
        with suppress(json.JSONDecodeError):
            value = json.loads(value)
        if not isinstance(value, dict):
            raise ValueError('must be a JSON object, such as {"copied": 0.5}')
    return value


Rewards = Annotated[
    dict[
        Annotated[str, Field(min_length=1, max_length=100)],
        Annotated[float, Field(ge=-1.0, le=1.0)],
    ],
    BeforeValidator(_read_table),
]
"""name -> reward."""


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting of the tree: its dotted name and its field."""
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from leaves(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, info


def variable_of(name: str) -> str:
    """``serving.port`` -> ``MOORLINE_SERVING__PORT``."""
    return ENVIRONMENT_PREFIX + name.upper().replace(".", NESTING)


def nested(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted name as the tree that the model takes; an unknown name is refused."""
    known = dict(leaves(model))
    tree: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise SettingsError(f"unknown setting {name!r}{_did_you_mean(name, known)}")
        *sections, leaf = name.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[leaf] = value
    return tree


def read_sources(
    model: type[BaseSettings], config: Path | None, environment: Mapping[str, str]
) -> tuple[tuple[EnvSettingsSource | TomlConfigSettingsSource, ...], dict[str, str]]:
    """The environment and the file as sources, strongest first, and who gave each name.

    Raises:
        SettingsError: an unreadable file, an unknown variable, a secret given twice.
    """
    variables = EnvSettingsSource(model)
    variables.env_vars, origins = _known_variables(model, environment)
    if config is None:
        return (variables,), origins
    try:
        config.stat()
        if not config.is_file():  # the library passes over it in silence
            raise SettingsError(f"cannot read settings file {config}: not a regular file")
        file = TomlConfigSettingsSource(model, config.absolute())  # it would expand a leading ~
    except OSError as error:
        raise SettingsError(f"cannot read settings file {config}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"settings file {config} is not valid TOML: {error}") from None
    return (variables, file), dict.fromkeys(_names(file.toml_data), f"file {config}") | origins


def _names(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in table.items():
        yield prefix + key
        if isinstance(value, Mapping):
            yield from _names(value, f"{prefix}{key}.")


def _known_variables(
    model: type[BaseModel], environment: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Text by variable, in the lower case that the library wants, and variable by dotted name."""
    known = {variable_of(name): name for name, _ in leaves(model)}
    secrets = [variable_of(name) for name, info in leaves(model) if is_secret(info)]
    known |= {secret + SECRET_FILE_SUFFIX: known[secret] for secret in secrets}
    texts: dict[str, str] = {}
    origins: dict[str, str] = {}
    for variable, text in sorted(environment.items()):
        name = known.get(variable)
        if name in origins:
            raise SettingsError(f"{variable} and {origins[name]} are both set: keep one of them")
        if name is not None:
            origins[name] = variable
            plain = variable_of(name)
            texts[plain.lower()] = text if variable == plain else _read_secret(variable, text)
        elif _is_ours(variable, text):
            hint = _did_you_mean(variable, known)
            raise SettingsError(f"unknown environment variable {variable}{hint}")
    return texts, origins


def _is_ours(variable: str, text: str) -> bool:
    if not variable.upper().startswith(ENVIRONMENT_PREFIX) or variable in NOT_SETTINGS:
        return False
    return not (_KUBERNETES_SERVICE.search(variable) or _KUBERNETES_ADDRESS.match(text))


def _read_secret(variable: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SettingsError(f"{variable} names {path}, which cannot be read: {why}") from None


def is_secret(info: FieldInfo) -> bool:
    """Whether the field's value must never be shown."""
    return info.annotation is SecretStr or SecretStr in get_args(info.annotation)


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest known name: by spelling when near, else any section's setting of that name."""
    ours = {other.removeprefix(ENVIRONMENT_PREFIX).lower(): other for other in known}
    wanted = name.upper().removeprefix(ENVIRONMENT_PREFIX).lower()
    last = re.split(r"\.|__", wanted)[-1]
    found = difflib.get_close_matches(wanted, ours, n=1, cutoff=0.75)
    found = found or [other for other in ours if re.split(r"\.|__", other)[-1] == last]
    found = found or difflib.get_close_matches(wanted, ours, n=1, cutoff=0.6)
    return f"; did you mean {ours[found[0]]}?" if found else "; `moorline config` lists them all"


def explain(error: ValidationError, model: type[BaseModel], origins: Mapping[str, str]) -> str:
    """One line: the setting, what is allowed, what was given and by whom (secrets withheld)."""
    first, *others = error.errors()
    known = dict(leaves(model))
    parts = [str(part) for part in first["loc"]]
    names = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    name = next((candidate for candidate in names if candidate in known), ".".join(parts))
    origin = origins.get(name)
    where = f" (set by {origin})" if origin else ""
    more = f"; and {len(others)} more" if others else ""
    if first["type"] == "extra_forbidden":
        hint = _did_you_mean(name, [*known, *model.model_fields])
        return f"unknown setting {name!r} in {origin}{hint}{more}"
    if first["type"] == "model_type":
        return f"{name!r} is a table of settings: write [{name}]{where}{more}"
    rule = re.sub(r"^(Input|String|Value|Tuple)\b.*? should ", "must ", first["msg"])
    rule = rule.removeprefix("Value error, ")
    rule = re.sub(r", unable to (parse|interpret) .*", "", rule)
    given = ""
    # Arguments that are no JSON list may hold a token of some service.
    if name in known and not is_secret(known[name]) and first["type"] != "value_error":
        text = repr(first["input"])
        given = f", not {text if len(text) <= 60 else text[:57] + '...'}"
    return f"{name} {rule}{given}{where}{more}".replace("\n", " ")


def to_environment(settings: BaseModel) -> dict[str, str]:
    """Every setting that is not None as variables that are read back to the same value."""
    variables: dict[str, str] = {}
    for name, _ in leaves(type(settings)):
        value = attrgetter(name)(settings)
        if isinstance(value, SecretStr):
            value = value.get_secret_value()
        elif isinstance(value, tuple | dict):
            value = json.dumps(value)
        if value is not None:
            variables[variable_of(name)] = str(value)
    return variables
