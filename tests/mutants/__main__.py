"""Puts each recorded fault into a copy of the tree and runs the tests that must notice it.

Exit status 0: every fault was noticed. 1: one was not, or a record is stale.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tests.mutants.record import ROOT, Mutant, read_mutants

TIMEOUT_SECONDS = 300
"""A fault that makes its tests hang is noticed."""
TESTS_FAILED = 1
"""Pytest's exit status; any other than this and 0 says that the tests did not run."""


def copy_tree(target: Path) -> None:
    """Copy what git knows, and what it would not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def run_tests(copy: Path, tests: Iterable[str]) -> int | None:
    """Pytest's exit status in the copy; None: it did not end in time."""
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, *sorted(set(tests))],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return None
    return done.returncode


def try_out(mutant: Mutant, copy: Path) -> str | None:
    """Why this fault lived; None: its tests noticed it."""
    path = copy / mutant.file
    sound = path.read_bytes()
    mutant.put_into(copy)
    try:
        status = run_tests(copy, mutant.tests)
    finally:
        path.write_bytes(sound)
    if status in (TESTS_FAILED, None):
        return None
    return "alive" if status == 0 else f"its tests did not run (pytest ended with {status})"


def main() -> int:
    """Try all faults, or a sample of them."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--sample", type=int, metavar="N", help="only so many")
    parser.add_argument("--seed", type=int, default=0, help="which ones a sample takes")
    options = parser.parse_args()
    mutants = read_mutants()
    stale = [why for mutant in mutants if (why := mutant.why_stale()) is not None]
    if stale:
        print("\n".join(stale))
        return 1
    if options.sample is not None and options.sample < len(mutants):
        mutants = random.Random(options.seed).sample(mutants, options.sample)
    with tempfile.TemporaryDirectory(prefix="moorline-mutants-") as folder:
        copy = Path(folder)
        copy_tree(copy)
        if run_tests(copy, (test for mutant in mutants for test in mutant.tests)) != 0:
            print("the tests fail without any fault: mend them first")
            return 1
        lived = 0
        for number, mutant in enumerate(mutants, start=1):
            why = try_out(mutant, copy)
            lived += why is not None
            print(f"{number}/{len(mutants)} {why or 'noticed'}: {mutant.what}", flush=True)
    print(f"{len(mutants) - lived} of {len(mutants)} faults were noticed")
    return 1 if lived else 0


if __name__ == "__main__":
    sys.exit(main())
