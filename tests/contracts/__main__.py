"""``python -m tests.contracts --write``: add to the stored contracts what is new, and only that."""

from __future__ import annotations

import sys

from tests.contracts.surface import STORED, added, broken, stored, surface, write


def main() -> int:
    now, before = surface(), stored() if STORED.exists() else {}
    for line in broken(now, before):
        print(f"BROKEN (left as it was) {line}")
    for line in added(now, before):
        print(f"new {line}")
    if "--write" in sys.argv[1:]:
        write({contract: now[contract] | before.get(contract, {}) for contract in now})
    return 0


if __name__ == "__main__":
    sys.exit(main())
