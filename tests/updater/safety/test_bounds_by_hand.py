"""Trust region and gate on a model of a few tokens: every figure, and the limit it is held to."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from moorline.events import Check, Decision, Divergence, Verdict
from moorline.metrics import GATE_CHECKS
from moorline.settings import BoundSettings, GateSettings
from moorline.store import ArtifactStore
from tests.updater.learning.bigram import ROWS, BigramPolicy, rows
from updater.safety import Gate, ProbeSet
from updater.safety.trust_region import (
    BoundedStep,
    Refused,
    TrustRegion,
    largest_inside,
    measure_divergence,
    moved_from_live_nats,
)
from updater.values import TokenSequence

EVEN = (0.5, 0.5)
ANCHOR, LIVE, CANDIDATE = (0.7, 0.3), (0.4, 0.6), (0.2, 0.8)
"""What may follow token 0. After token 1 (the traffic) each is further by a half."""
FAR = {"live_kl_nats": 10.0, "anchor_kl_nats": 10.0}
CALM, MOVED = TokenSequence((0,), (0,)), TokenSequence((1,), (1, 1, 1))


def kl(q: tuple[float, ...], p: tuple[float, ...]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))


def region_of(
    anchor: tuple[tuple[float, ...], ...], *probes: TokenSequence, **bound: float
) -> TrustRegion:
    return TrustRegion(BigramPolicy(anchor), probes, BoundSettings(**{**FAR, **bound}), 256)


def test_the_four_divergences_are_each_from_their_own_policy_on_their_own_tokens() -> None:
    traffic_anchor, traffic_live, traffic_candidate = (0.9, 0.1), (0.6, 0.4), (0.15, 0.85)
    region = region_of((ANCHOR, traffic_anchor), CALM)
    step = region.largest_step(
        rows(LIVE, traffic_live), rows(CANDIDATE, traffic_candidate), [MOVED]
    )
    assert isinstance(step, BoundedStep)
    assert step.scale == 1.0
    found = {(one.measured_from, one.tokens_from): one for one in step.divergences}
    # In `MOVED` every token follows token 1, in `CALM` token 0.
    by_hand = {
        ("live", "probes"): (kl(LIVE, CANDIDATE), 1),
        ("anchor", "probes"): (kl(ANCHOR, CANDIDATE), 1),
        ("live", "traffic"): (kl(traffic_live, traffic_candidate), 3),
        ("anchor", "traffic"): (kl(traffic_anchor, traffic_candidate), 3),
    }
    assert found.keys() == by_hand.keys()
    for name, (nats, tokens) in by_hand.items():
        assert found[name].mean_kl_nats == pytest.approx(nats, rel=1e-4), name
        assert found[name].tokens == tokens
    (probe,) = step.probe_logprobs
    assert probe.exp()[0].tolist() == pytest.approx(CANDIDATE)


@pytest.mark.parametrize("measured_from", ["live", "anchor"])
@pytest.mark.parametrize("tokens_from", ["probes", "traffic"])
def test_each_divergence_alone_is_held_to_the_limit_of_its_own_name(
    measured_from: str, tokens_from: str
) -> None:
    """Only after one token, and only from one of the two policies, is the proposal far."""
    still, far = EVEN, (0.05, 0.95)
    place = 0 if tokens_from == "probes" else 1

    def at(chances: tuple[float, ...]) -> tuple[tuple[float, ...], ...]:
        made = [EVEN, EVEN]
        made[place] = chances
        return tuple(made)

    # From live: anchor and candidate are alike. From the anchor: live and candidate are.
    anchor, live = (far, still) if measured_from == "live" else (still, far)
    used = kl(still, far)
    limits = {f"{measured_from}_kl_nats": used * 1.01}
    inside = region_of(at(anchor), CALM, **limits)
    assert isinstance(inside.largest_step(rows(*at(live)), rows(*at(far)), [MOVED]), BoundedStep)
    outside = region_of(at(anchor), CALM, **{name: limit / 1.02 for name, limit in limits.items()})
    step = outside.largest_step(rows(*at(live)), rows(*at(far)), [MOVED])
    assert isinstance(step, Refused) or step.scale < 1.0
    other = "anchor" if measured_from == "live" else "live"
    free = region_of(at(anchor), CALM, **{f"{other}_kl_nats": 1e-3})
    again = free.largest_step(rows(*at(live)), rows(*at(far)), [MOVED])
    assert isinstance(again, BoundedStep)
    assert again.scale == 1.0, "the other limit is not its own"


def test_the_answers_of_a_live_policy_are_not_those_of_the_one_before_it() -> None:
    region = region_of((ANCHOR, EVEN), CALM)
    first, second = rows(LIVE, EVEN), rows(CANDIDATE, EVEN)
    assert region.live_probe_logprobs(first)[0].exp()[0].tolist() == pytest.approx(LIVE)
    assert region.live_probe_logprobs(second)[0].exp()[0].tolist() == pytest.approx(CANDIDATE)
    assert region.live_probe_logprobs(second) is region.live_probe_logprobs(second)


def test_a_refusal_reports_the_whole_proposal() -> None:
    region = region_of((ANCHOR, EVEN), CALM, live_kl_nats=1e-9, min_step_scale=0.9)
    refused = region.largest_step(rows(LIVE, EVEN), rows(CANDIDATE, EVEN), [])
    assert isinstance(refused, Refused)
    assert [one.mean_kl_nats for one in refused.divergences] == pytest.approx(
        [kl(LIVE, CANDIDATE), kl(ANCHOR, CANDIDATE)], rel=1e-4
    )


def test_the_way_back_to_the_anchor_is_searched_where_the_live_policy_itself_is_too_far() -> None:
    """The traffic of today shows a distance that the probes do not."""
    far = (0.05, 0.95)
    limit = kl(EVEN, far) / 2
    region = region_of((EVEN, EVEN), CALM, anchor_kl_nats=limit, min_step_scale=0.05)
    live, proposed = rows(EVEN, far), rows(EVEN, (0.04, 0.96))
    step = region.largest_step(live, proposed, [MOVED])
    assert isinstance(step, BoundedStep)
    found = {(one.measured_from, one.tokens_from): one.mean_kl_nats for one in step.divergences}
    assert 0.9 * limit <= found["anchor", "traffic"] <= limit
    # It may not jump back either: then a person decides.
    region = region_of((EVEN, EVEN), CALM, anchor_kl_nats=limit, live_kl_nats=1e-4)
    refused = region.largest_step(live, proposed, [MOVED])
    assert isinstance(refused, Refused)
    assert refused.anchor_exhausted


def test_a_refusal_says_whether_the_anchor_or_the_jump_was_too_far() -> None:
    near = rows((0.48, 0.52), EVEN)
    spent = {"anchor_kl_nats": kl(EVEN, (0.48, 0.52)) * 1.001}
    for live, limits, exhausted in (
        (near, spent, True),
        (near, {"live_kl_nats": 1e-9}, False),
        (near, {"live_kl_nats": 1e-9, **spent}, False),
        (rows(EVEN, EVEN), spent, False),  # the line has not moved yet: the proposal is far
    ):
        region = region_of((EVEN, EVEN), CALM, min_step_scale=0.5, **limits)
        refused = region.largest_step(live, rows((0.2, 0.8), EVEN), [])
        assert isinstance(refused, Refused)
        assert refused.anchor_exhausted is exhausted


def test_a_step_may_begin_smaller_than_the_proposal() -> None:
    region = region_of((EVEN, EVEN), CALM, min_step_scale=0.05)
    step = region.largest_step(rows(EVEN, EVEN), rows(LIVE, EVEN), [], 0.25)
    assert isinstance(step, BoundedStep)
    assert step.scale == 0.25


def test_distances_are_from_the_anchor_that_was_set() -> None:
    region = region_of((EVEN, EVEN), CALM)
    region.set_anchor(rows(ANCHOR, ANCHOR), 3)
    step = region.largest_step(rows(LIVE, EVEN), rows(CANDIDATE, EVEN), [MOVED])
    assert isinstance(step, BoundedStep)
    found = {(one.measured_from, one.tokens_from): one.mean_kl_nats for one in step.divergences}
    assert found["anchor", "probes"] == pytest.approx(kl(ANCHOR, CANDIDATE), rel=1e-4)
    assert found["anchor", "traffic"] == pytest.approx(kl(ANCHOR, EVEN), rel=1e-4)


def test_a_number_that_is_none_is_never_inside() -> None:
    nothing = divergence("anchor", math.nan, "traffic")
    region = region_of((EVEN, EVEN), CALM)
    for order in ([divergence("live", 0.1), nothing], [nothing, divergence("live", 0.1)]):
        assert math.isnan(region._used(order))


def test_the_probes_alone_are_measured_where_there_is_no_traffic() -> None:
    region = region_of((ANCHOR, EVEN), CALM)
    step = region.largest_step(rows(LIVE, EVEN), rows(CANDIDATE, EVEN), [])
    assert isinstance(step, BoundedStep)
    assert [one.tokens_from for one in step.divergences] == ["probes", "probes"]


def test_a_mean_weighs_tokens_and_the_worst_prompt_may_be_any() -> None:
    q, p = torch.tensor([LIVE]).log(), torch.tensor([CANDIDATE]).log()
    nats = kl(LIVE, CANDIDATE)
    for sequences in ([(q, p), (q.repeat(3, 1),) * 2], [(q.repeat(3, 1),) * 2, (q, p)]):
        found = measure_divergence(*zip(*sequences, strict=True), "live", "probes")  # type: ignore[arg-type]
        assert found.tokens == 4
        assert found.mean_kl_nats == pytest.approx(nats / 4)
        assert found.max_prompt_kl_nats == pytest.approx(nats)
    nothing = measure_divergence([], [], "anchor", "traffic")
    assert (nothing.mean_kl_nats, nothing.max_prompt_kl_nats, nothing.tokens) == (0.0, 0.0, 0)


def divergence(measured_from: str, nats: float, tokens_from: str = "probes") -> Divergence:
    return Divergence(
        measured_from=measured_from,  # type: ignore[arg-type]
        tokens_from=tokens_from,  # type: ignore[arg-type]
        mean_kl_nats=nats,
        max_prompt_kl_nats=9.0,
        tokens=1,
    )


def test_what_a_release_moved_is_the_larger_distance_from_live_not_from_the_anchor() -> None:
    found = [
        divergence("live", 0.01),
        divergence("anchor", 0.3),
        divergence("anchor", 0.4, "traffic"),
        divergence("live", 0.02, "traffic"),
    ]
    for divergences in (found, found[::-1]):
        assert moved_from_live_nats(divergences) == 0.02
        region = region_of((EVEN, EVEN), CALM, anchor_kl_nats=0.5)
        assert region.anchor_budget_left_nats(divergences) == pytest.approx(0.1)
    assert moved_from_live_nats(found[1:3]) == 0.0
    assert moved_from_live_nats([]) == 0.0


def test_exactly_at_the_limit_is_inside_and_a_hair_beyond_is_not() -> None:
    assert largest_inside(lambda scale: scale, 5, 0.05) == 1.0
    beyond = math.nextafter(1.0, 2.0)
    found = largest_inside(lambda scale: beyond * scale, 5, 0.05)
    assert found is not None
    assert found < 1.0


def test_the_smallest_useful_step_is_tried_before_all_is_refused() -> None:
    tried: list[float] = []

    def used(scale: float) -> float:
        tried.append(scale)
        return 0.99 if scale <= 0.2 else 400.0

    assert largest_inside(used, 5, 0.2) == 0.2
    assert tried[0] == 1.0
    assert len(tried) <= 1 + 5


# --- the gate -----------------------------------------------------------------------------------

TWO_CHATS = (TokenSequence((0,), (0, 0, 0)), TokenSequence((1,), (1,)))
A_TEXT = (TokenSequence((2,), (2, 2)),)
SAME = (1 / 3, 1 / 3, 1 / 3)


class Judged:
    """A gate over three rows: token 0 leads the first chat, 1 the second, 2 the text."""

    def __init__(self, root: Path, anchor: dict[int, tuple[float, ...]], **limits: float) -> None:
        policy = BigramPolicy(self._rows(anchor))
        probes = ProbeSet(TWO_CHATS, A_TEXT)
        self.store = ArtifactStore(root)
        region = TrustRegion(policy, probes.sequences, BoundSettings(), 256)
        generous = dict.fromkeys(GateSettings.model_fields.keys() - {"probes"}, 1e9)
        settings = GateSettings(**{**generous, **limits})  # type: ignore[arg-type]
        self.gate = Gate(policy, probes, region, self.store, settings)
        self.policy = policy

    @staticmethod
    def _rows(changed: dict[int, tuple[float, ...]]) -> list[tuple[float, ...]]:
        return [changed.get(row, SAME) for row in range(3)]

    def judge(
        self, live: dict[int, tuple[float, ...]], candidate: dict[int, tuple[float, ...]]
    ) -> Verdict:
        files = self.policy.adapter_files(rows(*self._rows(candidate)))
        return self.gate.judge(*self.store.put(files), rows(*self._rows(live)))


def checks(verdict: Verdict) -> dict[str, Check]:
    return {check.name: check for check in verdict.checks}


A, L, C = (0.5, 0.3, 0.2), (0.3, 0.4, 0.3), (0.2, 0.2, 0.6)


def test_each_figure_of_the_gate_is_from_the_policy_that_its_name_says(tmp_path: Path) -> None:
    judged = Judged(tmp_path, {0: A, 1: A, 2: A})
    verdict = judged.judge({0: L, 1: SAME, 2: L}, {0: C, 1: A, 2: C})
    found = {name: check.measured for name, check in checks(verdict).items()}
    live, second = kl(L, C), kl(SAME, A)
    assert found["kl_live_mean_nats"] == pytest.approx((3 * live + second) / 4, rel=1e-4)
    assert found["kl_live_max_prompt_nats"] == pytest.approx(live, rel=1e-4)
    assert found["kl_anchor_mean_nats"] == pytest.approx(3 * kl(A, C) / 4, rel=1e-4)
    assert found["kl_anchor_max_prompt_nats"] == pytest.approx(kl(A, C), rel=1e-4)
    # The text is all token 2: perplexity 1 / chance of it.
    assert found["perplexity_rise_from_live"] == pytest.approx(0.3 / 0.6 - 1, rel=1e-4)
    assert found["perplexity_rise_from_anchor"] == pytest.approx(0.2 / 0.6 - 1, rel=1e-4)
    assert verdict.decision is Decision.PASS


MEASURED = {
    "live_kl_mean_nats": "kl_live_mean_nats",
    "live_kl_max_prompt_nats": "kl_live_max_prompt_nats",
    "anchor_kl_mean_nats": "kl_anchor_mean_nats",
    "anchor_kl_max_prompt_nats": "kl_anchor_max_prompt_nats",
    "perplexity_rise_share": "perplexity_rise_from_live",
    "perplexity_rise_share_from_anchor": "perplexity_rise_from_anchor",
}


def test_every_limit_of_the_gate_has_its_figure() -> None:
    assert MEASURED.keys() == GateSettings.model_fields.keys() - {"probes"}


@pytest.mark.parametrize("setting", MEASURED)
def test_each_limit_alone_blocks_just_beyond_it_and_passes_at_it(
    tmp_path: Path, setting: str
) -> None:
    anchor, live = {0: A, 1: SAME, 2: (0.1, 0.1, 0.8)}, {0: L, 1: SAME, 2: (0.2, 0.1, 0.7)}
    candidate = {0: C, 1: SAME, 2: (0.4, 0.2, 0.4)}
    measured = checks(Judged(tmp_path, anchor).judge(live, candidate))[MEASURED[setting]].measured
    assert measured is not None
    assert measured > 0.0
    at = Judged(tmp_path, anchor, **{setting: measured}).judge(live, candidate)
    assert at.decision is Decision.PASS
    below = math.nextafter(measured, 0.0)
    beyond = Judged(tmp_path, anchor, **{setting: below}).judge(live, candidate)
    assert beyond.decision is Decision.BLOCK
    assert [check.name for check in beyond.checks if not check.passed] == [MEASURED[setting]]
    assert checks(beyond)[MEASURED[setting]].limit == below


def test_a_policy_that_likes_the_text_less_has_a_higher_perplexity(tmp_path: Path) -> None:
    worse = Judged(tmp_path, {}, perplexity_rise_share=0.02).judge({}, {2: (0.4, 0.3, 0.3)})
    assert worse.decision is Decision.BLOCK
    better = Judged(tmp_path, {}, perplexity_rise_share=0.02).judge({}, {2: (0.2, 0.1, 0.7)})
    assert better.decision is Decision.PASS


def test_infinite_weights_and_infinite_answers_are_both_not_finite(tmp_path: Path) -> None:
    judged = Judged(tmp_path, {})
    infinite = {ROWS: torch.tensor([[-math.inf, 0.0, 0.0], [0.0] * 3, [0.0] * 3])}
    overflowing = {ROWS: torch.tensor([[3e38, -3e38, 0.0], [0.0] * 3, [0.0] * 3])}
    for candidate, what in ((infinite, "a weight"), (overflowing, "a logprob")):
        files = judged.policy.adapter_files(candidate)
        verdict = judged.gate.judge(*judged.store.put(files), rows(SAME, SAME, SAME))
        assert verdict.decision is Decision.BLOCK
        (failed,) = [check for check in verdict.checks if not check.passed]
        assert failed.name == "finite"
        assert str(failed.detail).startswith(what)


def test_each_check_is_counted_as_it_ended(tmp_path: Path) -> None:
    judged = Judged(tmp_path, {}, perplexity_rise_share=1e-6)
    name = "perplexity_rise_from_live"

    def counted() -> list[float]:
        return [
            GATE_CHECKS.labels(check=name, outcome=outcome)._value.get()
            for outcome in ("passed", "failed")
        ]

    before = counted()
    judged.judge({}, {2: (0.4, 0.3, 0.3)})
    judged.judge({}, {})
    judged.judge({}, {})
    assert [now - then for now, then in zip(counted(), before, strict=True)] == [2.0, 1.0]
    last = Judged(tmp_path / "b", {}, perplexity_rise_share_from_anchor=1e-6)
    failed = GATE_CHECKS.labels(check="perplexity_rise_from_anchor", outcome="failed")._value
    then = failed.get()
    assert 0.0 <= last.judge({}, {2: (0.4, 0.3, 0.3)}).seconds < 60.0
    assert failed.get() == then + 1


def test_a_number_that_is_none_is_the_largest_wherever_it_stands() -> None:
    fine, broken = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.5, math.nan]]).log()
    for order in ([fine, broken], [broken, fine]):
        measured = measure_divergence([fine, fine], order, "live", "probes")
        assert math.isnan(measured.mean_kl_nats)
        assert math.isnan(measured.max_prompt_kl_nats)
    region = region_of((EVEN, EVEN), CALM)
    for start in ("live", "anchor"):
        both = [divergence(start, 0.1), divergence(start, math.nan, "traffic")]
        for one in (both, both[::-1]):
            found = (
                moved_from_live_nats(one)
                if start == "live"
                else region.anchor_budget_left_nats(one)
            )
            assert math.isnan(found)
