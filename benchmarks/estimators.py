"""How should a token's divergence from its behaviour policy be measured: binary, top-k or exact?

A real model makes a few real updates and is archived; the archived policy writes replies; the model
makes a few more updates. Then the divergence between the two is measured at every token of those
replies with every estimator, and compared with the exact one. Cost: the CPU time of one update.

    python -m benchmarks.estimators
    python -m benchmarks.estimators --model DIR --later 8 --output benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer

from daemon.demo.model import prepare_model
from daemon.demo.people import MAX_REPLY_TOKENS, training_questions
from moorline.events import Interaction, LogprobConvention, PolicySpan, SamplingSettings
from moorline.settings import LearningSettings
from updater.learning import divergence
from updater.learning.behaviour import (
    Archive,
    Behaviour,
    BehaviourPolicies,
    BehaviourUnavailable,
    Fallback,
    token_divergence,
)
from updater.learning.objectives import OBJECTIVES
from updater.learning.policy import AdapterState, Policy
from updater.learning.sampling import processed_distribution, processed_logprobs
from updater.learning.trainer import Trainer
from updater.values import Batch, CreditedExample, Example, as_sequence

SAMPLING = (SamplingSettings(), SamplingSettings(temperature=0.7, top_p=0.9))
TOP_K = (1, 8, 32, 128)
SETTINGS = LearningSettings(learning_rate=5e-4, micro_batch_tokens=1024)
ARCHIVED_VERSION = 1
BATCH = 12
COST_BATCH = 8


class OneArchived(Archive):
    """An archive that holds one adapter, in memory: disk is not what is measured here."""

    def __init__(self) -> None:
        self.state: AdapterState | None = None

    def adapter(self, version: int) -> AdapterState:
        if self.state is None or version != ARCHIVED_VERSION:
            raise BehaviourUnavailable(version, Fallback.GONE)
        return self.state


class Writer:
    """Writes replies with the policy as it stands."""

    def __init__(self, policy: Policy, model: Path) -> None:
        self._policy = policy
        self._tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        self._tokenizer.padding_side = "left"
        self._questions = iter(training_questions(0))
        self._written = 0

    @torch.no_grad()
    def write(self, number: int, sampling: SamplingSettings, version: int) -> list[Interaction]:
        """Replies to questions that were not asked before, as a server would have recorded them."""
        asked = [next(self._questions).text for _ in range(number)]
        prompts = self._tokenizer.apply_chat_template(
            [[{"role": "user", "content": text}] for text in asked],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
            padding=True,
        )
        written = self._policy._model.generate(
            **prompts,
            do_sample=True,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=0,
            max_new_tokens=MAX_REPLY_TOKENS,
            pad_token_id=self._tokenizer.eos_token_id,
        )[:, prompts["input_ids"].shape[1] :]
        rows = zip(prompts["input_ids"], prompts["attention_mask"], written, strict=True)
        return [
            self._recorded(prompt[seen.bool()].tolist(), reply.tolist(), sampling, version)
            for prompt, seen, reply in rows
        ]

    def _recorded(
        self, prompt: list[int], reply: list[int], sampling: SamplingSettings, version: int
    ) -> Interaction:
        self._written += 1
        end = self._tokenizer.eos_token_id
        if end in reply:
            reply = reply[: reply.index(end) + 1]
        blank = Interaction(
            interaction_id=f"chatcmpl-{self._written}",
            alias="assistant",
            created_at=time.time(),
            latency_seconds=0.0,
            prompt_token_ids=tuple(prompt),
            completion_token_ids=tuple(reply),
            completion_logprobs=(),
            logprob_convention=LogprobConvention.PROCESSED,
            sampling=sampling,
            policy_spans=(PolicySpan(version=version, start=0, end=len(reply)),),
            finish_reason="stop",
        )
        logits, sampled = self._policy.completion_logits([as_sequence(blank)])
        logprobs = processed_logprobs(logits, sampled, sampling).tolist()
        return blank.model_copy(update={"completion_logprobs": tuple(logprobs)})


def rated(replies: Sequence[Interaction]) -> tuple[CreditedExample, ...]:
    """Shorter is better: the advantage is the standardised negative length."""
    lengths = torch.tensor([float(len(reply.completion_token_ids)) for reply in replies])
    advantages = -(lengths - lengths.mean()) / lengths.std().clamp_min(1.0)
    return tuple(
        CreditedExample(Example(reply.interaction_id, reply, ()), None, advantage)
        for reply, advantage in zip(replies, advantages.tolist(), strict=True)
    )


def learn(trainer: Trainer, writer: Writer, version: int) -> None:
    """One real update on replies of the policy itself."""
    replies = writer.write(BATCH, SAMPLING[0], version)
    proposal = trainer.propose(Batch(rated(replies), version))
    trainer.accept(proposal.adapter, proposal.optimizer)


@torch.no_grad()
def token_estimates(
    policy: Policy, behaviours: BehaviourPolicies, replies: Sequence[Interaction], live: int
) -> dict[str, dict[str, Tensor]]:
    """By kind (kl, tv) and estimator: the divergence at every token of these replies."""
    found: dict[str, dict[str, list[Tensor]]] = {"kl": {}, "tv": {}}
    for reply in replies:
        (rerun,) = behaviours.rerun([reply], live, policy.state())
        logits, sampled = policy.completion_logits([as_sequence(reply)])
        by_k = {k: Behaviour.from_rerun(rerun, reply, k) for k in TOP_K}
        possible = by_k[1].possible(logits, reply.sampling)
        log_p = processed_distribution(logits, sampled, reply.sampling, possible)
        sampled_p = log_p.gather(-1, sampled[:, None])[:, 0]
        log_q = torch.tensor(reply.completion_logprobs)
        for kind, binary in (("kl", divergence.binary_kl), ("tv", divergence.binary_tv)):
            estimates = {
                "binary": binary(log_q, sampled_p),
                **{f"top-{k}": token_divergence(kind, log_p, by_k[k]) for k in TOP_K},
                "exact": token_divergence(kind, log_p, by_k[1], rerun),
            }
            for name, values in estimates.items():
                found[kind].setdefault(name, []).append(values)
    return {
        kind: {name: torch.cat(parts) for name, parts in estimates.items()}
        for kind, estimates in found.items()
    }


def compare(estimates: dict[str, Tensor], limit: float) -> list[dict[str, Any]]:
    """Each estimator against the exact one: as a number, and as a decision at the limit."""
    exact = estimates["exact"].double()
    rows = []
    for name, values in estimates.items():
        error = values.double() - exact
        dropped, should = values > limit, exact > limit
        rows.append(
            {
                "estimator": name,
                "mean": float(values.mean()),
                "bias": float(error.mean()),
                "bias_share": float(error.mean() / exact.mean()),
                "error_sd": float(error.std()),
                "over_limit_share": float(dropped.double().mean()),
                "decision_agreement": float((dropped == should).double().mean()),
                "missed_share": float((should & ~dropped).sum() / should.sum().clamp_min(1)),
            }
        )
    return rows


def cost(
    policy: Policy, archive: Archive, replies: Sequence[Interaction], live: int
) -> dict[str, float]:
    """CPU seconds of one update (look and proposal) on a stale batch, by estimator."""
    examples = rated(replies)
    state, seconds = policy.state(), {}
    for estimator in ("binary", "topk", "exact"):
        settings = SETTINGS.model_copy(
            update={"divergence_estimator": estimator, "max_off_policy_kl_nats": 1e9}
        )
        policy.load_state(state)
        trainer = Trainer(policy, settings, archive)
        start = time.process_time()
        trainer.propose(Batch(examples, live))
        seconds[estimator] = time.process_time() - start
    policy.load_state(state)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path(".models/SmolLM2-135M-Instruct"))
    parser.add_argument("--replies", type=int, default=12, help="per sampling setting")
    parser.add_argument("--before", type=int, default=2, help="updates before the archived policy")
    parser.add_argument("--later", type=int, default=4, help="updates after it")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    console = Console()
    torch.manual_seed(0)
    model = prepare_model(options.model)
    policy = Policy(model, rank=SETTINGS.lora_rank, alpha=SETTINGS.lora_alpha, seed=0)
    archive = OneArchived()
    trainer, writer = Trainer(policy, SETTINGS), Writer(policy, model)
    for number in range(options.before):
        console.print(f"update {number + 1} before the archived policy")
        learn(trainer, writer, 0)
    archive.state = policy.state()
    written = [writer.write(options.replies, s, ARCHIVED_VERSION) for s in SAMPLING]
    for number in range(options.later):
        console.print(f"update {number + 1} after it")
        learn(trainer, writer, 0)
    live = ARCHIVED_VERSION + options.later
    console.print("measuring")
    behaviours = BehaviourPolicies(policy, archive)
    results: dict[str, Any] = {
        "model": model.name,
        "config": {"before": options.before, "later": options.later, "batch": BATCH},
        "tables": [],
    }
    for sampling, replies in zip(SAMPLING, written, strict=True):
        by_kind = token_estimates(policy, behaviours, replies, live)
        for kind, estimates in by_kind.items():
            limit = OBJECTIVES[f"dppo_{kind}"].limits["divergence_limit"]
            results["tables"].append(
                {
                    "divergence": kind,
                    "limit": limit,
                    "temperature": sampling.temperature,
                    "top_p": sampling.top_p,
                    "tokens": estimates["exact"].numel(),
                    "rows": compare(estimates, limit),
                }
            )
    console.print("cost")
    results["cpu_seconds_of_an_update"] = cost(policy, archive, written[0][:COST_BATCH], live)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "estimators.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    path.with_suffix(".md").write_text(as_markdown(results))
    print(path.with_suffix(".md").read_text())
    console.print(f"written to {path}")
    return 0


def as_markdown(results: dict[str, Any]) -> str:
    """The tables, for people."""
    config = results["config"]
    lines = [
        "# Estimators of a token's divergence from its behaviour policy",
        "",
        f"{results['model']}; replies of a policy archived after {config['before']} updates,",
        f"compared with the policy {config['later']} updates later (`make bench-estimators`).",
        "",
        "bias: mean of estimate - exact. error sd: its standard deviation over tokens. over limit:",
        "share of tokens whose estimate is above the objective's limit (masked if the advantage",
        "pushes on). agreement: share of tokens where that decision is the exact one's. missed: of",
        "the tokens that exact puts over the limit, the share that the estimate does not.",
    ]
    for table in results["tables"]:
        unit = "KL, nats" if table["divergence"] == "kl" else "total variation"
        lines += [
            "",
            f"## {unit}; temperature {table['temperature']}, top_p {table['top_p']}; limit "
            f"{table['limit']}; {table['tokens']} tokens",
            "",
            "| estimator | mean | bias | bias share | error sd | over limit | agreement | missed |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['estimator']} | {row['mean']:.4f} | {row['bias']:+.4f} | "
            f"{row['bias_share']:+.0%} | {row['error_sd']:.4f} | {row['over_limit_share']:.1%} | "
            f"{row['decision_agreement']:.1%} | {row['missed_share']:.0%} |"
            for row in table["rows"]
        ]
    seconds = results["cpu_seconds_of_an_update"]
    lines += [
        "",
        "## Cost of an update on a stale batch",
        "",
        "| estimator | CPU seconds | against binary |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {spent:.1f} | {spent / seconds['binary']:.2f}x |"
        for name, spent in seconds.items()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
