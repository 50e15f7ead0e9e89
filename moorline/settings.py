"""Every setting, in one typed tree.

Sources, first wins: the command line, environment variables (``MOORLINE_SERVING__PORT=8080``),
the TOML file named by ``--config`` or ``MOORLINE_CONFIG``, the defaults below. An unknown name or
a bad value is one clear line (``SettingsError``). ``moorline config`` prints the result and where
each value came from; secrets are never printed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from moorline.settings_sources import (
    CONFIG_VARIABLE,
    ENVIRONMENT_PREFIX,
    NESTING,
    NOT_SETTINGS,
    Arguments,
    Rewards,
    Secret,
    SettingsError,
    explain,
    nested,
    read_sources,
    to_environment,
)

__all__ = ["Settings", "SettingsError", "child_environment", "load_settings"]

# What ``load_settings`` found, strongest first; ``Settings(...)`` alone reads nothing.
_found: ContextVar[tuple[PydanticBaseSettingsSource, ...]] = ContextVar("found", default=())


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class ModelSettings(_Section):
    """The base model: the policy at version 0, and the anchor."""

    path: Path | None = None
    """Directory with config.json, tokenizer and *.safetensors. Pickled weights are refused."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the server computes in. The updater always computes in float32."""
    max_length_tokens: int = Field(default=2048, ge=16)
    """Longest prompt plus reply that is served."""


class ServingSettings(_Section):
    """The process that answers."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    """0: any free port, printed at start."""
    api_key: Secret = None
    """Clients must send it as a bearer token; also guards feedback."""
    ssl_certfile: Path | None = None
    """Certificate in PEM, its own first: the server speaks HTTPS alone. None: plain HTTP. Renewed
    files are read at the next start."""
    ssl_keyfile: Path | None = None
    """The certificate's key, without a passphrase; None: it is in `ssl_certfile`."""
    swap_mode: Literal["auto", "adapter", "reload"] = "auto"
    """adapter: flip a LoRA adapter, running replies finish on the old one. reload: merge and
    reload weights, running replies go on with the new ones. auto: adapter on GPU, reload on CPU."""
    max_loras: int = Field(default=3, ge=2)
    """Adapters resident at once (adapter mode): old, new, canary."""
    kv_cache_gib: float = Field(default=1.0, gt=0)
    """KV cache on CPU, GiB."""
    max_concurrent_sequences: int = Field(default=32, ge=1)
    swap_timeout_seconds: float = Field(default=120.0, gt=0)
    drain_seconds: float = Field(default=30.0, ge=1)
    """At a stop, running replies get this long to end."""
    stream_stall_seconds: float = Field(default=120.0, gt=0)
    """A client that takes nothing of its reply for so long, while more waits to be sent, is ended.
    One that reads slowly but steadily is not."""
    engine_stall_seconds: float = Field(default=120.0, gt=0)
    """The engine counts as hung when replies have waited so long and nothing came out of it for any
    of them: above the longest prompt's prefill. `/healthz` says so then, and the server is
    started again by systemd, `moorline up` or an orchestrator."""
    keep_alive_seconds: int = Field(default=75, ge=1)
    """An idle connection is kept so long: longer than a balancer in front keeps its own (mostly
    60 s), or a request meets a connection that is just being closed."""
    store_wait_seconds: float = Field(default=30.0, gt=0)
    """A start waits this long for a release store that does not answer; then it serves the base
    model until the store does."""
    parity_tolerance_nats: float = Field(default=0.1, gt=0)
    """After a swap, the server scores a fixed batch; its mean |logprob - trainer's| must be below
    this (and nearer to the new policy than to the old), or the release is not served."""
    record_user_field: bool = True
    """Record a keyed hash of the request's `user` field."""
    pseudonym_key_file: Path | None = None
    """Key of that hash, the same for all servers: 32 bytes, or a line of 32 to 64 characters. None:
    `pseudonym.key` in the state directory, made at the first start of the first server."""
    feedback_max_bytes: int = Field(default=65_536, ge=1024)
    vllm_args: Arguments = ()
    """Further arguments for vLLM, verbatim (tensor parallelism, quantisation, ...). One that cannot
    work here is refused at start by name."""

    @property
    def speaks_https(self) -> bool:
        """Whether clients must use HTTPS."""
        return self.ssl_certfile is not None


