"""Every private or undocumented name of vLLM that Moorline relies on, in one table.

After an upgrade of vLLM, ``tests/serving/vllm/test_private_names.py`` says which rows are gone.
A row's name is a dotted path; ``(...)`` at its end lists parameters that we pass by keyword.
"""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any, NamedTuple

from moorline.errors import MoorlineError


class PrivateName(NamedTuple):
    """One name, the module of ours that uses it, and what for."""

    name: str
    used_in: str
    why: str


class PrivateNameMissing(MoorlineError):
    """The installed vLLM lacks a name that Moorline relies on; the message quotes the row."""


_EXECUTOR = "vllm.v1.executor.multiproc_executor.MultiprocExecutor"
_SHARED_MEMORY = "vllm.distributed.device_communicators.shm_broadcast"
_LAUNCHERS = "vllm.entrypoints.launchers"
_MODELS = "vllm.entrypoints.openai.models.serving.OpenAIServingModels"
_RUNNER = "vllm.v1.worker.gpu_model_runner.GPUModelRunner"
_BATCH = "vllm.v1.worker.gpu_input_batch"
_SAMPLER = "vllm.v1.sample.sampler.Sampler"
_METADATA = "vllm.v1.sample.metadata.SamplingMetadata"
_HEAD = "vllm.model_executor.layers.vocab_parallel_embedding"
_ENGINE = "vllm.v1.engine.async_llm.AsyncLLM"
_OUTPUTS = "vllm.v1.engine.output_processor"
_PARAMS = "vllm.sampling_params.SamplingParams"
_REPLY = "vllm.entrypoints.generate.base.protocol.RequestResponseMetadata"

