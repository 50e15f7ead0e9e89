"""The server: vLLM's own OpenAI app, started with Moorline's parts.

Order of a start: check what can be checked in a second (model, memory, key, port), start the
engine, warm it up, bring the wanted policy live, only then listen (a store that does not answer is
waited for half a minute, then the base model answers until it does). Order of a stop: no new
connections, the running replies to their end (``drain_seconds`` at most), the engine, then the last
events.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moorline.adapter_format import TARGET_MODULES
from moorline.base_model import check_model_dir, model_digest
from moorline.errors import MoorlineError
from moorline.http import base_url, port_problem
from moorline.memory import available_memory_bytes
from moorline.pseudonyms import Pseudonyms
from moorline.settings import ServingSettings, Settings
from moorline.stream import Publisher, SpoolLocked
from moorline.systemd import Notifier
from moorline.tls import check_certificate
from moorline.trainability import defaults_in_vain
from serving import harmless_warnings
from serving.lifetime import nothing_outlives_this_process
from serving.pseudonym_key import server_pseudonyms

if TYPE_CHECKING:
    from serving.vllm.app import Parts

logger = logging.getLogger("moorline.serving")

ENVIRONMENT = {
    # No network at start: the model is a directory, and nobody is told that we run.
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # The newer runner has another sampler; row-wise logprob conventions need this one.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}
FORBIDDEN_ENVIRONMENT = ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING")
"""They open routes on the public port that change weights or run code."""

MEMORY_BESIDE_WEIGHTS_BYTES = 1.5 * 2**30
"""Two Python processes with torch and vLLM, measured on CPU."""
PUBLISHER_CLOSE_SECONDS = 5.0
"""To deliver the last events; what is left stays in the spool."""
_NOTIFY_SECONDS = 1.0
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class ServerError(MoorlineError):
    """The server cannot start, or had to stop; one line with the remedy."""


def prepare_environment() -> None:
    """Settings that vLLM reads from the environment at import. Call before importing it.

    Raises:
        ServerError: an environment variable would open vLLM's development routes.
    """
    for name in FORBIDDEN_ENVIRONMENT:
        if os.environ.get(name, "0").lower() not in ("", "0", "false"):
            raise ServerError(f"{name} opens unguarded routes on the public port: unset it")
    if not any(name in os.environ for name in harmless_warnings.VLLM_LOG_VARIABLES):
        os.environ["VLLM_LOGGING_CONFIG_PATH"] = str(harmless_warnings.CONFIG)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def swap_mode(settings: Settings) -> str:
    """``adapter`` or ``reload``."""
    if settings.serving.swap_mode != "auto":
        return settings.serving.swap_mode
    return "reload" if runs_on_cpu() else "adapter"


def runs_on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def vllm_arguments(settings: Settings, model_dir: Path, port: int, mode: str) -> list[str]:
    """The command line that `vllm serve` would have got."""
    serving = settings.serving
    arguments = {
        "--model": model_dir,
        "--served-model-name": settings.alias,
        "--host": serving.host,
        "--port": port,
        "--dtype": settings.model.dtype,
        "--max-model-len": settings.model.max_length_tokens,
        "--max-num-seqs": serving.max_concurrent_sequences,
        "--load-format": "safetensors",
        "--logprobs-mode": "processed_logprobs",
        "--worker-extension-cls": "serving.vllm.worker.WorkerExtension",
        "--shutdown-timeout": int(serving.drain_seconds),
        "--uvicorn-log-level": "warning",
    }
    words = [f"{name}={value}" for name, value in arguments.items()]
    words.append("--no-use-tqdm-on-load")
    if runs_on_cpu():
        words += ["--enforce-eager", f"--kv-cache-memory-bytes={int(serving.kv_cache_gib * 2**30)}"]
        words.append("--distributed-executor-backend=serving.vllm.executor.QuietExecutor")
    if mode == "adapter":
        rank = next(rank for rank in LORA_RANKS if rank >= settings.learning.lora_rank)
        # vLLM's CPU kernels give a request without adapter the last slot's, when another request in
        # the batch has one: one slot more than is ever filled stays empty, which changes nothing.
        slots = serving.max_loras + runs_on_cpu()
        words += ["--enable-lora", f"--max-loras={slots}", f"--max-lora-rank={rank}"]
        # The parity check catches an adapter that changes more. Without this list vLLM also wraps
        # the output head: on CPU that costs most of the speed, and a request for prompt logprobs
        # beside any other request then kills the engine (einsum in ``punica_cpu``).
        words += ["--lora-target-modules", *TARGET_MODULES]
    if serving.api_key is not None:
        words.append(f"--api-key={serving.api_key.get_secret_value()}")
    return [*words, *serving.vllm_args]


def check_memory(model_dir: Path, settings: Settings) -> None:
    """Refuse a start that would end in the out-of-memory killer. CPU only.

    Raises:
        ServerError: naming both figures.
    """
    stored = {"float32": 4, "bfloat16": 2, "float16": 2}[settings.model.dtype]
    weights = sum(path.stat().st_size for path in model_dir.glob("*.safetensors"))
    # The files may hold another precision than is served; a reload keeps one layer twice.
    needed = weights * max(1.0, stored / 2) * 1.2
    needed += settings.serving.kv_cache_gib * 2**30 + MEMORY_BESIDE_WEIGHTS_BYTES
    available = available_memory_bytes()
    if available is not None and available < needed:
        raise ServerError(
            f"too little memory: {available / 2**30:.1f} GiB are free, the server needs about "
            f"{needed / 2**30:.1f} GiB: lower serving.kv_cache_gib or free some"
        )


def bind(host: str, port: int) -> socket.socket:
    """A bound, not yet listening socket, so that a busy port is known before the engine starts.

    Raises:
        ServerError: the port is busy or not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ServerError(port_problem(host, port, error, "serving.port")) from None
    return bound


