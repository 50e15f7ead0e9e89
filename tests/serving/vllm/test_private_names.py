"""After an upgrade of vLLM this says which of the names that Moorline relies on are gone."""

from __future__ import annotations

import importlib.util

import pytest

from serving.vllm import private_names
from serving.vllm.private_names import (
    PRIVATE_NAMES,
    PrivateName,
    PrivateNameMissing,
    exists,
    require,
)


@pytest.mark.parametrize("row", PRIVATE_NAMES, ids=lambda row: row.name)
def test_the_installed_vllm_has(row: PrivateName) -> None:
    assert exists(row.name), f"{row.used_in} needs {row.name}: {row.why}"


@pytest.mark.parametrize("used_in", sorted({row.used_in for row in PRIVATE_NAMES}))
def test_the_table_names_modules_that_exist(used_in: str) -> None:
    assert importlib.util.find_spec(used_in) is not None


@pytest.mark.parametrize(
    "name",
    [
        "vllm.no_such_module.Name",
        "vllm.v1.sample.sampler.NoSuchSampler",
        "vllm.v1.sample.sampler.Sampler.no_such_attribute",
        "vllm.v1.engine.async_llm.AsyncLLM.pause_generation(no_such_parameter)",
    ],
)
def test_a_name_that_is_gone_is_noticed(name: str) -> None:
    assert not exists(name)


def test_an_executor_whose_name_is_gone_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = PrivateName("vllm.v1.executor.Gone._init_executor", "serving.vllm.executor", "extended")
    monkeypatch.setattr(private_names, "PRIVATE_NAMES", (gone,))
    with pytest.raises(PrivateNameMissing, match=r"Gone\._init_executor.*serving\.vllm\.executor"):
        require("serving.vllm.executor")
