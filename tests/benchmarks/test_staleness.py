"""The staleness experiment: its task, its pairing, its store, and what it may claim."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.staleness import report, task
from benchmarks.staleness.__main__ import main
from benchmarks.staleness.methods import METHODS, Kind, Tokens
from benchmarks.staleness.study import Store, run_study
from benchmarks.staleness.summary import DEFAULT, RIVAL, UNCORRECTED, Summary, claims
from benchmarks.staleness.train import (
    ADAM_BETAS,
    STALE_FROM,
    Config,
    Trace,
    _Adam,
    _Group,
    _Queue,
    train_group,
)
from updater.learning.objectives import OBJECTIVES

TINY = Config(
    seeds=(0, 1),
    learning_rates=(1e-3, 4e-3),
    lags=(0, 2),
    methods=("dppo_kl", "ppo_clip"),
    updates=12,
    batch_replies=4,
    evaluate_every=5,
    measure_every=5,
)


# --- the task ---


@pytest.fixture(scope="module")
def base() -> task.Parameters:
    return task.pretrain_base((0, 1))


def test_the_base_policy_is_sure_of_structure_and_hardly_knows_the_pivot(
    base: task.Parameters,
) -> None:
    answers = torch.stack([task.make_task(seed).answers for seed in (0, 1)])
    prompts = torch.arange(task.PROMPTS).expand(2, -1)
    p = task.pick(task.teacher_forced(base, prompts, answers), answers).exp()
    pivot = p[..., task.PIVOT_POSITION]
    structure = torch.cat(
        (p[..., : task.PIVOT_POSITION], p[..., task.PIVOT_POSITION + 1 :]), dim=-1
    )
    assert structure.mean().item() == pytest.approx(task.STRUCTURAL_PROBABILITY, abs=0.02)
    assert pivot.mean().item() == pytest.approx(task.PIVOT_PROBABILITY, abs=0.005)


def test_recorded_logprobs_are_those_of_the_policy_that_sampled(base: task.Parameters) -> None:
    prompts = torch.arange(task.PROMPTS).expand(2, -1)
    draws = torch.rand(2, task.PROMPTS, task.LENGTH_TOKENS)
    tokens, log_q = task.sample(base, prompts, draws)
    again = task.pick(task.teacher_forced(base, prompts, tokens), tokens)
    torch.testing.assert_close(log_q, again, atol=1e-5, rtol=0.0)


def test_the_reward_that_is_reported_is_what_sampling_would_earn(base: task.Parameters) -> None:
    answers = torch.stack([task.make_task(seed).answers for seed in (0, 1)])
    repeats = 2000
    prompts = torch.arange(task.PROMPTS).repeat(repeats).expand(2, -1)
    draws = torch.rand(
        2,
        task.PROMPTS * repeats,
        task.LENGTH_TOKENS,
        generator=torch.Generator().manual_seed(0),
    )
    tokens, _ = task.sample(base, prompts, draws)
    earned = (tokens == answers.repeat(1, repeats, 1)).all(-1).float().mean(-1)
    # 32,000 draws of a 1.5 % chance: 0.002 is three standard errors.
    torch.testing.assert_close(task.expected_reward(base, answers), earned, atol=0.002, rtol=0.0)


# --- training ---


def test_a_batch_is_learned_from_exactly_the_lag_after_it_was_generated() -> None:
    lag, now = 3, 0
    queue = _Queue.empty(lag, runs=1, batch=1)

    def put(number: int) -> None:
        one = torch.full((1, 1, task.LENGTH_TOKENS), float(number))
        queue.put(torch.zeros(1, 1, dtype=torch.int64), one.long(), one, one[..., 0])

    for now in range(-lag, 0):
        put(now)
    for now in range(5):
        put(now)
        assert queue.oldest()[3].item() == now - lag


def test_all_methods_and_rates_of_a_seed_see_the_same_prompts_and_random_numbers() -> None:
    groups = [_Group(METHODS[name], 2, TINY) for name in ("dppo_kl", "gspo")]
    first, second = (group._queue for group in groups)
    for ours, theirs in ((first.prompts, second.prompts), (first.tokens, second.tokens)):
        assert torch.equal(ours, theirs)
    by_seed = first.tokens.view(3, 2, 2, *first.tokens.shape[2:])  # seeds, rates
    assert torch.equal(by_seed[:, :, 0], by_seed[:, :, 1])
    assert not torch.equal(by_seed[:, 0], by_seed[:, 1])


def test_stacked_adam_is_torchs_adam_with_each_runs_own_rate_and_clip() -> None:
    generator = torch.Generator().manual_seed(0)
    rates = (1e-3, 1e-2)
    start = torch.randn(2, 3, 4, generator=generator)
    gradients = [torch.randn(2, 3, 4, generator=generator) * scale for scale in (0.1, 5.0, 0.2)]
    ours: task.Parameters = {"w": start.clone()}
    stacked = _Adam(ours, torch.tensor(rates))
    for gradient in gradients:
        ours, _ = stacked.step(ours, {"w": gradient}, torch.ones(2))
    for run, rate in enumerate(rates):
        single = start[run].clone().requires_grad_()
        optimizer = torch.optim.Adam([single], lr=rate, betas=ADAM_BETAS)
        for gradient in gradients:
            single.grad = gradient[run].clone()
            torch.nn.utils.clip_grad_norm_([single], 1.0)
            optimizer.step()
        torch.testing.assert_close(ours["w"][run], single.detach(), atol=1e-5, rtol=1e-4)


def test_runs_do_not_touch_each_other() -> None:
    """A run is the same alone and stacked with others."""
    stacked = train_group("dppo_kl", 2, TINY)
    alone = train_group("dppo_kl", 2, replace(TINY, learning_rates=(4e-3,)))
    ours = [trace for trace in stacked if trace.learning_rate == 4e-3]
    for one, other in zip(ours, alone, strict=True):
        assert one.rewards == pytest.approx(other.rewards, abs=1e-4)


def test_on_fresh_data_every_behaviour_anchored_objective_learns_the_same() -> None:
    config = replace(TINY, seeds=(0,), learning_rates=(4e-3,))
    curves = [train_group(name, 0, config)[0].rewards for name in OBJECTIVES if name != UNCORRECTED]
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], abs=1e-4)


# --- ablations ---


def _tokens(log_q: Sequence[float], log_p: Sequence[float], advantage: float) -> Tokens:
    q, p = torch.tensor([[list(log_q)]]).log(), torch.tensor([[list(log_p)]]).log()
    return Tokens(
        p.requires_grad_(), q, q, torch.full((1, 1, 1), advantage), torch.ones_like(q).bool()
    )


def _gradient(method: str, tokens: Tokens) -> Tensor:
    loss = METHODS[method].loss(tokens).loss.sum()
    return torch.autograd.grad(loss, tokens.log_p)[0].flatten()


def test_the_clip_is_lifted_for_rare_or_for_common_tokens_only() -> None:
    tokens = _tokens((0.01, 0.5), (0.02, 0.9), advantage=1.0)  # both beyond the clip at 1.28
    assert _gradient("ppo_clip", tokens).tolist() == [0.0, 0.0]
    torch.testing.assert_close(_gradient("ppo_clip, rare free", tokens), torch.tensor([-2.0, 0.0]))
    torch.testing.assert_close(
        _gradient("ppo_clip, common free", tokens), torch.tensor([0.0, -1.8])
    )


def test_without_r_the_mask_of_the_default_stays_and_its_weight_is_one() -> None:
    tokens = _tokens((0.9, 0.01), (0.5, 0.005), advantage=-1.0)
    torch.testing.assert_close(_gradient("dppo_kl", tokens), torch.tensor([0.0, 0.5]))
    torch.testing.assert_close(_gradient("dppo_kl, no r", tokens), torch.tensor([0.0, 1.0]))


# --- the study ---


def test_an_interrupted_study_goes_on_and_gives_what_an_uninterrupted_one_does(
    tmp_path: Path,
) -> None:
    whole = run_study(TINY, Store(tmp_path / "whole", TINY), workers=2)
    first_part = replace(TINY, methods=("ppo_clip",), lags=(2,))  # finished before the interruption
    run_study(first_part, Store(tmp_path / "parts", first_part), workers=1)
    store = Store(tmp_path / "parts", TINY)
    assert [group for group in TINY.groups if store.load(group)] == [("ppo_clip", 2)]
    assert run_study(TINY, store, workers=1) == whole


def test_another_configuration_finds_nothing_in_the_store(tmp_path: Path) -> None:
    Store(tmp_path, TINY).save(("dppo_kl", 0), [])
    assert Store(tmp_path, TINY).load(("dppo_kl", 0)) == []
    assert Store(tmp_path, replace(TINY, updates=13)).load(("dppo_kl", 0)) is None


def test_clear_forgets(tmp_path: Path) -> None:
    store = Store(tmp_path, TINY)
    store.save(("dppo_kl", 0), [])
    store.clear()
    assert store.load(("dppo_kl", 0)) is None


def test_the_full_study_has_every_objective_at_every_lag_with_one_grid_and_five_seeds() -> None:
    config = Config()
    assert config.lags == (0, 8, 64, 256)
    assert len(config.seeds) >= 5
    assert {(name, lag) for name in OBJECTIVES for lag in config.lags} <= set(config.groups)
    others = {group for group in config.groups if METHODS[group[0]].kind is not Kind.OBJECTIVE}
    assert {lag for _, lag in others} == {lag for lag in config.lags if lag >= STALE_FROM}
    # One grid, because a group trains every seed with every rate of the one configuration.
    for method in TINY.methods:
        labels = [(trace.seed, trace.learning_rate) for trace in train_group(method, 0, TINY)]
        assert labels == [(s, rate) for s in TINY.seeds for rate in TINY.learning_rates]


# --- what is said about it ---

CONFIG = Config(
    seeds=(0, 1),
    learning_rates=(1e-3, 2e-3),
    lags=(0, 256),
    methods=(DEFAULT, RIVAL, UNCORRECTED),
    updates=100,
    evaluate_every=20,
)
DIAGNOSTICS = dict.fromkeys(report.DIAGNOSTICS, 0.0)


def _traces(curves: dict[tuple[str, int], Sequence[float]]) -> list[Trace]:
    """Each curve at the better rate, for every seed; nothing learned at the other."""
    return [
        Trace(method, lag, seed, rate, tuple(rewards) if rate == 2e-3 else (0.0,) * 6, DIAGNOSTICS)
        for (method, lag), rewards in curves.items()
        for seed in CONFIG.seeds
        for rate in CONFIG.learning_rates
    ]


GOOD = {
    (DEFAULT, 0): (0.0, 0.9, 1.0, 1.0, 1.0, 1.0),
    (RIVAL, 0): (0.0, 0.9, 1.0, 1.0, 1.0, 1.0),
    (UNCORRECTED, 0): (0.0, 0.9, 1.0, 1.0, 1.0, 1.0),
    (DEFAULT, 256): (0.0, 0.6, 0.9, 1.0, 1.0, 1.0),
    (RIVAL, 256): (0.0, 0.1, 0.2, 0.6, 0.8, 0.9),
    (UNCORRECTED, 256): (0.0, 0.2, 0.4, 0.1, 0.0, 0.0),
}


def test_a_run_in_four_numbers_and_the_rate_with_the_best_auc() -> None:
    summary = Summary.of(_traces(GOOD), CONFIG)
    rows = [row for row in summary.run_rows() if (row["method"], row["lag"]) == (RIVAL, 256)]
    assert rows[1] == {
        "method": RIVAL,
        "lag": 256,
        "seed": 0,
        "lr": 2e-3,
        "best_lr": True,
        "auc": pytest.approx(2.6 / 6, abs=1e-5),
        "peak": 0.9,
        "final": 0.9,
        "updates_to_half": 60,
    }
    assert [row["best_lr"] for row in rows] == [False, True, False, True]
    assert rows[0]["updates_to_half"] is None


def test_claims_hold_for_the_picture_that_was_meant() -> None:
    assert [claim.holds for claim in claims(Summary.of(_traces(GOOD), CONFIG))] == [True] * 7


@pytest.mark.parametrize(
    ("group", "rewards", "broken"),
    [
        ((DEFAULT, 0), (0.0, 0.0, 0.9, 1.0, 1.0, 1.0), "S = 0"),
        ((RIVAL, 256), (0.0, 0.5, 0.8, 0.9, 0.9, 0.9), "at least 1.25 x"),
        ((RIVAL, 256), (0.0, 0.55, 0.1, 0.1, 0.1, 0.9), "at most 0.7 x"),
        ((DEFAULT, 256), (0.0, 0.9, 1.0, 1.0, 1.0, 0.94), "0.95 x its peak"),
        ((UNCORRECTED, 256), (0.0, 0.2, 0.4, 0.1, 0.0, 0.3), "at most half the peak"),
        ((RIVAL, 256), (0.0, 0.8, 0.9, 1.0, 1.0, 1.0), "every rival"),
        ((DEFAULT, 256), (0.0, 0.9, 0.9, 0.9, 0.8, 0.8), "every rival"),
    ],
)
def test_each_claim_fails_when_its_runs_say_otherwise(
    group: tuple[str, int], rewards: tuple[float, ...], broken: str
) -> None:
    found = claims(Summary.of(_traces({**GOOD, group: rewards}), CONFIG))
    failed = [claim.text for claim in found if not claim.holds]
    assert any(broken in text for text in failed), failed


def test_a_shorter_look_at_the_same_runs_takes_only_their_start() -> None:
    summary = Summary.of(_traces(GOOD), CONFIG).until(40)
    assert summary.auc(DEFAULT, 256) == pytest.approx((0.0 + 0.6 + 0.9) / 3)


def test_the_report_has_every_run_and_says_who_lost(tmp_path: Path) -> None:
    curves = {**GOOD, (RIVAL, 256): (0.0, 0.9, 1.0, 1.0, 1.0, 1.0)}
    summary = Summary.of(_traces(curves), CONFIG)
    report.write(summary, {"cpus": 2, "torch": "2", "finished_at": "2000-01-01"}, tmp_path, "s")
    document = json.loads((tmp_path / "s.json").read_text())
    assert len(document["runs"]) == 3 * 2 * 2 * 2
    assert document["config"]["learning_rates"] == [1e-3, 2e-3]
    text = (tmp_path / "s.md").read_text()
    assert f"better AUC than `{DEFAULT}`: `{RIVAL}`" in text
    assert "**no**" in text
    assert (tmp_path / "s.png").stat().st_size > 10_000


# --- the command ---


def test_help_shows_examples_and_nonsense_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "examples:" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["--workers", "0"])
    assert ended.value.code == 2
    assert "--workers must be at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_the_quick_subset_shows_what_it_must(tmp_path: Path) -> None:
    """`make bench-staleness QUICK=1`: the default objective under stale data, on real runs."""
    assert main(["--quick", "--cache", str(tmp_path), "--output", str(tmp_path)]) == 0