class StreamSettings(_Section):
    """Kafka."""

    bootstrap: str | None = None
    """host:port,... of the brokers; None lets `moorline up` start an embedded one (development)."""
    topic_prefix: str = Field(default="", pattern=r"^[A-Za-z0-9._-]*$")
    partitions: int = Field(default=4, ge=1)
    """For topics that Moorline creates; interactions and feedback must have the same count."""
    replication_factor: int | None = Field(default=None, ge=1)
    """Copies of the topics that Moorline creates; None: 3, or one a broker if there are fewer."""
    retention_seconds: float = Field(default=14 * 86400.0, gt=0)
    """How long the topics that Moorline creates keep events; at least the horizon."""
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = None
    sasl_username: str | None = None
    sasl_password: Secret = None
    ssl_cafile: Path | None = None
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    ssl_check_hostname: bool = True
    queue_max_events: int = Field(default=10_000, ge=1)
    """Events the server holds in memory when the broker is away; then they spill to disk."""
    spool_max_bytes: int = Field(default=256 * 2**20, ge=0)
    """Disk that the server may use for events when the broker is away; beyond it they are
    dropped and counted."""
    connect_timeout_seconds: float = Field(default=5.0, gt=0)
    accept_new_topics: bool = False
    """Read on from the start when a topic was deleted and made again; refused otherwise."""
    max_event_bytes: int = Field(default=900_000, ge=1024)
    """Larger events are refused at the door and dead-lettered from the topic."""


SIGNALS = {
    "copied": 0.5,
    "regenerated": -0.5,
    "abandoned": -0.3,
    "tool_failed": -0.7,
    "edited": -0.2,
}


class LearningSettings(_Section):
    """How an update is made. Symbols: ../docs/concepts.md, `updater/learning/objectives.py`."""

    batch_examples: int = Field(default=24, ge=1)
    """Rated replies per update."""
    max_wait_seconds: float = Field(default=3600.0, gt=0)
    """Make an update from fewer, at least `min_batch_examples`, after so long."""
    min_batch_examples: int = Field(default=8, ge=1)
    horizon_seconds: float = Field(default=7 * 86400.0, gt=0)
    """How long an interaction waits for feedback, and feedback for its interaction (event time)."""
    keep_decided_seconds: float | None = Field(default=None, gt=0)
    """How long the ledger keeps the (encrypted) text of replies that are decided, and of what was
    learned from with them; None: for the horizon. Less keeps less of people; then ratings that come
    later are `late`, and `moorline forget --revoke` can learn from less again."""
    signals: Rewards = SIGNALS
    """Implicit signals by name and what each is worth as a rating, -1 to 1. The table replaces the
    default one; a signal that is not in it is counted and not learned from."""
    objective: str = "dppo_kl"
    divergence_limit: float | None = Field(default=None, gt=0)
    """delta: per-token bound on the divergence from the behaviour policy; None: the objective's
    own default (dppo_kl: 0.05 nats of binary KL)."""
    divergence_estimator: Literal["binary", "topk", "exact"] = "binary"
    """What dppo_kl and dppo_tv measure at each token. binary: the sampled token against the rest,
    from its recorded logprob. topk, exact: the archived behaviour policy is run again, and the
    `divergence_top_k` likeliest tokens, or the full vocabulary, are compared."""
    divergence_top_k: int = Field(default=32, ge=1)
    mismatch_limit_nats: float = Field(default=0.2, gt=0)
    """A reply is set aside when its behaviour policy, run again, disagrees with the recorded
    logprobs by more than this on average (bfloat16 serving: about 0.04)."""
    max_off_policy_kl_nats: float = Field(default=0.5, gt=0)
    """A rating is set aside when the live policy is further than this from the one that wrote the
    reply: mean binary KL per token. Age alone never decides."""
    scale_lr_by_ess: bool = True
    """Multiply the learning rate of a stale batch by its effective-sample-size share."""
    distillation_weight: float = Field(default=1.0, ge=0)
    """Weight of log p(token | correction in the prompt) - log p(token) in the advantage of a
    corrected reply's tokens; 0: off."""
    distillation_clip_nats: float = Field(default=2.0, gt=0)
    """That difference is cut to +- this: ratings' advantages are of the same size."""
    correction_weight: float = Field(default=1.0, ge=0)
    """Weight of the corrected text: its tokens count like rated ones of this advantage; 0: off."""
    preference_weight: float = Field(default=1.0, ge=0)
    """Weight of a preference in the loss; 0: off."""
    preference_beta: float = Field(default=0.1, gt=0)
    """DPO's beta: the smaller, the further a pair may move the policy from those that wrote it."""
    max_tries: int = Field(default=4, ge=1)
    """So many candidates with a rating may be refused by the bound or the gate; each further try is
    made with half the ratings and half the step. After the last one the rating is rejected."""
    keep_releases: int = Field(default=10, ge=2)
    """The newest releases whose bytes stay in the store, to roll back to. Older ones stay only
    while a reply that they wrote can still be trained on."""
    learning_rate: float = Field(default=3e-4, gt=0)
    anchor_weight: float = Field(default=0.05, ge=0)
    """beta: weight of KL(policy || anchor) in the loss."""
    passes: int = Field(default=1, ge=1)
    """Optimiser passes over one batch."""
    minibatch_examples: int = Field(default=24, ge=1)
    micro_batch_tokens: int = Field(default=2048, ge=64)
    """Padded tokens per forward pass; bounds memory."""
    gradient_clip: float = Field(default=1.0, gt=0)
    lora_rank: int = Field(default=16, ge=1)
    lora_alpha: int = Field(default=32, ge=1)
    max_example_tokens: int = Field(default=1024, ge=8)
    threads: int | None = Field(default=None, ge=1)
    """CPU threads for training; None: all."""
    seed: int = 0