async def serve(settings: Settings) -> None:
    """Run the server until SIGTERM or SIGINT.

    Raises:
        ServerError, ArgumentInvalid, CertificateInvalid, ModelInvalid, PseudonymKeyInvalid,
        TemporaryFolderUnavailable: it could not start, or the engine broke.
    """
    from serving.vllm.arguments import check_arguments

    check_arguments(settings.serving.vllm_args)
    check_certificate(settings.serving.ssl_certfile, settings.serving.ssl_keyfile)
    model_dir = check_model_dir(settings.model.path).resolve()
    if runs_on_cpu():
        check_memory(model_dir, settings)
    pseudonyms = await server_pseudonyms(settings)
    bound = bind(settings.serving.host, settings.serving.port)
    port = bound.getsockname()[1]
    mode = swap_mode(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _abandon_start)
    publisher = Publisher(settings.stream, settings.spool_dir)
    try:
        publisher.start()
    except (SpoolLocked, OSError) as error:
        bound.close()
        raise ServerError(f"the spool cannot be used: {error}") from None
    arguments = vllm_arguments(settings, model_dir, port, mode)
    try:
        with nothing_outlives_this_process():
            async with _engine(arguments) as (engine, args):
                await _serve_engine(
                    settings, model_dir, mode, engine, args, bound, pseudonyms, publisher
                )
    finally:
        bound.close()
        await asyncio.to_thread(publisher.close, PUBLISHER_CLOSE_SECONDS)
    logger.info("the server has stopped", extra={"event": "server_stopped"})


def _abandon_start(*_: object) -> None:
    """A stop before the event loop can take it: the engine's start blocks for half a minute.

    Nothing is served yet and the spool is safe at any moment, so the half-started engine is killed
    and the process ends here. (An exception raised from a signal handler can be swallowed by
    whatever code it happens to land in.)
    """
    for child in multiprocessing.active_children():
        child.kill()
    logger.info("stopped while starting", extra={"event": "start_abandoned", "phase": "starting"})
    os._exit(0)


@contextlib.asynccontextmanager
async def _engine(words: list[str]) -> AsyncIterator[tuple[Any, Any]]:
    """vLLM's engine client and parsed arguments."""
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args

    from serving.vllm.arguments import parser

    args = parser().parse_args(words)
    validate_parsed_serve_args(args)
    logger.info("starting vLLM's engine", extra={"event": "engine_starting"})
    async with build_async_engine_client(args) as engine:
        yield engine, args


async def _serve_engine(
    settings: Settings,
    model_dir: Path,
    mode: str,
    engine: Any,
    args: Any,
    bound: socket.socket,
    pseudonyms: Pseudonyms | None,
    publisher: Publisher,
) -> None:
    from serving.event_publisher import EventPublisher
    from serving.vllm.app import assemble

    await engine.collective_rpc("moorline_install")
    parts = await assemble(
        settings,
        engine,
        args,
        mode=mode,
        model_dir=model_dir,
        base_model_digest=await asyncio.to_thread(model_digest, model_dir),
        pseudonyms=pseudonyms,
        events=EventPublisher(publisher),
    )
    _warn_of_defaults(engine.model_config.get_diff_sampling_param())
    await warm_up(parts.recorder.plain_generate)
    following = asyncio.create_task(parts.swaps.follow())
    while not parts.swaps.first_poll_done:
        if following.done():
            raise _engine_broke(following.exception())
        if parts.swaps.reader.waiting_seconds() > settings.serving.store_wait_seconds:
            logger.error(
                "the release store does not answer: serving the base model until it does",
                extra={"event": "serving_without_the_store", "version": parts.live.version},
            )
            break
        await asyncio.sleep(0.02)
    parts.readiness.why_not = None
    await _listen(parts, bound, engine, following, settings.serving)


