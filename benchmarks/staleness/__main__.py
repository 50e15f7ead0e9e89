"""``python -m benchmarks.staleness``: trains, measures, writes benchmarks/results/staleness.*"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.jobs import WorkerDied
from benchmarks.staleness import report
from benchmarks.staleness.methods import METHODS
from benchmarks.staleness.study import Store, machine, run_study
from benchmarks.staleness.summary import DEFAULT, RIVAL, UNCORRECTED, Summary
from benchmarks.staleness.train import Config

RESULTS = Path(__file__).resolve().parent.parent / "results"
BUILD = Path(__file__).resolve().parent.parent.parent / "build" / "staleness"

QUICK = Config(
    seeds=(0, 1),
    learning_rates=(5e-4, 2e-3),
    lags=(0, 256),
    methods=(DEFAULT, RIVAL, UNCORRECTED),
)
EXAMPLES = """examples:
  python -m benchmarks.staleness                 the whole study; resumes if it was interrupted
  python -m benchmarks.staleness --fresh         the same from the start
  python -m benchmarks.staleness --quick         a check of the main claims, about half a minute
  make bench-staleness ARGS="--workers 8"        on a larger machine"""


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 1: a claim of the quick subset failed, or a worker died; 130: interrupted."""
    arguments = _arguments(argv)
    config = QUICK if arguments.quick else Config(methods=tuple(METHODS))
    store = Store(BUILD if arguments.cache is None else arguments.cache, config)
    console = Console(stderr=True)
    if arguments.fresh:
        store.clear()
    elif kept := sum(store.load(group) is not None for group in config.groups):
        console.print(
            f"{kept} of {len(config.groups)} groups were finished by an earlier run of the same "
            "code: they are kept (--fresh: measure them again)"
        )
    try:
        traces = run_study(config, store, arguments.workers)
    except KeyboardInterrupt:
        console.print("interrupted; what is finished was kept: run again to go on")
        return 130
    except WorkerDied as error:
        console.print(str(error))
        return 1
    name = "staleness-quick" if arguments.quick else "staleness"
    directory = arguments.output or (BUILD if arguments.quick else RESULTS)
    found = report.write(Summary.of(traces, config), machine(), directory, name)
    for claim in found:
        mark = "[green]yes[/]" if claim.holds else "[red]no [/]"
        console.print(f"{mark} {claim.text}: {claim.evidence}", highlight=False)
    console.print(f"written: {directory / name}.json, .png, .md")
    # The quick subset is a check; the full run reports what is true, whatever that is.
    return int(arguments.quick and not all(claim.holds for claim in found))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.staleness",
        description="How every objective learns from data that is S updates old.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="three objectives, two lags; exit status 1 when a claim does not hold",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="forget what an earlier run of the same code has finished",
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="processes, one thread each (default: 2)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="where the files go (default: benchmarks/results; with --quick: build/staleness)",
    )
    parser.add_argument(
        "--cache", type=Path, help="where finished groups are kept (default: build/staleness)"
    )
    arguments = parser.parse_args(argv)
    if arguments.workers < 1:
        parser.error("--workers must be at least 1")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
