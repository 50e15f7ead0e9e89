"""Where settings come from: command line, environment, TOML file; and back into an environment.

Generic over a tree of pydantic models, so that ``daemon/settings.py`` stays a list of settings. A
setting has a dotted name (``serving.port``), which is also its place in the TOML file, and a
variable (``MOORLINE_SERVING__PORT``). Values of variables are read as pydantic reads strings;
a tuple is a JSON list. A secret may be given as a file: ``MOORLINE_SERVING__API_KEY_FILE``.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo

ENVIRONMENT_PREFIX = "MOORLINE_"
CONFIG_VARIABLE = "MOORLINE_CONFIG"
NESTING = "__"
SECRET_FILE_SUFFIX = "_FILE"
NOT_SETTINGS = frozenset({CONFIG_VARIABLE, "MOORLINE_FAILPOINTS", "MOORLINE_TEST_KAFKA"})

# Kubernetes puts these into every container beside a Service named moorline or moorline-*.
_KUBERNETES_SERVICE = re.compile(r"_SERVICE_(HOST|PORT(_\w+)?)$|_PORT_\d+_(TCP|UDP|SCTP)(_\w+)?$")
_KUBERNETES_ADDRESS = re.compile(r"(tcp|udp|sctp)://")


class SettingsError(ValueError):
    """A setting is unknown or has a bad value; the one line says which and what is allowed."""


@dataclass
class Sources:
    """What was given, by dotted name, and who gave it."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def take(self, name: str, value: Any, origin: str) -> None:
        """Keep a value; a later call overrules an earlier one."""
        self.values[name] = value
        self.origins[name] = origin

    def nested(self) -> dict[str, Any]:
        """The values as the tree that the model validates."""
        tree: dict[str, Any] = {}
        for name, value in self.values.items():
            *sections, leaf = name.split(".")
            branch = tree
            for section in sections:
                branch = branch.setdefault(section, {})
            branch[leaf] = value
        return tree


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


def collect(
    model: type[BaseModel],
    config: Path | None,
    environment: Mapping[str, str],
    overrides: Mapping[str, Any],
) -> Sources:
    """Everything that was set, the strongest source last.

    Args:
        overrides: dotted name -> value, from the command line; None means not given.

    Raises:
        SettingsError: an unknown name, an unreadable file, a tuple that is not a JSON list.
    """
    sources = Sources()
    known = dict(leaves(model))
    if config is not None:
        _take_toml(sources, known, config)
    _take_environment(sources, known, environment)
    for name, value in overrides.items():
        if value is None:
            continue
        if name not in known:
            raise SettingsError(f"unknown setting {name!r}{_did_you_mean(name, known)}")
        if isinstance(value, str):
            value = _from_text(known[name], value, name)
        sources.take(name, value, "command line")
    return sources


def _take_toml(sources: Sources, known: Mapping[str, FieldInfo], path: Path) -> None:
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read settings file {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"settings file {path} is not valid TOML: {error}") from None

    sections = {name.rpartition(".")[0] for name in known} - {""}

    def walk(prefix: str, table: Mapping[str, Any]) -> None:
        for key, value in table.items():
            name = prefix + key
            if name in known:
                sources.take(name, value, f"file {path}")
            elif name in sections and isinstance(value, Mapping):
                walk(name + ".", value)
            elif name in sections:
                raise SettingsError(f"{name!r} in {path} is a table of settings: write [{name}]")
            else:
                hint = _did_you_mean(name, [*known, *sections])
                raise SettingsError(f"unknown setting {name!r} in {path}{hint}")

    walk("", tree)


def _take_environment(
    sources: Sources, known: Mapping[str, FieldInfo], environment: Mapping[str, str]
) -> None:
    variables = {variable_of(name): name for name in known}
    secret_files = {
        variable_of(name) + SECRET_FILE_SUFFIX: name
        for name, info in known.items()
        if is_secret(info)
    }
    for variable, text in sorted(environment.items()):
        if variable in variables:
            name = variables[variable]
            sources.take(name, _from_text(known[name], text, variable), variable)
        elif variable in secret_files:
            if variable.removesuffix(SECRET_FILE_SUFFIX) in environment:
                raise SettingsError(
                    f"{variable} and {variable.removesuffix(SECRET_FILE_SUFFIX)} are both set: "
                    "keep one of them"
                )
            sources.take(secret_files[variable], _read_secret(variable, text), variable)
        elif _is_ours(variable, text):
            hint = _did_you_mean(variable, [*variables, *secret_files])
            raise SettingsError(f"unknown environment variable {variable}{hint}")


def _is_ours(variable: str, text: str) -> bool:
    if not variable.upper().startswith(ENVIRONMENT_PREFIX) or variable in NOT_SETTINGS:
        return False
    return not (_KUBERNETES_SERVICE.search(variable) or _KUBERNETES_ADDRESS.match(text))


def _read_secret(variable: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SettingsError(f"{variable} names {path}, which cannot be read: {why}") from None


def _from_text(info: FieldInfo, text: str, source: str) -> Any:
    """A string as the field wants it: JSON for a tuple, else as it is (pydantic reads the rest)."""
    if get_origin(info.annotation) is not tuple:
        return text
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, list):
        raise SettingsError(f'{source} must be a JSON list, such as ["--flag","value"]')
    return value


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


def explain(error: ValidationError, model: type[BaseModel], sources: Sources) -> str:
    """One line: the setting, what is allowed, what was given and by whom (secrets withheld)."""
    first, *others = error.errors()
    known = dict(leaves(model))
    parts = [str(part) for part in first["loc"]]
    names = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    name = next((candidate for candidate in names if candidate in known), ".".join(parts))
    rule = re.sub(r"^(Input|String|Value|Tuple)\b.*? should ", "must ", first["msg"])
    rule = rule.removeprefix("Value error, ")
    rule = re.sub(r", unable to (parse|interpret) .*", "", rule)
    given = ""
    if name in known and not is_secret(known[name]):
        text = repr(first["input"])
        given = f", not {text if len(text) <= 60 else text[:57] + '...'}"
    origin = sources.origins.get(name)
    where = f" (set by {origin})" if origin else ""
    more = f"; and {len(others)} more" if others else ""
    return f"{name} {rule}{given}{where}{more}".replace("\n", " ")


def to_environment(settings: BaseModel) -> dict[str, str]:
    """Every setting that is not None as variables that ``collect`` reads back to the same value."""
    variables: dict[str, str] = {}
    for name, _ in leaves(type(settings)):
        value: Any = settings
        for part in name.split("."):
            value = getattr(value, part)
        if value is None:
            continue
        if isinstance(value, SecretStr):
            text = value.get_secret_value()
        elif isinstance(value, tuple):
            text = json.dumps(value)
        else:
            text = str(value)
        variables[variable_of(name)] = text
    return variables