class BoundSettings(_Section):
    """How far a release may be from the live policy, and the lineage from the anchor."""

    live_kl_nats: float = Field(default=0.05, gt=0)
    """Mean full-vocabulary KL(live || candidate) per token."""
    anchor_kl_nats: float = Field(default=0.5, gt=0)
    """Mean full-vocabulary KL(anchor || candidate) per token: the lineage's whole budget."""
    min_step_scale: float = Field(default=0.05, gt=0, le=1)
    """A candidate that must be shrunk below this share of its step is rejected."""
    traffic_examples: int = Field(default=24, ge=1)
    """Held-out recent replies that the divergence is measured on."""
    search_steps: int = Field(default=5, ge=1)
    """Bisections in the search for the largest step inside the bound."""


class GateSettings(_Section):
    """What a candidate must show before it is released. Fails closed."""

    probes: Path | None = None
    """JSON lines: {"prompt": ..., "reply": ...} (chat) or {"text": ...} (held-out text for
    perplexity); None: the set that comes with Moorline."""
    live_kl_mean_nats: float = Field(default=0.05, gt=0)
    live_kl_max_prompt_nats: float = Field(default=0.5, gt=0)
    anchor_kl_mean_nats: float = Field(default=0.5, gt=0)
    anchor_kl_max_prompt_nats: float = Field(default=2.0, gt=0)
    perplexity_rise_share: float = Field(default=0.02, gt=0)
    """Held-out text: perplexity(candidate) / perplexity(live) - 1."""
    perplexity_rise_share_from_anchor: float = Field(default=0.10, gt=0)


class UpdaterSettings(_Section):
    """The process that learns."""

    port: int = Field(default=8001, ge=0, le=65535)
    """/metrics, /healthz, /readyz, /status."""
    host: str = "127.0.0.1"
    poll_seconds: float = Field(default=0.5, gt=0)
    stall_seconds: float = Field(default=600.0, gt=0)
    """An updater that gets nowhere for so long (no forward pass, no step of the intake) is stalled:
    /healthz says so, and it is started again. More than a micro-batch and a gate's hashing take."""
    suspect_after_crashes: int = Field(default=3, ge=1)
    """An update that the process has died in so often in a row (out of memory, a crash in native
    code, a hang) is made from half its replies, then from half of those, down to one. A reply that
    kills it so often alone, while another survives, is rejected (`update_crashed`)."""
    niceness: int = Field(default=5, ge=0, le=19)
    """CPU priority below the server's, so that replies go first where both share a machine."""


