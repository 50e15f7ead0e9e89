"""The chaos harness: its schedule follows from the seed, and its oracle finds every difference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moorline.events import Feedback, Interaction, LogprobConvention, PolicySpan, SamplingSettings
from moorline.settings import Settings, load_settings
from moorline.stream import Record, Topic
from tests.chaos import oracle
from tests.chaos.oracle import (
    Decision,
    Era,
    Outcome,
    Reference,
    Script,
    decisions,
    outcome,
    run_reference,
)
from tests.chaos.schedule import KINDS, Kind, schedule, updater_lives
from tests.chaos.world import UPDATER_SETTINGS
from tests.updater.learning.fixtures import ALIAS, recorded, some_sequences
from updater.learning.policy import Policy
from updater.ledger import Anchor, Ledger

EVERYTHING = frozenset(need for kind in KINDS for need in kind.needs)


@given(st.integers(0, 10**6))
def test_a_seed_gives_the_same_faults_again(seed: int) -> None:
    assert schedule(seed, 600, EVERYTHING) == schedule(seed, 600, EVERYTHING)
    assert list(islice(updater_lives(seed), 50)) == list(islice(updater_lives(seed), 50))


@given(st.integers(0, 10**6))
def test_what_a_machine_lacks_changes_none_of_the_other_faults(seed: int) -> None:
    needy = {kind.name for kind in KINDS if kind.needs}
    all_of_it = [fault for fault in schedule(seed, 600, EVERYTHING) if fault.kind not in needy]
    assert schedule(seed, 600, frozenset()) == all_of_it


@given(st.integers(0, 10**6), st.sampled_from(KINDS))
def test_one_kind_alone_strikes_when_it_does_among_the_others(seed: int, kind: Kind) -> None:
    everything = schedule(seed, 600, EVERYTHING)
    alone = schedule(seed, 600, EVERYTHING, frozenset({kind.name}))
    assert alone == [fault for fault in everything if fault.kind == kind.name]


def test_ten_minutes_hold_every_kind_of_fault() -> None:
    struck = {fault.kind for seed in range(3) for fault in schedule(seed, 600, EVERYTHING)}
    assert struck == {kind.name for kind in KINDS}


def a_log(interactions: Sequence[Interaction], equal: int = 0) -> list[Record]:
    """Replies with a rating each, in two partitions of each topic; the first ratings are equal."""
    records = []
    for number, interaction in enumerate(interactions):
        rating = Feedback.model_validate(
            {
                "feedback_id": f"fb-{number}",
                "interaction_id": interaction.interaction_id,
                "value": 1 if number < equal or number % 3 else -1,
                "created_at": 1_750_000_002.0 + number,
            }
        )
        for topic, event in ((Topic.INTERACTIONS, interaction), (Topic.FEEDBACK, rating)):
            place = (topic, str(topic), number % 2, number // 2)
            records.append(Record(*place, 1_750_000_003_000, None, event.to_bytes()))
    return records


def some_replies(number: int) -> list[Interaction]:
    """Replies with invented tokens: enough for whatever only counts them."""
    return [
        Interaction(
            interaction_id=f"chatcmpl-{index}",
            alias=ALIAS,
            created_at=1_750_000_000.0 + index,
            latency_seconds=0.1,
            prompt_token_ids=(1, 2),
            completion_token_ids=(3,),
            completion_logprobs=(-1.0,),
            logprob_convention=LogprobConvention.PROCESSED,
            sampling=SamplingSettings(),
            policy_spans=(PolicySpan(version=0, start=0, end=1),),
            finish_reason="stop",
        )
        for index in range(number)
    ]


BOTH = (Topic.INTERACTIONS, Topic.FEEDBACK)


@given(st.lists(st.integers(0, 10), max_size=5))
def test_a_script_gives_every_record_once_and_none_before_its_cut(ends: list[int]) -> None:
    log = a_log(some_replies(20))
    cuts = [{(Topic.FEEDBACK, part): end for part in (0, 1)} for end in sorted(ends)]
    script = Script(log, cuts)
    given_so_far: list[Record] = []
    for cut in cuts:
        given_so_far += script.poll(1, 0.0)
        feedback = [one for one in given_so_far if one.topic is Topic.FEEDBACK]
        assert all(one.offset < cut[one.topic, one.partition] for one in feedback)
        assert len(feedback) == sum(cut.values())
    given_so_far += script.poll(1, 0.0)
    assert sorted(map(repr, given_so_far)) == sorted(map(repr, log))
    assert script.left == 0


@pytest.fixture
def settings_in(tiny_model_dir: Path, tmp_path: Path) -> Callable[[str], Settings]:
    """Settings of a reference, by the name of its state directory."""

    def make(name: str) -> Settings:
        variables = {f"MOORLINE_{key}": value for key, value in UPDATER_SETTINGS.items()}
        variables |= {
            "MOORLINE_MODEL__PATH": str(tiny_model_dir),
            "MOORLINE_STATE_DIR": str(tmp_path / name),
            "MOORLINE_LEARNING__BATCH_EXAMPLES": "8",
            "MOORLINE_LEARNING__MIN_BATCH_EXAMPLES": "8",
        }
        return load_settings(environment=variables)

    return make


@pytest.fixture
def policy(settings_in: Callable[[str], Settings]) -> Policy:
    """The policy that the reference runs start from."""
    settings = settings_in("any")
    learning = settings.learning
    return Policy(
        settings.model.path,
        rank=learning.lora_rank,
        alpha=learning.lora_alpha,
        seed=learning.seed,
    )


def written_by(policy: Policy, number: int) -> list[Interaction]:
    """Replies of the base model."""
    return [
        recorded(policy, sequence, f"chatcmpl-{index}")
        for index, sequence in enumerate(some_sequences(number))
    ]


def decided_at(end: int) -> Decision:
    """A decision before which so much of each partition had been read."""
    offsets = {(topic, part): end for topic in BOTH for part in (0, 1)}
    return Decision(0.0, "", offsets, frozenset())


def test_the_same_log_cut_at_the_same_places_gives_the_same_weights_and_another_does_not(
    settings_in: Callable[[str], Settings], policy: Policy
) -> None:
    log = a_log(written_by(policy, 20))
    first = run_reference(settings_in("first"), log, [decided_at(4), decided_at(9)])
    with Ledger.open_readonly(settings_in("first").ledger_path) as ledger:
        made = decisions(ledger)
        assert outcome(ledger) == first
    assert len(first.weights) == 2
    assert [one.offsets for one in made] == [decided_at(4).offsets, decided_at(9).offsets]
    assert run_reference(settings_in("again"), log, made) == first

    without_one = [record for record in log if record.value and b"fb-3" not in record.value]
    lost = run_reference(settings_in("lost"), without_one, made)
    assert lost.weights != first.weights
    assert lost.accounting != first.accounting


def test_what_was_rejected_is_rejected_again(
    settings_in: Callable[[str], Settings], policy: Policy
) -> None:
    log = a_log(written_by(policy, 20))

    def strict(name: str) -> Settings:
        settings = settings_in(name)
        gate = settings.gate.model_copy(update={"live_kl_mean_nats": 1e-12})
        learning = settings.learning.model_copy(update={"max_tries": 2})
        return settings.model_copy(update={"gate": gate, "learning": learning})

    until_all_is_rejected = [decided_at(10)] * 9
    first = run_reference(
        strict("first"), log, [decided_at(4), decided_at(9), *until_all_is_rejected]
    )
    assert len(first.decisions) > 2, "what is refused is tried again, smaller"
    assert set(first.decisions) == {"rejected: gate_blocked"}
    with Ledger.open_readonly(strict("first").ledger_path) as ledger:
        made = decisions(ledger)
    assert [one.offsets for one in made[:2]] == [decided_at(4).offsets, decided_at(9).offsets]
    assert run_reference(strict("again"), log, made) == first
    assert run_reference(settings_in("lax"), log, made).decisions != first.decisions


def test_where_there_was_nothing_to_learn_there_is_nothing_again(
    settings_in: Callable[[str], Settings], policy: Policy
) -> None:
    log = a_log(written_by(policy, 20), equal=8)
    first = run_reference(settings_in("first"), log, [decided_at(4), decided_at(9)])
    assert [name.split()[0] for name in first.decisions] == ["no", "v1"]
    with Ledger.open_readonly(settings_in("first").ledger_path) as ledger:
        made = decisions(ledger)
    assert [one.offsets for one in made] == [decided_at(4).offsets, decided_at(9).offsets]
    assert run_reference(settings_in("again"), log, made) == first


def test_a_behaviour_policy_that_was_damaged_is_damaged_again(
    settings_in: Callable[[str], Settings], policy: Policy
) -> None:
    """Half of the replies of v1 were not written by it, which only v1 itself can tell."""
    replies = written_by(policy, 30)
    late = [
        reply.model_copy(
            update={
                "sampling": SamplingSettings(min_p=1e-9),
                "policy_spans": (
                    PolicySpan(version=1, start=0, end=len(reply.completion_token_ids)),
                ),
                "completion_logprobs": tuple(
                    logprob - number % 2 for logprob in reply.completion_logprobs if logprob
                ),
            }
        )
        for number, reply in enumerate(replies[18:])
    ]
    log = a_log(replies[:18] + late)
    whole = [decided_at(4), decided_at(9), decided_at(13)]
    without = [*whole[:2], replace(whole[2], behaviour_policies_unavailable=frozenset({1}))]
    sound = run_reference(settings_in("sound"), log, whole)
    damaged = run_reference(settings_in("damaged"), log, without)
    assert damaged.weights[:2] == sound.weights[:2]
    assert damaged.decisions != sound.decisions
    with Ledger.open_readonly(settings_in("damaged").ledger_path) as ledger:
        made = decisions(ledger)
    assert [one.behaviour_policies_unavailable for one in made] == [
        frozenset(),
        frozenset(),
        frozenset({1}),
    ]
    assert run_reference(settings_in("again"), log, made) == damaged


@pytest.mark.parametrize("in_copy", [None, 1])
def test_a_ledger_that_was_lost_is_lost_again(
    settings_in: Callable[[str], Settings], policy: Policy, in_copy: int | None
) -> None:
    log = a_log(written_by(policy, 30))
    eras = [Era([decided_at(4), decided_at(8)]), Era([decided_at(12)], in_copy)]
    lost, last = Reference(settings_in("first"), log).live(eras)
    assert (len(lost.weights), len(last.weights)) == (2, 3)
    assert last.weights[:2] == lost.weights
    assert "may_have_taught" in str(last.accounting)
    assert Reference(settings_in("again"), log).live(eras) == [lost, last]
    never_lost = run_reference(
        settings_in("whole"), log, [decided_at(4), decided_at(8), decided_at(12)]
    )
    assert never_lost.accounting != last.accounting


def test_an_anchor_that_was_moved_is_moved_again(
    settings_in: Callable[[str], Settings], policy: Policy
) -> None:
    log = a_log(written_by(policy, 20))
    settings = settings_in("moved")
    second = replace(decided_at(9), at=2.0)
    moved = Anchor(1, "chaos", "chaos", requested_at=1.0, applied_at=1.5)
    Reference(settings, log, [moved]).live([Era([decided_at(4), second])])
    with Ledger.open_readonly(settings.ledger_path) as ledger:
        assert [(one.version, one.reason) for one in ledger.anchors()] == [(1, "chaos")]
        assert [one.anchor for one in ledger.releases(10)] == [0, 1]


def test_every_difference_is_a_violation() -> None:
    found = Outcome({"total": 3}, {"feedback.v1/0": 3}, ["v1 a"], ["a"])
    assert oracle._differences(found, found) == []
    for other in (
        replace(found, accounting={"total": 4}),
        replace(found, offsets={"feedback.v1/0": 2}),
        replace(found, decisions=["v1 b"]),
        replace(found, decisions=["v1 a", "v2 c"]),
    ):
        assert len(oracle._differences(found, other)) == 1


def test_an_acknowledged_rating_that_is_not_in_the_stream_is_lost() -> None:
    log = a_log(some_replies(3))
    assert oracle._lost(log, {"fb-0", "fb-2"}) == []
    assert "fb-9" in oracle._lost(log, {"fb-0", "fb-9"})[0]


def test_a_ledger_that_does_not_stand_at_the_end_of_the_log_is_told() -> None:
    log = a_log(some_replies(4))
    at_the_end = Outcome({}, {f"{topic}/{part}": 2 for topic in BOTH for part in (0, 1)}, [], [])
    assert oracle._unread(log, at_the_end) == []
    short = replace(at_the_end, offsets={**at_the_end.offsets, "feedback.v1/1": 1})
    assert len(oracle._unread(log, short)) == 1