PRIVATE_NAMES = (
    # The executor that does not spin.
    PrivateName(f"{_EXECUTOR}._init_executor", "serving.vllm.executor", "extended"),
    PrivateName(f"{_EXECUTOR}.response_mqs", "serving.vllm.executor", "the queues to quiet"),
    PrivateName(
        f"{_SHARED_MEMORY}.MessageQueue._spin_condition",
        "serving.vllm.executor",
        "what waits; None for a queue without shared memory",
    ),
    PrivateName(
        f"{_SHARED_MEMORY}.MessageQueue.dequeue(timeout, indefinite)",
        "serving.vllm.executor",
        "its limit is measured in running time",
    ),
    PrivateName(
        f"{_SHARED_MEMORY}.SpinCondition.busy_loop_s",
        "serving.vllm.executor",
        "set to BUSY_SECONDS",
    ),
    PrivateName(
        f"{_SHARED_MEMORY}.SpinCondition.wait(timeout_ms)",
        "serving.vllm.executor",
        "replaced by a wait of a millisecond at most",
    ),
    # The app.
    PrivateName(f"{_LAUNCHERS}.app.build_app", "serving.vllm.app", "the app, before our parts"),
    PrivateName(
        f"{_LAUNCHERS}.api_server.app_state.OpenAIServingModels",
        "serving.vllm.app",
        "replaced while init_app_state makes its model names",
    ),
    PrivateName(f"{_LAUNCHERS}.api_server.app_state.init_app_state", "serving.vllm.app", "called"),
    PrivateName(
        f"{_LAUNCHERS}.api_server.entry.build_async_engine_client", "serving.server", "the engine"
    ),
    PrivateName(
        f"{_LAUNCHERS}.cli_args.make_arg_parser", "serving.vllm.arguments", "the engine's settings"
    ),
    PrivateName(f"{_LAUNCHERS}.cli_args.validate_parsed_serve_args", "serving.server", "called"),
    PrivateName(
        f"{_REPLY}.request_id", "serving.context", "the reply's id, in the request's state"
    ),
    PrivateName(
        "vllm.entrypoints.openai.responses.serving.OpenAIServingResponses"
        ".create_responses(request, raw_request)",
        "serving.vllm.responses",
        "replaced on the instance: ids are ours",
    ),
    PrivateName("vllm.logger.set_vllm_process_name", "serving.__main__", "its field is removed"),
    # Model names.
    PrivateName(f"{_MODELS}.is_base_model", "serving.vllm.models", "overridden"),
    PrivateName(f"{_MODELS}.model_name(lora_request)", "serving.vllm.models", "overridden"),
    PrivateName(f"{_MODELS}.show_available_models", "serving.vllm.models", "overridden"),
    PrivateName(f"{_MODELS}.lora_requests", "serving.vllm.models", "set: the flip of an adapter"),
    PrivateName(f"{_MODELS}.model_config", "serving.vllm.models", "read for the maximum length"),
    # The sampler.
    PrivateName(f"{_RUNNER}.sampler", "serving.vllm.sampler", "replaced by ours"),
    PrivateName(f"{_RUNNER}.input_batch", "serving.vllm.sampler", "which row is which request"),
    PrivateName(f"{_RUNNER}.requests", "serving.vllm.sampler", "each request's parameters"),
    PrivateName(f"{_BATCH}.InputBatch.req_ids", "serving.vllm.sampler", "the rows' requests"),
    PrivateName(f"{_BATCH}.InputBatch.num_logprobs", "serving.vllm.sampler", "who wants logprobs"),
    PrivateName(f"{_BATCH}.InputBatch.logprob_token_ids", "serving.vllm.sampler", "likewise"),
    PrivateName(f"{_BATCH}.CachedRequestState.sampling_params", "serving.vllm.sampler", "our flag"),
    PrivateName(f"{_SAMPLER}.forward", "serving.vllm.sampler", "overridden"),
    PrivateName(f"{_SAMPLER}.sample", "serving.vllm.sampler", "overridden"),
    PrivateName(f"{_SAMPLER}.compute_logprobs", "serving.vllm.sampler", "the raw logprobs"),
    PrivateName(f"{_SAMPLER}.logprobs_mode", "serving.vllm.sampler", "must be processed_logprobs"),
    PrivateName(f"{_SAMPLER}.use_fp64_gumbel", "serving.vllm.sampler", "passed on"),
    PrivateName(
        f"{_METADATA}.max_num_logprobs", "serving.vllm.sampler", "whether anybody wants any"
    ),
    PrivateName(f"{_METADATA}.logprob_token_ids", "serving.vllm.sampler", "likewise"),
    PrivateName(
        "vllm.envs.VLLM_USE_V2_MODEL_RUNNER", "serving.server", "0: the runner with this sampler"
    ),
    # Weight reload.
    PrivateName(f"{_RUNNER}.reload_weights(weights_iterator)", "serving.vllm.worker", "the reload"),
    PrivateName(f"{_RUNNER}.get_model", "serving.vllm.worker", "to find the output head"),
    PrivateName(f"{_HEAD}.ParallelLMHead.quant_method", "serving.vllm.worker", "packs the head"),
    PrivateName(
        f"{_HEAD}.UnquantizedEmbeddingMethod.process_weights_after_loading",
        "serving.vllm.worker",
        "packs a tied head again",
    ),
    PrivateName(
        "vllm.model_executor.model_loader.reload.layerwise.logger",
        "serving.vllm.worker",
        "quieted: it warns about the tied head",
    ),
    # The engine client.
    PrivateName(
        f"{_ENGINE}.generate(lora_request)", "serving.recorder", "replaced on the instance"
    ),
    PrivateName(f"{_ENGINE}.collective_rpc(args)", "serving.strategies", "calls WorkerExtension"),
    PrivateName(
        f"{_ENGINE}.pause_generation(mode, clear_cache)", "serving.strategies", "before a reload"
    ),
    PrivateName(f"{_ENGINE}.resume_generation", "serving.strategies", "after a reload"),
    PrivateName(
        f"{_ENGINE}.update_weight_version", "serving.strategies", "the name that tokens carry"
    ),
    PrivateName(f"{_ENGINE}.add_lora", "serving.strategies", "load an adapter"),
    PrivateName(f"{_ENGINE}.remove_lora", "serving.strategies", "unload an adapter"),
    PrivateName(f"{_ENGINE}.errored", "serving.server", "whether the engine still lives"),
    PrivateName(f"{_ENGINE}.output_processor", "serving.vllm.sampling", "versions of a cut reply"),
    PrivateName(
        f"{_OUTPUTS}.OutputProcessor.external_req_ids", "serving.vllm.sampling", "likewise"
    ),
    PrivateName(f"{_OUTPUTS}.OutputProcessor.request_states", "serving.vllm.sampling", "likewise"),
    PrivateName(
        f"{_OUTPUTS}.RequestState.lora_request", "serving.vllm.models", "adapters still in use"
    ),
    PrivateName(f"{_OUTPUTS}.RequestState.request_index", "serving.vllm.sampling", "likewise"),
    PrivateName(
        f"{_OUTPUTS}.RequestState.weight_version_starts", "serving.vllm.sampling", "likewise"
    ),
    # What a request asks and what its outputs say.
    PrivateName(
        f"{_PARAMS}.extra_args", "serving.vllm.sampling", "carries our flag to the sampler"
    ),
    PrivateName(f"{_PARAMS}.logprob_token_ids", "serving.vllm.sampling", "who wants logprobs"),
    PrivateName(
        f"{_PARAMS}.structured_outputs", "serving.vllm.sampling", "alters the distribution"
    ),
    PrivateName(
        f"{_PARAMS}.thinking_token_budget", "serving.vllm.sampling", "alters the distribution"
    ),
    PrivateName(f"{_PARAMS}.watermarking", "serving.vllm.sampling", "alters the distribution"),
    PrivateName(
        f"{_PARAMS}.trace_decode_token_ids", "serving.vllm.sampling", "alters the distribution"
    ),
    PrivateName(f"{_PARAMS}.prompt_logprobs", "serving.vllm.sampling", "who scores a prompt"),
    PrivateName(
        "vllm.v1.sample.logits_processor.cached_load_custom_logitsprocs(logits_processors)",
        "serving.vllm.sampling",
        "logits processors that vLLM does not ship",
    ),
    PrivateName(
        "vllm.inputs.engine.mm_input(mm_placeholders)",
        "serving.vllm.sampling",
        "what a prompt holds beside tokens",
    ),
    PrivateName(
        "vllm.outputs.CompletionOutput.weight_versions", "serving.recorder", "spans of versions"
    ),
    PrivateName("vllm.outputs.WeightVersionSpan.version", "serving.recorder", "likewise"),
    PrivateName("vllm.outputs.WeightVersionSpan.start", "serving.recorder", "likewise"),
    PrivateName("vllm.outputs.WeightVersionSpan.end", "serving.recorder", "likewise"),
)