def _warn_of_defaults(defaults: Mapping[str, Any]) -> None:
    """Say at the start what would else show as days of replies that teach nothing."""
    in_vain = defaults_in_vain(defaults)
    if in_vain:
        logger.warning(
            "requests that do not say otherwise are sampled with %s; such replies teach nothing: "
            'set serving.vllm_args = ["--generation-config", "vllm"] to leave these defaults out',
            ", ".join(f"{name} {value:g}" for name, value in in_vain.items()),
            extra={"event": "defaults_cannot_teach", "count": len(in_vain)},
        )


async def _listen(
    parts: Parts,
    bound: socket.socket,
    engine: Any,
    following: asyncio.Task[None],
    serving: ServingSettings,
) -> None:
    """Answer until a signal; then let the running replies end. A broken engine ends it at once."""
    import uvicorn

    from serving.stalled_clients import ending_stalled_clients

    server = uvicorn.Server(
        uvicorn.Config(
            parts.app,
            log_level="warning",
            access_log=False,
            http=ending_stalled_clients(serving.stream_stall_seconds),  # type: ignore[arg-type]
            timeout_keep_alive=serving.keep_alive_seconds,
            timeout_graceful_shutdown=int(serving.drain_seconds),
            ssl_certfile=serving.ssl_certfile,
            ssl_keyfile=serving.ssl_keyfile,
        )
    )
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    http = asyncio.create_task(server.serve(sockets=[bound]))
    while not (server.started or http.done()):
        await asyncio.sleep(0.01)
    url = base_url(*bound.getsockname()[:2], https=serving.speaks_https)
    logger.info(
        "the server is listening",
        extra={"event": "server_listening", "url": url, "version": parts.live.version},
    )
    print(f"moorline serving {parts.live.name} on {url}", flush=True)
    notifier = Notifier()
    notifier.ready(f"serving {parts.live.name} on {url}")
    notifying = asyncio.create_task(_notify(notifier, parts, url))
    watchers = [
        asyncio.create_task(stopping.wait()),
        following,
        asyncio.create_task(_until_broken(engine)),
    ]
    done, _ = await asyncio.wait([http, *watchers], return_when=asyncio.FIRST_COMPLETED)
    failure = next((error for task in done if (error := task.exception())), None)
    notifier.stopping()
    parts.readiness.why_not = "stopping"
    logger.info(
        "stopping: running replies may end",
        extra={"event": "server_stopping", "count": parts.admission.in_flight},
    )
    server.should_exit = True
    if failure is not None:
        server.config.timeout_graceful_shutdown = 1
    await asyncio.wait([http], timeout=serving.drain_seconds + 2)
    for task in (http, notifying, *watchers):
        task.cancel()
    if failure is not None:
        raise _engine_broke(failure)


def _engine_broke(error: BaseException | None) -> ServerError:
    return ServerError(f"the engine cannot go on ({error}): restarting is the remedy")


async def _notify(notifier: Notifier, parts: Parts, url: str) -> None:
    """Tell the service manager that event loop and engine work, and what is served."""
    while True:
        parts.engine_watch.report()
        if parts.engine_watch.why_hung() is None:
            notifier.ping()
        if parts.readiness.why_not is None:
            notifier.status(f"serving {parts.live.name} on {url}")
        await asyncio.sleep(_NOTIFY_SECONDS)


async def _until_broken(engine: Any) -> None:
    while not engine.errored:
        await asyncio.sleep(0.5)
    raise RuntimeError("vLLM's engine process died")


async def warm_up(generate: Callable[..., Any]) -> None:
    """The first requests after a start are slow; nobody should wait for them."""
    from vllm.inputs.engine import tokens_input
    from vllm.sampling_params import SamplingParams

    for temperature, top_p in ((0.0, 1.0), (1.0, 1.0), (1.0, 0.9)):
        params = SamplingParams(
            temperature=temperature, top_p=top_p, max_tokens=4, logprobs=0, ignore_eos=True
        )
        request_id = f"moorline-warm-up-{uuid.uuid4().hex}"
        async for _ in generate(tokens_input([1, 2, 3]), params, request_id):
            pass
