"""The ledger: pending joins, examples, offsets, lineage and releases, in one SQLite file.

Nothing outside this package imports sqlite3.
"""

from updater.ledger.accounting import Accounting
from updater.ledger.anchors import Anchor
from updater.ledger.crashes import Suspect
from updater.ledger.database import (
    LeaseLost,
    LedgerError,
    LedgerLocked,
    LedgerUnavailable,
    RecordInvalid,
)
from updater.ledger.decisions import BatchDecision
from updater.ledger.erasure import Forgotten
from updater.ledger.examples import examples_digest
from updater.ledger.expiry import Expired
from updater.ledger.intake import Ingested
from updater.ledger.reader import LedgerReader
from updater.ledger.refusals import RefusedReply
from updater.ledger.rules import Parsed
from updater.ledger.writer import Ledger

__all__ = [
    "Accounting",
    "Anchor",
    "BatchDecision",
    "Expired",
    "Forgotten",
    "Ingested",
    "LeaseLost",
    "Ledger",
    "LedgerError",
    "LedgerLocked",
    "LedgerReader",
    "LedgerUnavailable",
    "Parsed",
    "RecordInvalid",
    "RefusedReply",
    "Suspect",
    "examples_digest",
]
