"""Which rows each example was made of, when it was handed out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from moorline.events import Reason
from updater.ledger.database import LedgerError
from updater.ledger.examples import Claim
from updater.values import Example

_KEPT = 65_536


class Claims:
    """The rows by example id, in memory only: after a restart examples are handed out anew."""

    def __init__(self) -> None:
        self._claims: dict[str, Claim] = {}

    def hand_out(self, found: Sequence[tuple[Example, Claim]]) -> list[Example]:
        """Remember these. Of one reply only the newest hand-out can be decided: an older one may
        hold a rating that has been replaced since, and both together would teach twice."""
        handed_out = {claim.interaction for _, claim in found}
        self._claims = {
            name: claim
            for name, claim in self._claims.items()
            if claim.interaction not in handed_out
        }
        for example, claim in found:
            self._claims[example.example_id] = claim
        while len(self._claims) > max(_KEPT, len(found)):
            self._claims.pop(next(iter(self._claims)))
        return [example for example, _ in found]

    def interactions(self, example_ids: Collection[str]) -> set[int]:
        """Every reply in these examples, those that lost included."""
        claims = [self._claims[name] for name in example_ids if name in self._claims]
        return {identity for claim in claims for identity in (claim.interaction, *claim.over)}

    def for_examples(self, example_ids: Sequence[str]) -> dict[str, Claim]:
        """The claim of each of these examples.

        Raises:
            LedgerError: one is not known, or named twice.
        """
        if len(set(example_ids)) != len(example_ids):
            raise LedgerError("an example is named twice in one decision")
        unknown = [name for name in example_ids if name not in self._claims]
        if unknown:
            raise LedgerError(
                f"{len(unknown)} examples (first: {unknown[0]}) were not handed out by this "
                "ledger since it was opened, or were decided before: take a new batch"
            )
        return {name: self._claims[name] for name in example_ids}

    def divided(
        self, example_ids: Sequence[str], set_aside: Mapping[str, Reason]
    ) -> tuple[dict[str, Claim], dict[str, Claim]]:
        """The claims of a batch: those that its candidate learned from, and the others."""
        claims = self.for_examples(example_ids)
        strangers = set_aside.keys() - claims.keys()
        if strangers:
            raise LedgerError(f"{min(strangers)} is set aside but is not in the batch")
        aside = {name: claims.pop(name) for name in set_aside}
        return claims, aside

    def drop(self, example_ids: Iterable[str]) -> None:
        """Forget these: they are decided."""
        for name in example_ids:
            self._claims.pop(name, None)

    def clear(self) -> None:
        """Forget all: what is handed out may hold what must not be learned from any more."""
        self._claims.clear()
