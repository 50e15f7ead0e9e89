"""The live policy, and the names by which vLLM's handlers know it.

vLLM asks its ``OpenAIServingModels`` twice: is this model name served, and what goes into the
reply's `model` field. This subclass answers both from the live policy, in either swap mode:
clients ask for the alias (or the live policy's full name) and read ``assistant@v000042``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList, ModelPermission
from vllm.lora.request import LoRARequest as LoRARequest

from moorline.events import Release, policy_name
from serving.context import current_request


@dataclass(frozen=True)
class ServedPolicy:
    """One version that can be served."""

    version: int
    release: Release | None = None
    """None for the base model, version 0."""
    directory: Path | None = None
    """The verified artifact; None for the base model."""


class LivePolicy:
    """Which policy new requests get. Only a swap changes it."""

    def __init__(self, alias: str) -> None:
        self.alias = alias
        self.policy = ServedPolicy(0)
        self.newest_released = 0
        """The highest version that the store was seen to have."""

    @property
    def version(self) -> int:
        return self.policy.version

    @property
    def name(self) -> str:
        return policy_name(self.alias, self.version)


def version_of_policy(alias: str, name: str) -> int | None:
    """``assistant@v000042`` -> 42; None for a name that is no policy of this alias."""
    _, separator, digits = name.rpartition("@v")
    version = int(digits) if separator and digits.isdecimal() and len(digits) < 20 else None
    return version if version is not None and policy_name(alias, version) == name else None


def adapter_request(name: str, adapter_id: int, directory: Path) -> LoRARequest:
    """What vLLM calls an adapter: a name, an integer id and a directory, each used once."""
    return LoRARequest(name, adapter_id, str(directory))


def adapters_in_use(engine: Any) -> set[int]:
    """The integer ids of the adapters of which the engine still computes replies."""
    adapters = [state.lora_request for state in engine.output_processor.request_states.values()]
    return {adapter.lora_int_id for adapter in adapters if adapter is not None}


class _LiveAdapter(dict[str | None, LoRARequest]):
    """vLLM's adapters by model name: the live one, also under every name of a policy."""

    def __init__(
        self,
        adapters: dict[str | None, LoRARequest],
        names_a_policy: Callable[[object], bool],
    ) -> None:
        super().__init__(adapters)
        self._names_a_policy = names_a_policy

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (bool(self) and self._names_a_policy(name))

    def __missing__(self, name: str | None) -> LoRARequest:
        return self[None]


class PolicyModels(OpenAIServingModels):  # type: ignore[misc]  # vLLM is not typed for us
    """vLLM's model names, answered by the live policy."""

    def __init__(self, live: LivePolicy, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._live = live

    def is_base_model(self, model_name: str) -> bool:
        return model_name == self._live.alias or self._names_a_policy(model_name)

    def _names_a_policy(self, model_name: object) -> bool:
        """Any that there was: a name that was listed or read in a reply goes on to be answered, by
        the live policy, and the reply says which that is."""
        if not isinstance(model_name, str):
            return False
        version, live = version_of_policy(self._live.alias, model_name), self._live
        return version is not None and version <= max(live.version, live.newest_released)

    def model_name(self, lora_request: LoRARequest | None = None) -> str:
        """The name for the reply; noted in the request's context for the version header."""
        name = self._live.name if lora_request is None else str(lora_request.lora_name)
        context = current_request()
        if context is not None:
            context.policy_version = version_of_policy(self._live.alias, name)
        return name

    def serve(self, policy: ServedPolicy, request: LoRARequest | None) -> None:
        """Give new requests this policy by its adapter (None: the base model): the flip.

        One step of the event loop: no request sees the one without the other. One without a model
        name must get the adapter too, hence the keys None and "".
        """
        self._live.policy = policy
        names = (self._live.alias, None, "")
        adapters = {} if request is None else dict.fromkeys(names, request)
        self.lora_requests = _LiveAdapter(adapters, self._names_a_policy)

    async def show_available_models(self) -> ModelList:
        """The alias and, below it, the policy that answers for it."""
        length = self.model_config.max_model_len
        alias, name = self._live.alias, self._live.name
        return ModelList(
            data=[
                ModelCard(
                    id=alias, root=name, max_model_len=length, permission=[ModelPermission()]
                ),
                ModelCard(id=name, root=name, parent=alias, permission=[ModelPermission()]),
            ]
        )
