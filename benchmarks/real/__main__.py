"""``python -m benchmarks.real``: trains, measures, writes benchmarks/results/real.*"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from benchmarks.jobs import WorkerDied
from benchmarks.real import report
from benchmarks.real.study import Store, machine, run_study
from benchmarks.real.train import Config
from daemon.demo.model import ModelUnavailable, prepare_model

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
UNFINISHED = ROOT / "build" / "real"
MODEL = ROOT / ".models" / "SmolLM2-135M-Instruct"

QUICK = Config(
    rules=("brevity",),
    lags=(0, 4),
    methods=("dppo_kl", "ppo_clip", "moorline"),
    rates=(1e-3,),
    own_batches=4,
    batch_replies=6,
    held_out=16,
    evaluate_every=4,
    final_rounds=1,
)
EXAMPLES = """\
examples:
  python -m benchmarks.real --quick       a couple of minutes: does everything work?
  python -m benchmarks.real               all of it; after an interruption, the same command
                                          continues
  python -m benchmarks.real --lags 32     only this lag; what was finished is used later as well
  python -m benchmarks.real --fresh       all of it from the start
  python -m benchmarks.real --workers 1   slower, in half the memory (about 1.3 GB)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 1: a worker died, or there is no model; 130: interrupted."""
    arguments = _arguments(argv)
    config = QUICK if arguments.quick else Config()
    if arguments.lags:
        config = replace(config, lags=tuple(sorted(set(arguments.lags))))
    if arguments.methods:
        config = replace(config, methods=tuple(arguments.methods))
    console = Console(stderr=True)
    store = Store(UNFINISHED, config)
    if arguments.fresh:
        store.clear()
    try:
        model_dir = prepare_model(arguments.model)
        study = run_study(model_dir, config, store, arguments.workers)
    except KeyboardInterrupt:
        console.print("interrupted; finished runs were kept: the same command continues")
        return 130
    except (WorkerDied, ModelUnavailable) as error:
        console.print(str(error))
        return 1
    name = "real-quick" if arguments.quick else "real"
    output = UNFINISHED if arguments.quick and arguments.output == RESULTS else arguments.output
    for claim in report.write(study, machine(), output, name):
        mark = "[green]yes[/]" if claim.holds else "[red]no [/]"
        console.print(f"{mark} {claim.text}: {claim.evidence}", highlight=False)
    console.print(f"written: {output / name}.json, .png, .md")
    return 0  # the run reports what is true, whatever that is


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real",
        description="How a real model learns from thumbs on replies that are S updates old.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="a small subset, into build/real: checks the machinery"
    )
    parser.add_argument(
        "--lags", type=int, nargs="+", metavar="S", help="only these (default: all)"
    )
    parser.add_argument(
        "--methods", choices=Config().methods, nargs="+", help="only these (default: all)"
    )
    parser.add_argument("--fresh", action="store_true", help="forget what was already finished")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--model", type=Path, default=MODEL, help="made there when missing")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the files go")
    arguments = parser.parse_args(argv)
    if arguments.workers < 1:
        parser.error("--workers must be at least 1")
    if any(lag < 0 for lag in arguments.lags or ()):
        parser.error("--lags must be 0 or more")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
