"""Every metric of the server and of the updater, in one table.

Both processes import their metrics from here and put them on one ``/metrics`` page, the server
beside vLLM's own. Units are in the names (``_seconds``, ``_bytes``, ``_nats``, ``_events``). A
label only ever takes values from a closed vocabulary (``Topic``, ``Fate``, ``Reason``, the words in
a metric's help text): never a prompt, a reply, a user, a tenant or an interaction id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST


@dataclass(frozen=True)
class MetricRow:
    """One row of the table that docs, alerts and dashboards are checked against."""

    name: str
    """As exposed: counters end in ``_total``; histograms also have _bucket, _sum, _count."""
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str


_rows: list[MetricRow] = []


def _counter(name: str, help_text: str, labels: Sequence[str] = ()) -> Counter:
    _rows.append(MetricRow(name, "counter", tuple(labels), help_text))
    return Counter(name, help_text, labels)


def _gauge(name: str, help_text: str, labels: Sequence[str] = ()) -> Gauge:
    _rows.append(MetricRow(name, "gauge", tuple(labels), help_text))
    return Gauge(name, help_text, labels)


def _histogram(
    name: str, help_text: str, buckets: Sequence[float], labels: Sequence[str] = ()
) -> Histogram:
    _rows.append(MetricRow(name, "histogram", tuple(labels), help_text))
    return Histogram(name, help_text, labels, buckets=buckets)


# --- serving: replies, feedback, and the way out to Kafka -------------------------------------

INTERACTIONS = _counter(
    "moorline_interactions_total",
    "Replies seen by the recorder; outcome: recorded, aborted, dropped or failed; no interactions: "
    "opted_out, unreadable, scoring, beam_search or other_adapter",
    ["outcome"],
)
STALLED_CLIENTS = _counter(
    "moorline_stalled_clients_total",
    "Connections closed because the client took nothing of its reply for stream_stall_seconds",
)
ENGINE_WAIT_SECONDS = _gauge(
    "moorline_engine_wait_seconds",
    "Time that replies have waited since anything came out of the engine",
)
FEEDBACK_RECEIVED = _counter(
    "moorline_feedback_received_total",
    "POST /v1/feedback; outcome: accepted, invalid, too_large, not_recorded, unauthorized or "
    "unavailable",
    ["outcome"],
)
EVENTS_PUBLISHED = _counter(
    "moorline_events_published_total", "Events that a broker acknowledged", ["topic"]
)
EVENTS_DROPPED = _counter(
    "moorline_events_dropped_total",
    "Events lost because the queue and the disk spool were full",
    ["topic"],
)
PUBLISHER_QUEUED = _gauge("moorline_publisher_queued_events", "Events in the publisher's memory")
SPOOLED_EVENTS = _gauge("moorline_spooled_events", "Events on disk, waiting for a broker")
SPOOL_BYTES = _gauge("moorline_spool_bytes", "Disk that those events use, bytes")
BROKER_CONNECTED = _gauge(
    "moorline_broker_connected", "1 while the last contact with a broker succeeded, else 0"
)

# --- serving: which policy answers ------------------------------------------------------------

POLICY_VERSION = _gauge(
    "moorline_policy_version",
    "serving: the version that answers; updater: the newest release",
    ["role"],
)
STORE_NEWEST_VERSION = _gauge(
    "moorline_store_newest_version",
    "Newest release in the store, served or not, as this server last saw it; 0: none",
)
STORE_WAIT_SECONDS = _gauge(
    "moorline_store_wait_seconds",
    "For how long this server's read of the store has been waiting for an answer, seconds; 0: none",
)
PINNED = _gauge("moorline_pinned", "1 while an operator has pinned a version, else 0")
SWAPS = _counter(
    "moorline_swaps_total",
    "Changes of policy; mode: adapter or reload; outcome: swapped, parity_failed, corrupt, "
    "refused or failed",
    ["mode", "outcome"],
)
SWAP_SECONDS = _histogram(
    "moorline_swap_seconds",
    "From the start of a swap to the new policy serving, seconds; mode: adapter or reload",
    [0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120],
    ["mode"],
)
SWAP_PAUSE_SECONDS = _histogram(
    "moorline_swap_pause_seconds",
    "How long a swap held generation still, seconds (adapter flips: 0)",
    [0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30],
)
PARITY_NATS = _gauge(
    "moorline_parity_nats",
    "After the last swap: mean |served - trainer's| logprob on the release's fixed batch, nats",
)

# --- updater: the stream and the ledger -------------------------------------------------------

EVENTS = _counter(
    "moorline_events_total",
    "Events by where they ended (Fate) and why (Reason), counted at each change of fate",
    ["topic", "fate", "reason"],
)
LAG_EVENTS = _gauge("moorline_lag_events", "Events in the topic not yet read", ["topic"])
LAG_SECONDS = _gauge(
    "moorline_lag_seconds", "Age of the oldest event that is not yet read, seconds", ["topic"]
)
PSEUDONYM_KEYS = _gauge(
    "moorline_pseudonym_keys",
    "Keys that the pseudonyms of the last day were made with; above 1: servers differ",
)
GAPS = _counter(
    "moorline_gaps_total",
    "Offsets that could not be read; cause: retention or topic_recreated",
    ["topic", "cause"],
)
READY_EXAMPLES = _gauge("moorline_ready_examples", "Rated replies that wait for an update")
RECENT_FEEDBACK = _gauge(
    "moorline_recent_feedback_events",
    "Feedback of the last hour without the last 5 minutes, the newest 1,000; interaction: found or "
    "missing (no reply that was recorded has the id that it names)",
    ["interaction"],
)

UPDATER_PHASE = _gauge(
    "moorline_updater_phase", "1 for what the updater is doing (Phase), 0 for the others", ["phase"]
)
PROGRESS_AGE_SECONDS = _gauge(
    "moorline_progress_age_seconds",
    "Since the updater last got anywhere (a forward pass, a step of the intake, a phase), seconds",
)
DISK_REFUSALS = _counter(
    "moorline_disk_refusals_total",
    "Writes that a disk refused (full, read-only, failing); where: ledger, store or spool",
    ["where"],
)
for _where in ("ledger", "store", "spool"):
    DISK_REFUSALS.labels(where=_where)  # 0 from the start, so that the first one is an increase

# --- updater: updates and their bound ---------------------------------------------------------

UPDATES = _counter(
    "moorline_updates_total",
    "Updates tried; outcome: released, the Reason that it was not, anchor_exhausted, or trial: of "
    "replies that the process has died with",
    ["outcome"],
)
UPDATE_CRASHES = _gauge(
    "moorline_update_crashes",
    "How often in a row the updater died in an update with one reply that waits, the most; 0: none",
)
UPDATE_SECONDS = _histogram(
    "moorline_update_seconds",
    "From a full batch to a released or refused candidate, seconds",
    [1, 2, 5, 10, 20, 40, 60, 120, 300, 600, 1800, 3600],
)
KL_NATS = _gauge(
    "moorline_kl_nats",
    "Last candidate: mean full-vocabulary KL(measured_from || candidate), nats per token; "
    "measured_from: live or anchor; tokens_from: traffic or probes",
    ["measured_from", "tokens_from"],
)
ANCHOR_BUDGET_LEFT_NATS = _gauge(
    "moorline_anchor_budget_left_nats",
    "bound.anchor_kl_nats minus the live policy's measured KL from the anchor, nats per token",
)
STEP_SCALE = _gauge(
    "moorline_step_scale", "Share of the last update that fitted inside the bound, 0 to 1"
)
GATE_CHECKS = _counter(
    "moorline_gate_checks_total",
    "Lines of the gate's evidence; check: its name; outcome: passed or failed",
    ["check", "outcome"],
)
RELEASES_PUBLISHED = _counter(
    "moorline_releases_published_total", "Releases that the releases topic acknowledged"
)
UPDATE_DIAGNOSTIC = _gauge(
    "moorline_update_diagnostic",
    "Last update, before the bound; name: ess_share, mean_ratio, max_ratio, k1_nats, k3_nats, "
    "chi2, tv, masked_share (_rare, _common, _positive, _negative), entropy_nats, gradient_norm, "
    "step_norm_share, ess_lr_scale, mismatch_nats, staleness_versions_mean, "
    "staleness_seconds_mean, "
    "behaviour_exact_share, set_aside_off_policy, corrections, preferences, credit_..., ...",
    ["name"],
)
UPDATE_ALARM = _gauge(
    "moorline_update_alarm",
    "1 while the last update's diagnostic is outside its levels (updater/learning/diagnostics.py), "
    "else 0; name: mean_ratio, ess_share, k1_nats, chi2 or mismatch_nats",
    ["name"],
)
ARTIFACTS_REMOVED = _counter(
    "moorline_artifacts_removed_total",
    "Artifacts that left the store: nobody can roll back to them or learn from their replies",
)

TABLE: tuple[MetricRow, ...] = tuple(_rows)


def render(registry: CollectorRegistry = REGISTRY) -> bytes:
    """The ``/metrics`` page of this process, in Prometheus' text format (``CONTENT_TYPE``)."""
    return generate_latest(registry)
