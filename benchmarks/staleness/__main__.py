"""``python -m benchmarks.staleness``: trains, measures, writes benchmarks/results/staleness.*"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from benchmarks.staleness import report
from benchmarks.staleness.methods import METHODS
from benchmarks.staleness.study import Store, WorkerDied, machine, run_study
from benchmarks.staleness.summary import DEFAULT, RIVAL, UNCORRECTED, Summary
from benchmarks.staleness.train import Config

RESULTS = Path(__file__).resolve().parent.parent / "results"
UNFINISHED = Path(__file__).resolve().parent.parent.parent / "build" / "staleness"

QUICK = Config(
    seeds=(0, 1),
    learning_rates=(2.5e-4, 1e-3),
    lags=(0, 256),
    methods=(DEFAULT, RIVAL, UNCORRECTED),
)


def main() -> int:
    arguments = _arguments()
    config = QUICK if arguments.quick else Config(methods=tuple(METHODS))
    store = Store(UNFINISHED, config)
    if not arguments.resume:
        store.clear()
    console = Console(stderr=True)
    try:
        traces = run_study(config, store, arguments.workers)
    except KeyboardInterrupt:
        console.print("interrupted; what is finished was kept: run again with --resume")
        return 130
    except WorkerDied as error:
        console.print(str(error))
        return 1
    name = "staleness-quick" if arguments.quick else "staleness"
    found = report.write(Summary.of(traces, config), machine(), arguments.output, name)
    for claim in found:
        mark = "[green]yes[/]" if claim.holds else "[red]no [/]"
        console.print(f"{mark} {claim.text}: {claim.evidence}", highlight=False)
    console.print(f"written: {arguments.output / name}.json, .png, .md")
    # The quick subset is a check; the full run reports what is true, whatever that is.
    return int(arguments.quick and not all(claim.holds for claim in found))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.staleness",
        description="How every objective learns from data that is S updates old.",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a subset, under 3 minutes; fails when a claim does not hold",
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep what an interrupted run has finished"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the files go")
    arguments = parser.parse_args()
    if arguments.workers < 1:
        parser.error("--workers must be at least 1")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
