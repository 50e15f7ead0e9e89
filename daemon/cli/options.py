"""The options that stand for settings, declared once: --config, --state-dir, --set, --model, ..."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Concatenate, ParamSpec

import typer

from moorline.settings import Settings, load_settings

_PANEL = "Settings"
_P = ParamSpec("_P")


@dataclass(frozen=True)
class SettingOption:
    """A command-line option that is short for one setting."""

    setting: str
    """Such as ``serving.port``."""
    name: str
    annotation: Any
    """``Annotated[..., typer.Option(...)]``, as Typer reads it."""


_CONFIG = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        help="Settings file (TOML); else the one that $MOORLINE_CONFIG names.",
        rich_help_panel=_PANEL,
    ),
]
_SET = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any setting, such as learning.batch_examples=12; repeat at will. "
        "`moorline config` lists all.",
        rich_help_panel=_PANEL,
    ),
]
_STATE_DIR = SettingOption(
    "state_dir",
    "state_dir",
    Annotated[
        Path | None,
        typer.Option(
            "--state-dir",
            metavar="DIR",
            help="Where ledger, releases, spool and logs live.",
            rich_help_panel=_PANEL,
        ),
    ],
)
MODEL = SettingOption(
    "model.path",
    "model",
    Annotated[
        Path | None,
        typer.Option(
            "--model",
            "-m",
            metavar="DIR",
            help="The base model: config.json, tokenizer, *.safetensors.",
            rich_help_panel=_PANEL,
        ),
    ],
)
BOOTSTRAP = SettingOption(
    "stream.bootstrap",
    "bootstrap",
    Annotated[
        str | None,
        typer.Option(
            "--bootstrap",
            metavar="HOST:PORT",
            help="Kafka; without it `up` starts an embedded broker (development: all in memory).",
            rich_help_panel=_PANEL,
        ),
    ],
)
_PORT = Annotated[
    int | None,
    typer.Option("--port", help="Where to listen; 0: any free port.", rich_help_panel=_PANEL),
]
SERVING_PORT = SettingOption("serving.port", "port", _PORT)
UPDATER_PORT = SettingOption("updater.port", "port", _PORT)


def with_settings(
    *named: SettingOption,
) -> Callable[[Callable[Concatenate[Settings, _P], None]], Callable[..., None]]:
    """Give a verb the settings of its command line as its first argument.

    The verb gets --config, --state-dir and --set, and the options in ``named``, after its own.
    """
    options = (*named, _STATE_DIR)

    def decorate(verb: Callable[Concatenate[Settings, _P], None]) -> Callable[..., None]:
        run: Callable[..., None] = verb

        @functools.wraps(verb)
        def command(*, config: Path | None, assignments: list[str] | None, **given: Any) -> None:
            overrides = {one.setting: given.pop(one.name) for one in options}
            run(_settings(config, assignments or (), overrides), **given)

        added = {
            **{one.name: one.annotation for one in named},
            "config": _CONFIG,
            _STATE_DIR.name: _STATE_DIR.annotation,
            "assignments": _SET,
        }
        _, *own = inspect.signature(verb, eval_str=True).parameters.values()
        parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own] + [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
            )
            for name, annotation in added.items()
        ]
        # What Typer reads.
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {one.name: one.annotation for one in parameters}
        return command

    return decorate


def _settings(
    config: Path | None, assignments: Sequence[str], overrides: dict[str, Any]
) -> Settings:
    """The settings of one command line; ``--set`` is stronger than everything else.

    Raises:
        SettingsError: with the one line for the user.
        typer.BadParameter: an assignment without ``=``.
    """
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise typer.BadParameter(f"{assignment!r} is not NAME=VALUE", param_hint="--set")
        overrides[name.strip()] = value
    return load_settings(config, overrides)
