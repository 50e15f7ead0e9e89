"""Settings, metrics, topics, wire fields, reasons, fates and commands: none goes or changes."""

from __future__ import annotations

import copy

from tests.contracts.surface import added, broken, stored, surface


def test_nothing_that_others_rely_on_is_gone_or_means_something_else() -> None:
    assert broken(surface(), stored()) == [], (
        "operators, dashboards and producers rely on these: keep the old name or meaning beside "
        "the new one; a deliberate break is an edit of tests/contracts/stored.json by hand and a "
        "line in CHANGELOG.md"
    )


def test_what_is_new_is_written_down() -> None:
    assert added(surface(), stored()) == [], "run `python -m tests.contracts --write`"


def test_a_removal_and_a_new_meaning_are_noticed() -> None:
    now = copy.deepcopy(stored())
    del now["reasons"]["off_policy"]
    now["settings"]["serving.port"] = "str = 8000"
    assert len(broken(now, stored())) == 2
