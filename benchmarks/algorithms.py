"""Races every algorithm from the same cold start, at the same budget of sampled tokens.

    python -m benchmarks.algorithms --out FOLDER --tune --seeds 0
    python -m benchmarks.algorithms --out FOLDER --seeds 0 1 2 3 4 --report docs/results

The first command tries three learning rates for every method that has one of its own, on seeds that are not
reported (from 100 on). The second trains every row at the rate that was best there, by mean sampled exact
match on the way (`--rate` gives all rows one rate instead), and writes `algorithms.csv` (a row per run),
`algorithms_curve.csv`, `algorithms.md` (means with 95% intervals), `tuning.csv` and `algorithms.png`.

Both train the runs that FOLDER does not have yet, two at a time with one thread each, and write one JSON file
per finished run, so they can be stopped at any time. The task and the model are those of `race.yaml`:
MiniWiki, two and three hops, sparse success at the start. `--study NAME --set KEY=VALUE ...` keeps runs with
other settings apart; `--task KEY=VALUE ...` changes cold start and training, and wants a FOLDER of its own.
`--studies FOLDER ... --report docs/results` writes `studies.csv` and `studies.md` of all such runs, and runs
nothing.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks._runs import make_runs
from benchmarks.race import METHODS, jobs_to_do, prepare, results_folder, work
from benchmarks.race_report import write_report, write_studies


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("runs/race"), help="folder of cold start and results"
    )
    parser.add_argument("--report", type=Path, help="write the report there; alone with --jobs 0")
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--budget", type=int, default=60_000, help="sampled tokens of a run")
    parser.add_argument("--rate", type=float, help="one learning rate for all rows (default: the tuned ones)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--tune", action="store_true", help="learning rates on seeds of their own")
    parser.add_argument("--study", help="keep these runs apart, under this name")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of a study's runs"
    )
    parser.add_argument(
        "--task", nargs="*", default=[], metavar="KEY=VALUE", help="task and cold start of this folder"
    )
    parser.add_argument(
        "--studies", nargs="+", type=Path, metavar="FOLDER", help="report the studies of these folders"
    )
    options = parser.parse_args(arguments)
    if options.studies and not options.report:
        parser.error("--studies needs --report FOLDER to write to")
    if options.set and not options.study:
        parser.error("--set makes other runs than the race's: name them with --study")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then report."""
    options = parse(arguments)
    if options.studies:
        write_studies(options.studies, options.report)
        return
    if options.jobs:
        start = prepare(options.out, options.task)
        jobs = jobs_to_do(options, start)
        print(f"{len(jobs)} runs to do")
        make_runs(work, jobs, options.jobs)
    if options.report is not None:
        write_report(results_folder(options), options.report, tuning=options.out / "tuning")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