class Settings(BaseSettings, _Section):
    """Moorline's settings."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX,
        env_nested_delimiter=NESTING,
        enable_decoding=False,  # the type of a setting reads its text, whichever source it is from
    )

    alias: str = Field(default="assistant", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """The model's public name; clients ask for it, replies carry `alias@v000042`."""
    state_dir: Path = Path("moorline-state")
    """Ledger, artifact store, spool and locks live here."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["text", "json"] = "text"
    """One line an entry, either way."""
    model: ModelSettings = ModelSettings()
    serving: ServingSettings = ServingSettings()
    stream: StreamSettings = StreamSettings()
    learning: LearningSettings = LearningSettings()
    bound: BoundSettings = BoundSettings()
    gate: GateSettings = GateSettings()
    updater: UpdaterSettings = UpdaterSettings()

    @model_validator(mode="after")
    def _events_outlive_the_horizon(self) -> Self:
        if self.stream.retention_seconds < self.learning.horizon_seconds:
            raise ValueError(
                f"stream.retention_seconds is {self.stream.retention_seconds:.0f}, shorter than "
                f"learning.horizon_seconds ({self.learning.horizon_seconds:.0f}): raise it, or "
                "events are gone before they may still be joined"
            )
        return self

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *_: PydanticBaseSettingsSource,
        **_others: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The values in code (of the command line), then what was found; no ``.env``."""
        del settings_cls
        return init_settings, *_found.get()

    @property
    def store_dir(self) -> Path:
        return self.state_dir / "store"

    @property
    def ledger_path(self) -> Path:
        return self.state_dir / "ledger.sqlite"

    @property
    def pseudonym_key_path(self) -> Path:
        """The key that a server makes for itself, where none is declared."""
        return self.state_dir / "pseudonym.key"

    @property
    def spool_dir(self) -> Path:
        return self.state_dir / "spool"

    def digest(self) -> str:
        """sha256 of what shapes an update; goes into every release manifest."""
        shaping = self.model_dump_json(include={"alias", "model", "learning", "bound", "gate"})
        return hashlib.sha256(shaping.encode()).hexdigest()

    def origin_of(self, name: str) -> str:
        """Who set ``serving.port``: a variable's name, a file, the command line, or `default`."""
        return self._origins.get(name, "default")

    def as_environment(self) -> dict[str, str]:
        """These settings as environment variables, for a child process (secrets included)."""
        return to_environment(self)


def load_settings(
    config: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Settings:
    """The settings of this process.

    Args:
        config: TOML file; None: the one that ``MOORLINE_CONFIG`` names, if any.
        overrides: the command line's values by dotted name (``serving.port``); None: not given.
        environment: instead of this process's own.

    Raises:
        SettingsError: one line that names the setting, what is wrong and what is allowed.
    """
    environment = os.environ if environment is None else environment
    if config is None and environment.get(CONFIG_VARIABLE):
        config = Path(environment[CONFIG_VARIABLE])
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    sources, origins = read_sources(Settings, config, environment)
    origins |= dict.fromkeys(given, "command line")
    token = _found.set(sources)
    try:
        settings = Settings(**nested(Settings, given))
    except ValidationError as error:
        raise SettingsError(explain(error, Settings, origins)) from None
    finally:
        _found.reset(token)
    settings._origins.update(origins)
    return settings


def child_environment(settings: Settings, **extra: str) -> dict[str, str]:
    """This process's environment with exactly ``settings`` in it, for a child process.

    The child sees what its parent resolved: no settings file is read a second time.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(ENVIRONMENT_PREFIX)
        or (name in NOT_SETTINGS and name != CONFIG_VARIABLE)
    }
    return kept | settings.as_environment() | extra