def require(used_in: str) -> None:
    """Check the rows of one of our modules, where a missing name would otherwise go unnoticed.

    Raises:
        PrivateNameMissing: quoting the first row whose name is gone.
    """
    for row in PRIVATE_NAMES:
        if row.used_in == used_in and not exists(row.name):
            raise PrivateNameMissing(
                f"the installed vLLM has no {row.name} ({row.used_in} needs it: {row.why}): "
                f"install the vLLM version that this Moorline was made for"
            )


def exists(name: str) -> bool:
    """Whether the installed vLLM has this name, with the parameters in its parentheses."""
    path, _, parameters = name.rstrip(")").partition("(")
    module, attributes = _module_of(path)
    owner: Any = module
    for position, attribute in enumerate(attributes):
        if not hasattr(owner, attribute):
            last = position == len(attributes) - 1
            return last and inspect.isclass(owner) and _instances_have(owner, attribute)
        owner = getattr(owner, attribute)
    if not parameters:
        return module is not None
    return set(parameters.split(", ")) <= set(inspect.signature(owner).parameters)


def _module_of(path: str) -> tuple[Any, list[str]]:
    """The module that a dotted path begins with, and the attributes after it."""
    words = path.split(".")
    for length in range(len(words), 0, -1):
        try:
            return importlib.import_module(".".join(words[:length])), words[length:]
        except ImportError:
            continue
    return None, words


def _instances_have(owner: type, attribute: str) -> bool:
    """Whether a class declares an attribute or sets it on ``self``."""
    for base in owner.__mro__:
        if attribute in vars(base).get("__annotations__", {}):
            return True
        if base.__module__.startswith("vllm"):
            sets = rf"self\.{attribute}(: [^=\n]+)?( = |: )"
            if re.search(sets, inspect.getsource(base)):
                return True
    return False
