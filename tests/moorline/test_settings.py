"""Settings: any tree survives the environment, every mistake is one line that helps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from moorline.settings import SIGNALS, Settings, SettingsError, child_environment, load_settings
from moorline.settings_sources import leaves, variable_of

# What an environment can carry: any text without NUL that is valid UTF-8.
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
secrets = texts.filter(lambda text: text and text == text.strip() and text.isprintable()).map(
    SecretStr
)
paths = st.from_regex(r"[A-Za-z0-9._ é-]{1,20}", fullmatch=True).map(Path)
positive = st.floats(min_value=1e-9, max_value=1e9)


def trees() -> st.SearchStrategy[dict[str, Any]]:
    """Settings of every kind that exists: numbers, flags, choices, paths, secrets, tuples."""
    return st.fixed_dictionaries(
        {},
        optional={
            "alias": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True),
            "state_dir": paths,
            "log_format": st.sampled_from(["text", "json"]),
            "model": st.fixed_dictionaries({"path": st.none() | paths}),
            "serving": st.fixed_dictionaries(
                {},
                optional={
                    "port": st.integers(0, 65535),
                    "api_key": st.none() | secrets,
                    "record_user_field": st.booleans(),
                    "kv_cache_gib": positive,
                    "vllm_args": st.lists(texts).map(tuple),
                },
            ),
            "stream": st.fixed_dictionaries(
                {},
                optional={
                    "bootstrap": st.none() | texts,
                    "sasl_username": st.none() | texts,
                    "sasl_password": st.none() | secrets,
                    "ssl_cafile": st.none() | paths,
                },
            ),
            "learning": st.fixed_dictionaries(
                {},
                optional={
                    "learning_rate": positive,
                    "threads": st.none() | st.integers(1, 64),
                    "signals": st.dictionaries(texts.filter(bool), st.floats(-1, 1), max_size=3),
                },
            ),
        },
    )


def error_of(
    environment: dict[str, str] | None = None,
    overrides: dict[str, Any] | None = None,
    config: Path | None = None,
) -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings(config, overrides, environment or {})
    text = str(caught.value)
    assert "\n" not in text
    return text


@given(trees())
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_settings_survive_the_environment_of_a_child(tree: dict[str, Any]) -> None:
    before = Settings.model_validate(tree)
    after = load_settings(environment=before.as_environment())
    assert after.model_dump() == before.model_dump()
    assert after.digest() == before.digest()


def test_what_may_be_none_is_none_by_default() -> None:
    """``as_environment`` leaves None out, so a child must get None from leaving it out."""
    for name, info in leaves(Settings):
        if type(None) in getattr(info.annotation, "__args__", ()):
            assert info.default is None, name


def test_every_setting_says_what_it_is_by_name_or_docstring() -> None:
    assert len({variable_of(name) for name, _ in leaves(Settings)}) == len(list(leaves(Settings)))


def test_command_line_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    config = tmp_path / "moorline.toml"
    config.write_text("alias = 'from-file'\n[serving]\nport = 1\nhost = '0.0.0.0'\nmax_loras = 4\n")
    environment = {"MOORLINE_SERVING__PORT": "2", "MOORLINE_SERVING__MAX_LORAS": "5"}
    loaded = load_settings(config, {"serving.port": 3, "serving.host": None}, environment)
    assert loaded.serving.port == 3
    assert loaded.serving.max_loras == 5
    assert loaded.serving.host == "0.0.0.0"
    assert loaded.serving.kv_cache_gib == Settings().serving.kv_cache_gib
    assert loaded.origin_of("serving.port") == "command line"
    assert loaded.origin_of("serving.max_loras") == "MOORLINE_SERVING__MAX_LORAS"
    assert loaded.origin_of("alias") == f"file {config}"
    assert loaded.origin_of("serving.kv_cache_gib") == "default"


def test_nothing_is_read_that_was_not_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("MOORLINE_ALIAS=dotenv\n")
    monkeypatch.chdir(tmp_path)
    assert load_settings().alias == "assistant"
    monkeypatch.setenv("MOORLINE_ALIAS", "process")
    assert load_settings().alias == "process"
    assert load_settings(environment={}).alias == "assistant"
    assert Settings().alias == "assistant"


def test_environment_can_name_the_file(tmp_path: Path) -> None:
    config = tmp_path / "moorline.toml"
    config.write_text("alias = 'mine'")
    assert load_settings(environment={"MOORLINE_CONFIG": str(config)}).alias == "mine"


def test_child_sees_its_parent_s_settings_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOORLINE_CONFIG", "/nowhere/moorline.toml")
    monkeypatch.setenv("MOORLINE_ALIAS", "stale")
    monkeypatch.setenv("MOORLINE_FAILPOINTS", "a=raise")
    child = child_environment(Settings(alias="mine"), MOORLINE_SERVING__PORT="7")
    assert "MOORLINE_CONFIG" not in child
    assert child["MOORLINE_FAILPOINTS"] == "a=raise"
    assert load_settings(environment=child).alias == "mine"
    assert load_settings(environment=child).serving.port == 7


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        (
            "MOORLINE_SERVING__PORT",
            "99999",
            "serving.port must be less than or equal to 65535, not '99999' "
            "(set by MOORLINE_SERVING__PORT)",
        ),
        ("MOORLINE_SERVING__PORT", "eight", "serving.port must be a valid integer, not 'eight'"),
        (
            "MOORLINE_MODEL__DTYPE",
            "int8",
            "model.dtype must be 'float32', 'bfloat16' or 'float16', not 'int8'",
        ),
        ("MOORLINE_STREAM__ACCEPT_NEW_TOPICS", "maybe", "must be a valid boolean"),
        ("MOORLINE_SERVING__VLLM_ARGS", "--flag", "must be a JSON list"),
        ("MOORLINE_LEARNING__LEARNING_RATE", "nan", "must be a finite number"),
        ("MOORLINE_LEARNING__LEARNING_RATE", "inf", "must be a finite number"),
        ("MOORLINE_SERVING_PORT", "1", "did you mean MOORLINE_SERVING__PORT?"),
        ("MOORLINE_LEARNING__BATCH_EXAMPLE", "1", "did you mean MOORLINE_LEARNING__BATCH_EXAMPLES"),
        ("MOORLINE_PORT", "1", "unknown environment variable MOORLINE_PORT"),
        ("moorline_alias", "x", "did you mean MOORLINE_ALIAS?"),
    ],
)
def test_bad_variable_is_one_line_that_says_what_is_allowed(
    variable: str, value: str, expected: str
) -> None:
    assert expected in error_of({variable: value})


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ("alais = 'x'", "unknown setting 'alais' in"),
        ("[serving]\nprot = 1", "did you mean serving.port?"),
        ("port = 1", "did you mean serving.port?"),
        ("[servng]\nport = 1", "unknown setting 'servng' in"),
        ("serving = 1", "write [serving]"),
        ("[serving", "is not valid TOML"),
        ("[serving]\nport = 'x'", "serving.port must be a valid integer, not 'x' (set by file"),
    ],
)
def test_bad_file_is_one_line_that_names_it(tmp_path: Path, toml: str, expected: str) -> None:
    config = tmp_path / "moorline.toml"
    config.write_text(toml)
    text = error_of(config=config)
    assert expected in text
    assert str(config) in text


def test_missing_file_is_said() -> None:
    assert "cannot read settings file nowhere.toml" in error_of(config=Path("nowhere.toml"))


def test_what_is_no_file_is_not_passed_over(tmp_path: Path) -> None:
    assert "not a regular file" in error_of(config=tmp_path)


def test_unknown_override_is_refused() -> None:
    assert "did you mean serving.port?" in error_of(overrides={"serving.prot": 1})
    assert "unknown setting 'serving'" in error_of(overrides={"serving": 1})


def test_list_is_json_from_the_command_line_too() -> None:
    loaded = load_settings(overrides={"serving.vllm_args": '["--flag"]'}, environment={})
    assert loaded.serving.vllm_args == ("--flag",)
    assert "hunter2" not in error_of(overrides={"serving.vllm_args": "--hf-token hunter2"})


def test_the_rewards_of_signals_are_a_table_from_every_source(tmp_path: Path) -> None:
    def signals(**sources: Any) -> dict[str, float]:
        return load_settings(**{"environment": {}, **sources}).learning.signals

    file = tmp_path / "moorline.toml"
    file.write_text("[learning.signals]\nread_aloud = 0.25\n")
    assert signals() == SIGNALS
    assert signals(config=file) == {"read_aloud": 0.25}
    variable = {"MOORLINE_LEARNING__SIGNALS": '{"copied": 1}'}
    assert signals(config=file, environment=variable) == {"copied": 1.0}
    line = {"learning.signals": '{"edited": -1}'}
    assert signals(config=file, environment=variable, overrides=line) == {"edited": -1.0}
    for wrong in ('{"copied": 1.5}', '{"copied": "NaN"}', '{"": 0}', "[0.5]", "copied=0.5"):
        assert "learning.signals" in error_of(overrides={"learning.signals": wrong})


def test_several_mistakes_are_counted() -> None:
    text = error_of({"MOORLINE_SERVING__PORT": "-1", "MOORLINE_UPDATER__PORT": "-1"})
    assert text.endswith("and 1 more")


def test_secrets_appear_in_no_message_and_no_repr(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("hunter2-hunter2\n")
    loaded = load_settings(environment={"MOORLINE_SERVING__API_KEY_FILE": str(key)})
    assert loaded.serving.api_key is not None
    assert loaded.serving.api_key.get_secret_value() == "hunter2-hunter2"
    assert "hunter2" not in repr(loaded)
    assert "hunter2" not in loaded.model_dump_json()
    both = {"MOORLINE_SERVING__API_KEY_FILE": str(key), "MOORLINE_SERVING__API_KEY": "hunter2"}
    assert "hunter2" not in error_of(both)
    assert "hunter2" not in error_of(overrides={"serving.api_key": ["hunter2"]})


def test_what_kubernetes_injects_for_a_service_is_not_ours() -> None:
    load_settings(
        environment={
            "MOORLINE_SERVICE_HOST": "10.0.0.1",
            "MOORLINE_SERVICE_PORT_HTTP": "80",
            "MOORLINE_PORT": "tcp://10.0.0.1:80",
            "MOORLINE_SERVING_PORT_80_TCP_ADDR": "10.0.0.1",
        }
    )


def test_digest_changes_with_what_shapes_an_update_only() -> None:
    base = Settings()
    assert base.digest() == Settings(state_dir=Path("elsewhere")).digest()
    learning = base.learning.model_copy(update={"learning_rate": 1e-5})
    assert base.digest() != Settings(learning=learning).digest()


def test_dump_is_json() -> None:
    assert json.loads(Settings().model_dump_json())["alias"] == "assistant"


def test_topics_must_keep_events_for_the_horizon() -> None:
    message = error_of(overrides={"stream.retention_seconds": 86400})
    assert "stream.retention_seconds is 86400" in message
    assert "learning.horizon_seconds (604800)" in message
    both = {"stream.retention_seconds": 86400, "learning.horizon_seconds": 86400}
    assert load_settings(overrides=both, environment={}).stream.retention_seconds == 86400
