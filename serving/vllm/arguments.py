"""What becomes of each argument of vLLM's that `serving.vllm_args` may name.

It works, or the start is refused with a line that names it: none is accepted and then ignored. The
tables hold every argument that the installed vLLM's parser knows, by the parser's own names
(``dest``); one that a later vLLM adds is refused until somebody has looked at it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from moorline.errors import MoorlineError


class ArgumentInvalid(MoorlineError):
    """An argument in `serving.vllm_args` is refused; one line with the remedy."""


class _Parser(FlexibleArgumentParser):  # type: ignore[misc]  # vLLM is not typed for us
    """vLLM's parser, without the help that ends the process."""

    def error(self, message: str) -> NoReturn:
        """Raise it on one line, without the values of what is not known: one may be a secret."""
        what, unknown, rest = message.partition("unrecognized arguments: ")
        if unknown:
            names = [word.split("=")[0] for word in rest.split() if word.startswith("-")]
            message = (
                f"{what}{unknown}{' '.join(names)}: check the spelling in vLLM's documentation"
            )
        raise ArgumentInvalid(f"serving.vllm_args: {' '.join(message.split())}")


def parser() -> Any:
    """The parser of `vllm serve`, as the installed version has it.

    What it cannot parse is an ``ArgumentInvalid``; the start of a name is not taken for the name.
    """
    return make_arg_parser(_Parser(add_help=False, allow_abbrev=False))


def check_arguments(words: Sequence[str]) -> None:
    """Refuse what cannot work here.

    Raises:
        ArgumentInvalid: naming the argument, why, and what to do.
    """
    if any(word.split("=")[0] == "--config" for word in words):  # else it is read here already
        raise ArgumentInvalid(f"serving.vllm_args: --config is refused: {_REFUSED['config']}")
    vllms = parser()
    # A destination that is there already keeps its value unless an argument sets it.
    unset: dict[str, list[Any]] = {action.dest: [] for action in vllms._actions}
    try:
        found = vars(vllms.parse_args(list(words), argparse.Namespace(**unset)))
    except (ValueError, IndexError) as error:
        raise ArgumentInvalid(f"serving.vllm_args: {error}") from None
    for action in vllms._actions:
        value = found[action.dest]
        absent_positional = value is None and not action.option_strings
        if value is not unset[action.dest] and not absent_positional:
            _check(action)


def _check(action: argparse.Action) -> None:
    name = action.option_strings[0] if action.option_strings else "a model's name"
    if action.dest in _SETTINGS:
        raise ArgumentInvalid(
            f"serving.vllm_args: {name} is refused: set {_SETTINGS[action.dest]} instead"
        )
    if action.dest in _REFUSED:
        raise ArgumentInvalid(f"serving.vllm_args: {name} is refused: {_REFUSED[action.dest]}")
    if action.dest not in _PASSED_ON:
        raise ArgumentInvalid(
            f"serving.vllm_args: {name} is refused: this version of Moorline does not know what it "
            "does, and it could be ignored: leave it out, or report it"
        )


def classes_of(dest: str) -> list[str]:
    """The tables that hold an argument; there should be one."""
    tables = {"setting": _SETTINGS, "refused": _REFUSED, "passed_on": _PASSED_ON}
    return [name for name, table in tables.items() if dest in table]


def known() -> set[str]:
    """Every argument that is in a table."""
    return {*_SETTINGS, *_REFUSED, *_PASSED_ON}


_SETTINGS = {
    "model": "model.path",
    "model_tag": "model.path",
    "served_model_name": "alias",
    "host": "serving.host",
    "port": "serving.port",
    "dtype": "model.dtype",
    "max_model_len": "model.max_length_tokens",
    "max_num_seqs": "serving.max_concurrent_sequences",
    "shutdown_timeout": "serving.drain_seconds",
    "api_key": "serving.api_key",
    "max_loras": "serving.max_loras",
    "max_lora_rank": "learning.lora_rank",
    "enable_lora": "serving.swap_mode",
    "ssl_certfile": "serving.ssl_certfile",
    "ssl_keyfile": "serving.ssl_keyfile",
}
"""Those that a setting of Moorline's gives, and that setting."""

