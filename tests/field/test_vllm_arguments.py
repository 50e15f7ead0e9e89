"""An argument for vLLM works or is refused at start by its name: none is swallowed."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path

import pytest

from daemon.cli.doctor import Health, examine
from moorline.settings import Settings
from serving.vllm.arguments import (
    _SETTINGS,
    ArgumentInvalid,
    check_arguments,
    classes_of,
    known,
    parser,
)


def test_every_argument_of_this_vllm_is_in_one_class() -> None:
    classes = {action.dest: classes_of(action.dest) for action in parser()._actions}
    assert {dest: found for dest, found in classes.items() if len(found) != 1} == {}
    assert known() == set(classes)  # and none is left of another version


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--ssl-keyfile=/k.pem"], "--ssl-keyfile is refused: set serving.ssl_keyfile"),
        (["--ssl_certfile", "/c.pem"], "--ssl-certfile is refused: set serving.ssl_certfile"),
        (["--headless"], "--headless is refused: .*balancer"),
        (["-asc", "2"], "--api-server-count is refused"),
        (["--api-server-count", "2"], "--api-server-count is refused"),
        (["-sc.method=ngram"], "--speculative-config is refused: .*logprobs"),
        (["--speculative-config", '{"method":"ngram"}'], "--speculative-config is refused"),
        (["--spec-tokens", "2"], "--spec-tokens is refused"),
        (["--lora-modules", "a=/b"], "--lora-modules is refused"),
        (["--port", "9000"], "--port is refused: set serving.port instead"),
        (["--port=8000"], "--port is refused"),  # as by default: it was said all the same
        (["--api-key", "hunter2"], "--api-key is refused: set serving.api_key instead"),
        (["some/model"], "a model's name is refused: set model.path instead"),
        (["--config", "/a.yaml"], "--config is refused: .*one by one"),
        (["--config=/a.yaml"], "--config is refused"),
        (["--enable-log-requests"], "--enable-log-requests is refused"),
        (["--no-enable-log-requests"], "--enable-log-requests is refused"),
        (["--tool-parser-plugin", "/p.py"], "--tool-parser-plugin is refused: .*plugin"),
        (["--kv-transfer-config.kv_role=kv_both"], "--kv-transfer-config is refused"),
        (["--no-such-thing"], "unrecognized arguments: --no-such-thing"),
        (["--help"], "unrecognized arguments: --help"),
        (["--seed", "many"], "--seed"),
        (["--hf-overrides.a"], "vllm_args"),
        (["--headles"], "unrecognized"),
        (["--api-keys", "hunter2"], "unrecognized arguments: --api-keys: "),
        (["--api-keys=hunter2"], "unrecognized arguments: --api-keys: "),
        (["--kv-transfer-config.kv_role=nobody"], "--kv-transfer-config"),
    ],
)
def test_what_cannot_work_here_is_refused_with_its_name_and_the_remedy(
    words: list[str], says: str
) -> None:
    with pytest.raises(ArgumentInvalid, match=says) as refused:
        check_arguments(words)
    assert "hunter2" not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--tensor-parallel-size=2", "-q", "fp8"],
        ["--generation-config", "vllm"],
        ["--override-generation-config.repetition_penalty=1.0"],
        ["-O3", "--middleware", "a.b", "--middleware", "c.d"],
        ["--logits-processors", "a:B"],
        ["--limit-mm-per-prompt", '{"image": 2}', "--enable_prefix_caching"],
    ],
)
def test_what_works_is_passed_on(words: list[str]) -> None:
    check_arguments(words)


@pytest.mark.parametrize("name", sorted(set(_SETTINGS.values())))
def test_a_setting_that_a_refusal_names_exists(name: str) -> None:
    attrgetter(name)(Settings())  # raises for one that does not


@pytest.mark.parametrize(
    ("words", "health", "says"),
    [
        ((), Health.OK, "none"),
        (("--seed", "3"), Health.OK, "can be served"),
        (("--port", "9"), Health.FAIL, "--port is refused"),
        (("--no-such-thing", "x"), Health.FAIL, "--no-such-thing"),
    ],
)
def test_doctor_finds_before_the_start_what_the_start_would_refuse(
    words: tuple[str, ...], health: Health, says: str, tmp_path: Path
) -> None:
    settings = Settings(
        state_dir=tmp_path,
        serving={"port": 0, "vllm_args": words},  # type: ignore[arg-type]
        updater={"port": 0},  # type: ignore[arg-type]
    )
    (found,) = [one for one in examine(settings) if one.check == "vLLM's arguments"]
    assert found.health is health
    assert says in found.detail
    assert bool(found.remedy) == (health is Health.FAIL)
