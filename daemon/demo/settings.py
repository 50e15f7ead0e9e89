"""What the demo sets differently from the defaults, and why."""

from __future__ import annotations

from pathlib import Path

DEMO_SETTINGS: dict[str, str] = {
    # A learner in minutes, not days: small batches, each one a release.
    "learning.batch_examples": "24",
    "learning.min_batch_examples": "24",
    "learning.learning_rate": "5e-4",
    "learning.anchor_weight": "0.05",
    "learning.max_example_tokens": "256",
    "learning.micro_batch_tokens": "1024",
    "bound.traffic_examples": "8",
    # The rule asks for another style of answer, so a release may move further than a careful
    # operator's default allows; the lineage's budget stays below the 0.45 the demo promises.
    "bound.live_kl_nats": "0.10",
    "bound.anchor_kl_nats": "0.42",
    "gate.live_kl_mean_nats": "0.10",
    "gate.live_kl_max_prompt_nats": "0.8",
    "gate.anchor_kl_mean_nats": "0.45",
    "gate.anchor_kl_max_prompt_nats": "2.0",
    "gate.perplexity_rise_share": "0.03",
    "serving.max_concurrent_sequences": "32",
    "serving.kv_cache_gib": "0.5",
    "model.max_length_tokens": "512",
    "updater.poll_seconds": "0.2",
}


def up_arguments(model: Path, state_dir: Path, overrides: dict[str, str]) -> list[str]:
    """The arguments of the ``moorline up`` that the demo runs; ports are any free ones."""
    settings = {**DEMO_SETTINGS, "serving.port": "0", "updater.port": "0", **overrides}
    arguments = ["up", "--model", str(model), "--state-dir", str(state_dir)]
    for name, value in settings.items():
        arguments += ["--set", f"{name}={value}"]
    return arguments