_WHY_REFUSED = {
    "a file of arguments would pass this check: name them one by one in serving.vllm_args": """
    config
    """,
    "a server is one process with one engine: start more behind a balancer": """
    headless api_server_count data_parallel_size data_parallel_rank data_parallel_start_rank
    data_parallel_size_local data_parallel_address data_parallel_rpc_port data_parallel_backend
    data_parallel_hybrid_lb data_parallel_external_lb data_parallel_multi_port_external_lb
    data_parallel_supervisor_port dp_supervisor_probe_interval_s dp_supervisor_probe_timeout_s
    dp_supervisor_probe_failure_threshold dp_sync_interval disable_nccl_for_dp_synchronization
    enable_elastic_ep elastic_ep_max_dp_size enable_fault_tolerance fault_tolerance_config
    """,
    "a server is one machine: start more servers behind a balancer": """
    nnodes node_rank master_addr master_port
    """,
    "Moorline listens on serving.host and serving.port with HTTP alone: leave it out": """
    grpc grpc_port uds
    """,
    "clients prove who they are with serving.api_key: let a proxy ask for certificates": """
    ssl_ca_certs ssl_cert_reqs
    """,
    "a renewed certificate is read at the next start, and ciphers are Python's own": """
    enable_ssl_refresh ssl_ciphers
    """,
    "Moorline's HTTP server does not read it: limit headers in a proxy in front of it": """
    h11_max_incomplete_event_size h11_max_header_count
    """,
    "Moorline sets up the logs, and keeps no access log: leave it out": """
    uvicorn_log_level disable_uvicorn_access_log disable_access_log_for_endpoints logging_config
    log_level log_config_file use_tqdm_on_load
    """,
    "logs never hold what people wrote: leave it out": """
    enable_log_requests enable_log_outputs enable_log_deltas max_log_len
    """,
    "adapters are this server's policies, and Moorline loads them: leave it out": """
    lora_modules lora_target_modules default_mm_loras enable_tower_connector_lora max_cpu_loras
    enable_mixed_moe_lora_format enable_moe_shared_loras max_lora_cls_labels
    """,
    "clients would not get plain vLLM's logprobs, and no reply could teach: leave it out": """
    speculative_config spec_method spec_model spec_tokens per_request_spec_decode_metrics
    """,
    "replies not drawn token by token have no logprobs: serve another model": """
    diffusion_config
    """,
    "Moorline swaps weights and records logprobs with its own: leave it out": """
    worker_cls worker_extension_cls logprobs_mode
    """,
    "it is not imported here: register the parser in an installed vLLM plugin": """
    tool_parser_plugin reasoning_parser_plugin
    """,
    "only models that generate text are served: leave it out": """
    runner convert pooler_config io_processor_plugin enable_flash_late_interaction
    mm_encoder_only
    """,
    "server and updater load one directory offline: put the files into model.path": """
    tokenizer hf_config_path revision code_revision tokenizer_revision download_dir hf_token
    skip_tokenizer_init hf_overrides model_class_overrides
    """,
    "only safetensors are loaded: convert the weights": """
    load_format pt_load_map_location ignore_patterns
    """,
    "it changes what the engine returns, and was not tried with the recorder: leave it out": """
    return_sampling_mask enable_return_routed_experts aux_output_config enable_trace_replay
    """,
    "its route is not open on this server: leave it out": """
    tokens_only enable_scale_out enable_tokenizer_info_endpoint disable_fastapi_docs
    enable_offline_docs enable_server_load_tracking profiler_config
    """,
    "Moorline alone changes the weights of a running engine: leave it out": """
    enable_sleep_mode sleep_mode_offload_cudagraph sleep_preserve_parameter_names
    enable_nccl_comm_suspend weight_transfer_config
    """,
    "a cache outside the engine would keep what an older policy computed: leave it out": """
    kv_transfer_config ec_transfer_config kv_offloading_size kv_offloading_backend
    """,
    "set serving.kv_cache_gib on CPU, --gpu-memory-utilization on GPU": """
    kv_cache_memory_bytes
    """,
}

_REFUSED = {name: why for why, names in _WHY_REFUSED.items() for name in names.split()}
"""Those that would be ignored here or do harm, and why with the remedy."""

