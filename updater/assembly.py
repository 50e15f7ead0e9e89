"""Puts an updater's loop together from its settings and its inputs and outputs."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable
from dataclasses import dataclass

from moorline.base_model import check_model_dir, model_digest
from moorline.events import Release
from moorline.settings import Settings
from moorline.store import ArtifactStore
from updater.adoption import adopt_lineage
from updater.ingest import DeadLetterSink, Ingest, Source
from updater.learning.behaviour import Archive
from updater.learning.chat_template import ChatTemplate
from updater.learning.policy import Policy
from updater.learning.trainer import Trainer
from updater.ledger import Ledger
from updater.loop import Loop
from updater.progress import Progress
from updater.safety import Gate, load_probes
from updater.safety.trust_region import TrustRegion


@dataclass(frozen=True)
class Assembled:
    """The loop of one updater, and those of its parts that others ask something of."""

    loop: Loop
    policy: Policy
    trainer: Trainer
    trust_region: TrustRegion


def open_ledger(settings: Settings) -> Ledger:
    """The ledger of these settings, opened for writing.

    Raises:
        LedgerError, LedgerUnavailable: as ``Ledger`` says.
    """
    learning = settings.learning
    return Ledger(
        settings.ledger_path,
        horizon_seconds=learning.horizon_seconds,
        keep_decided_seconds=learning.keep_decided_seconds or math.inf,
        suspect_after_crashes=settings.updater.suspect_after_crashes,
    )


def assemble(
    settings: Settings,
    *,
    ledger: Ledger,
    store: ArtifactStore,
    reader: Source,
    dead_letters: DeadLetterSink,
    publish: Callable[[Release], None],
    progress: Progress | None = None,
) -> Assembled:
    """Adopt the store's line, load the model and put the loop together; it still has to ``resume``.

    Args:
        reader: has been sought to the ledger's offsets.
        publish: writes a release to its topic and returns when it is acknowledged.
        progress: is told what the loop does; None: nobody reads it.

    Raises:
        ModelInvalid, ProbesInvalid, ObjectiveInvalid, ReleaseInvalid: with one line that says what
            to do.
    """
    learning = settings.learning
    model_dir = check_model_dir(settings.model.path)
    base_model_digest = model_digest(model_dir)
    adopt_lineage(ledger, store, settings.alias, base_model_digest)
    policy = Policy(
        model_dir, rank=learning.lora_rank, alpha=learning.lora_alpha, seed=learning.seed
    )
    probes = load_probes(settings.gate.probes, model_dir)
    trainer = Trainer(
        policy, learning, Archive(policy, store, ledger.release), ChatTemplate(model_dir)
    )
    trust_region = TrustRegion(
        policy, probes.sequences, settings.bound, learning.micro_batch_tokens
    )
    loop = Loop(
        settings,
        progress=progress or Progress(),
        ingest=Ingest(
            reader,
            dead_letters,
            ledger,
            alias=settings.alias,
            vocab_size=policy.vocabulary_size,
            max_tokens=learning.max_example_tokens,
            signals=learning.signals,
            max_event_bytes=settings.stream.max_event_bytes,
        ),
        ledger=ledger,
        store=store,
        policy=policy,
        trainer=trainer,
        trust_region=trust_region,
        gate=Gate(policy, probes, trust_region, store, settings.gate),
        publish=publish,
        base_model_digest=base_model_digest,
        software=_software(),
    )
    return Assembled(loop, policy, trainer, trust_region)


def _software() -> dict[str, str]:
    names = ("moorline", "torch", "transformers", "peft")
    return {name: importlib.metadata.version(name) for name in names}
