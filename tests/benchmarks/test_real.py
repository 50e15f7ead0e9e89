"""The real-model benchmark: its rules, its lag, what it concludes and what it keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.real.rules import RULES, batch_at, held_out_questions, training_questions
from benchmarks.real.study import Base, Store, Study
from benchmarks.real.summary import (
    Estimate,
    Summary,
    auc,
    cells,
    final,
)
from benchmarks.real.train import (
    DIAGNOSTICS,
    Cell,
    Config,
    Evaluation,
    Queue,
    Reply,
    SideEffect,
    Trace,
    as_example,
    follow_share,
)
from moorline.events import Reason
from updater.ingest import why_untrainable
from updater.learning.advantages import assign_credit
from updater.learning.baselines import Baselines

CONFIG = Config()
SLOW, FAST = CONFIG.rates


def a_trace(cell: Cell, end: float, kl_nats: float = 0.1, perplexity: float = 21.0) -> Trace:
    updates = CONFIG.updates(cell.lag)
    return Trace(
        cell,
        (Evaluation(0, 0.1, 120), Evaluation(8, end / 2, 40), Evaluation(updates, end, 120)),
        (SideEffect(0, 0.0, 20.0), SideEffect(updates, kl_nats, perplexity)),
        dict.fromkeys(DIAGNOSTICS, 0.5),
        ("a | b\n\nc",),
        1.0,
    )


def traces(ends: dict[str, float]) -> list[Trace]:
    """Runs that end there at the faster rate, and worse at the slower."""
    return [
        a_trace(cell, ends.get(cell.method, 0.5) * (1.0 if cell.rate == FAST else 0.5))
        for cell in cells(CONFIG)
    ]


@pytest.mark.parametrize(
    ("rule", "text", "ended", "follows"),
    [
        ("brevity", "Sharks are fish.", True, True),
        ("brevity", "Sharks are fish.", False, False),
        ("brevity", " ".join(["word"] * 12), True, True),
        ("brevity", " ".join(["word"] * 13), True, False),
        ("brevity", "", True, False),
        ("question", "Do you like sharks? \n", True, True),
        ("question", "Do you like sharks?", False, False),
        ("question", "Do you? I do.", True, False),
        ("greeting", " Hi! Sharks are fish", False, True),
        ("greeting", "hello there", True, True),
        ("greeting", "His shark", True, False),
        ("greeting", "Oh, hi!", True, False),
    ],
)
def test_a_rule_praises_what_it_says(rule: str, text: str, ended: bool, follows: bool) -> None:
    assert RULES[rule].follows(text, ended) is follows


def test_no_held_out_topic_is_ever_trained_on() -> None:
    topics = {question.split()[-1].rstrip(".") for question in training_questions(0)}
    held_out = {question.split()[-1].rstrip(".") for question in held_out_questions(40)}
    assert len(held_out) == 40
    assert not topics & held_out


@given(st.integers(1, 50), st.integers(1, 12))
def test_batches_go_through_all_questions_before_any_comes_again(count: int, size: int) -> None:
    items = list(range(count))
    drawn = [item for number in range(count) for item in batch_at(items, number, size)]
    assert drawn == [place % count for place in range(count * size)]


def test_a_reply_becomes_an_interaction_that_the_product_would_train_on() -> None:
    reply = Reply((1, 2), (3, 4), (-0.5, -0.1), "Hi there", True)
    example = as_example(RULES["greeting"], reply, "one", version=7)
    assert why_untrainable(example.interaction, 10, "benchmark", 100) in (None, Reason.NONE)
    assert example.interaction.policy_version == 7
    other = as_example(RULES["question"], reply, "two", version=7)
    credited, _, _ = assign_credit([example, other], Baselines(), signals={})
    assert credited[0].reward == 1.0
    assert credited[1].reward == -1.0


@pytest.mark.parametrize("lag", [0, 3, 8])
def test_an_update_learns_from_replies_that_are_as_many_updates_old_as_the_lag(lag: int) -> None:
    base = [[Reply((1,), (2,), (-1.0,), f"base {number}", True)] for number in range(lag)]
    waiting = Queue(base)
    learned = []
    for update in range(lag + 5):
        waiting.put([Reply((1,), (2,), (-1.0,), f"own {update}", True)], version=update)
        learned.append(waiting.oldest())
    assert [stored.replies for stored in learned[:lag]] == base
    assert {stored.version for stored in learned[:lag]} <= {0}
    assert [stored.version for stored in learned[lag:]] == list(range(5))
    assert learned[-1].replies[0].text == "own 4"


def test_share_of_replies_that_follow() -> None:
    replies = [Reply((), (), (), text, True) for text in ("Hi", "Hey", "No", "Why?")]
    assert follow_share(RULES["greeting"], replies) == 0.5


def test_one_run_stands_for_all_methods_at_lag_0_and_nowhere_else() -> None:
    found = cells(CONFIG)
    assert len(found) == len(set(found)) == 2 * 3 * (1 + 3 + 4)
    assert [cell.lag for cell in found[:18]] == [32] * 18
    assert [(cell.lag, cell.method) for cell in found[-6:]] == [(32, "moorline")] * 6
    assert {cell.method for cell in found if cell.lag == 0} == {CONFIG.methods[0]}


def test_each_method_is_shown_at_its_own_best_rate() -> None:
    found = [
        a_trace(cell, 0.8 if (cell.method == "dppo_kl") == (cell.rate == SLOW) else 0.4)
        for cell in cells(CONFIG)
    ]
    summary = Summary.of(found, CONFIG)
    assert summary.rates["dppo_kl", 32] == SLOW
    assert summary.rates["pg_is", 32] == FAST
    assert summary.score("brevity", 32, "dppo_kl").final.value == 0.8
    assert summary.score("brevity", 32, "dppo_kl", FAST).final.value == 0.4


def test_auc_and_final_with_their_errors() -> None:
    evaluations = [Evaluation(0, 0.0, 100), Evaluation(8, 0.5, 100)]
    assert auc(evaluations).value == 0.25
    assert final(evaluations).value == 0.5
    assert final(evaluations).error == pytest.approx(0.05)
    assert auc(evaluations).error == pytest.approx(
        (0.05**2 + Estimate.of_share(0.0, 100).error ** 2) ** 0.5 / 2
    )
    assert Estimate.of_share(1.0, 10).error > 0.0


def test_a_difference_inside_noise_is_no_claim() -> None:
    equal = Summary.of(traces({"dppo_kl": 0.51, "ppo_clip": 0.5, "pg_is": 0.5}), CONFIG)
    ahead = Summary.of(traces({"dppo_kl": 0.9, "ppo_clip": 0.3, "pg_is": 0.5}), CONFIG)
    behind = Summary.of(traces({"dppo_kl": 0.3, "ppo_clip": 0.9, "pg_is": 0.5}), CONFIG)

    def holds(summary: Summary) -> bool:
        claim = next(
            claim
            for claim in summary.claims(0.1)
            if claim.text.startswith("lag 32: final reward of dppo_kl above that of ppo_clip")
        )
        return claim.holds

    assert [holds(summary) for summary in (equal, ahead, behind)] == [False, True, False]


def test_a_run_that_ends_far_below_its_peak_is_told() -> None:
    def fallen(trace: Trace) -> Trace:
        return replace(trace, evaluations=(*trace.evaluations, Evaluation(99, 0.3, 120)))

    steady = traces(dict.fromkeys(CONFIG.methods, 0.9))
    for found, holds in ((steady, True), ([fallen(trace) for trace in steady], False)):
        claims = Summary.of(found, CONFIG).claims(0.1)
        kept = [claim.holds for claim in claims if "keeps what it learned" in claim.text]
        assert kept == [holds] * 4  # the default at three lags, the product at one


def test_a_rise_in_perplexity_beyond_the_gate_is_told() -> None:
    ends = dict.fromkeys(CONFIG.methods, 0.9)
    claims = Summary.of(traces(ends), CONFIG).claims(0.10)
    assert [claim.holds for claim in claims[-2:]] == [True, True]  # 21 / 20
    claims = Summary.of(traces(ends), CONFIG).claims(0.04)
    assert [claim.holds for claim in claims[-2:]] == [False, False]


def test_the_report_has_every_run_and_one_table_cell_a_reply(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.real import report

    found = traces({"dppo_kl": 0.8, "ppo_clip": 0.5, "pg_is": 0.6})
    reply = Reply((), (), (), "Hello", True)
    study = Study(CONFIG, tuple(found), (reply,) * 10)
    machine: dict[str, str | int] = {
        "revision": "z",
        "cpus": 2,
        "torch": "x",
        "transformers": "y",
        "finished_at": "2026-01-01",
    }
    report.write(study, machine, tmp_path, "real")
    text = (tmp_path / "real.md").read_text()
    assert "100.0% ±" in text  # everybody greets
    assert "a \\| b c" in text
    lines = (tmp_path / "real.json").read_text().splitlines()
    assert sum('"method"' in line for line in lines) == len(found)
    assert sum('"best_lr": true' in line for line in lines) == len(found) / 2
    assert (tmp_path / "real.png").stat().st_size > 10_000


def test_the_store_gives_back_what_was_finished_under_the_same_configuration(
    tmp_path: Path,
) -> None:
    trace = a_trace(cells(CONFIG)[0], 0.5)
    store = Store(tmp_path, CONFIG)
    assert store.load(trace.cell) is None
    store.save(trace.cell, trace.to_json())
    assert Store(tmp_path, replace(CONFIG, lags=(32,))).trace(trace.cell) == trace
    assert Store(tmp_path, replace(CONFIG, own_batches=3)).load(trace.cell) is None
    store.clear()
    assert store.load(trace.cell) is None


def test_the_base_policy_speaks_enough_for_the_largest_queue() -> None:
    assert [base.key for base in Base.all_for(replace(CONFIG, lags=(0, 9)))] == [
        "base-held-out",
        "base-0",
        "base-1",
    ]
    assert [base.key for base in Base.all_for(replace(CONFIG, lags=(0,)))] == ["base-held-out"]


def test_the_command_refuses_to_run_without_workers(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.real.__main__ import main

    with pytest.raises(SystemExit) as stopped:
        main(["--workers", "0"])
    assert stopped.value.code == 2
    assert "--workers must be at least 1" in capsys.readouterr().err