_PASSED_ON = frozenset(
    """
    additional_config aggregate_engine_logging all2all_backend allow_credentials
    allow_deprecated_quantization allowed_headers allowed_local_media_path allowed_media_domains
    allowed_methods allowed_origins anthropic_disabled_thinking_effort async_scheduling
    attention_backend attention_config block_size chat_template chat_template_content_format
    cohere_format cohere_is_reasoning_model collect_detailed_traces compilation_config
    config_format cp_kv_cache_interleave_size cpu_distributed_timeout_seconds cpu_offload_gb
    cpu_offload_params cudagraph_capture_sizes cudagraph_metrics custom_histogram_buckets
    dbo_decode_token_threshold dbo_prefill_token_threshold dcp_comm_backend
    dcp_kv_cache_interleave_size dcp_q_replicate decode_context_parallel_size
    default_chat_template_kwargs device_ids disable_cascade_attn disable_chunked_mm_input
    disable_custom_all_reduce disable_hybrid_kv_cache_manager disable_log_stats
    disable_sliding_window distributed_executor_backend distributed_timeout_seconds
    ec_manager_config enable_auto_tool_choice enable_batch_sharded_sampling
    enable_chunked_prefill enable_cumem_allocator enable_dbo enable_ep_weight_filter enable_eplb
    enable_expert_parallel enable_flashinfer_autotune enable_force_include_usage enable_hc_sp
    enable_layerwise_nvtx_tracing enable_logging_iteration_details
    enable_mamba_cache_stochastic_rounding enable_mamba_shared_prefix_checkpoint
    enable_mfu_metrics enable_mm_embeds enable_per_request_metrics enable_prefix_caching
    enable_prompt_embeds enable_prompt_tokens_details enable_request_id_headers
    enable_shm_tensor_arena enforce_eager engram_config eplb_config
    exclude_tools_when_tool_choice_none expert_placement_strategy fail_on_environ_validation
    fingerprint_mode fingerprint_value fully_sharded_loras gdn_prefill_backend generation_config
    gpu_memory_utilization interleave_mm_strings ir_op_priority jit_monitor_mode
    jit_monitor_verbose kda_decode_backend kda_prefill_backend kernel_config kv_cache_dtype
    kv_cache_dtype_skip_layers kv_cache_metrics kv_cache_metrics_sample kv_events_config
    kv_sharing_fast_prefill language_model_only limit_mm_per_prompt linear_backend
    log_error_stack logits_processors long_prefill_token_threshold
    long_prefill_token_threshold_adaptive lora_dtype mamba_backend mamba_block_size
    mamba_cache_dtype mamba_cache_mode mamba_cache_philox_rounds mamba_ssm_cache_dtype
    mamba_ssu_algorithm max_cudagraph_capture_size max_logprobs max_num_active_seqs
    max_num_batched_tokens max_num_queued_reqs max_num_queued_tokens max_num_scheduled_tokens
    max_parallel_loading_workers media_io_kwargs middleware mm_device_do_normalize
    mm_encoder_attn_backend mm_encoder_attn_dtype mm_encoder_fp8_scale_path
    mm_encoder_fp8_scale_save_margin mm_encoder_fp8_scale_save_path mm_encoder_tp_mode
    mm_hasher_algorithm mm_ipc_gpu_memory_gb mm_processor_cache_gb mm_processor_cache_type
    mm_processor_device mm_processor_kwargs mm_shm_cache_max_object_size_mb mm_tensor_ipc
    model_impl model_loader_extra_config moe_backend num_gpu_blocks_override numa_bind
    numa_bind_cpus numa_bind_nodes offload_backend offload_group_size offload_num_in_group
    offload_params offload_prefetch_step optimization_level otlp_traces_endpoint
    override_generation_config performance_mode pipeline_parallel_size
    prefill_context_parallel_size prefill_schedule_interval prefix_cache_retention_interval
    prefix_caching_hash_algo prefix_match_unit quantization quantization_config
    ray_workers_use_nsight reasoning_config reasoning_parser renderer_num_workers
    replayssm_buffer_len response_role return_tokens_as_token_ids root_path
    safetensors_load_strategy safetensors_prefetch_block_size safetensors_prefetch_num_threads
    scheduler_cls scheduler_reserve_full_isl scheduling_policy seed
    show_hidden_metrics_for_version skip_mm_profiling sparse_indexer_topk_backend
    specialize_active_lora sse_keep_alive_interval stream_interval structured_outputs_config
    swa_bounded_replay tensor_parallel_size tokenizer_mode tool_call_parser tool_server
    tool_strict_level trust_remote_code trust_request_chat_template trust_request_mm_kwargs
    ubatch_size use_fp64_gumbel use_replayssm video_pruning_method video_pruning_rate watermark
    watermark_config
    """.split()  # noqa: SIM905  # 200 short names: a table to look one up in
)
"""Those that vLLM's engine or app reads from what it is given, as under `vllm serve`."""
