"""The command line of the campaign; see the package."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from benchmarks import campaign
from benchmarks.campaign.damage import damaged_files
from benchmarks.campaign.disks import broken_disks
from benchmarks.campaign.network import hostile_clients, lying_servers
from benchmarks.campaign.runner import Campaign, Kind
from benchmarks.campaign.runs import kills
from benchmarks.campaign.snapshots import mutated_snapshots
from benchmarks.campaign.soak import soak
from benchmarks.campaign.text import hostile_code, hostile_texts

KINDS = {
    "kill": Kind(4_000, kills),
    "disk": Kind(500, broken_disks),
    "data": Kind(2_000, damaged_files),
    "server": Kind(5_000, lying_servers),
    "client": Kind(20_000, hostile_clients),
    "actions": Kind(200_000, hostile_texts),
    "tools": Kind(2_000, hostile_code),
    "snapshots": Kind(100_000, mutated_snapshots),
}


def main() -> None:
    """Run a campaign and print tries, failures and a command for each failure."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.campaign",
        description=campaign.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--minutes", type=float, help="time; without it until every kind has met its goal")
    parser.add_argument("--only", help="kinds, separated by commas (default: all but soak)")
    parser.add_argument("--tries", type=int, help="tries of each kind, in place of its goal")
    parser.add_argument("--seed", type=int, default=0, help="decides every try")
    parser.add_argument("--try", type=int, dest="number", help="do this one try, in this process")
    parser.add_argument(
        "--out", type=Path, help="folder of the state; one that holds a state is gone on with"
    )
    options = parser.parse_args()
    names = list(KINDS) if options.only is None else options.only.split(",")
    if unknown := set(names) - {*KINDS, "soak"}:
        parser.error(f"--only: got {', '.join(sorted(unknown))}, expected some of {', '.join(KINDS)}, soak")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="at2po-campaign-") as temporary:
        folder = options.out or Path(temporary)
        if names == ["soak"]:
            result = soak(folder / "soak", minutes=options.minutes or 60.0)
        elif options.number is not None:
            (name,) = names
            what = Campaign(Path(temporary), seed=options.seed).once(name, KINDS[name], options.number)
            result = {"kind": name, "try": options.number, "failures": [what] if what else []}
        else:
            kinds = {name: KINDS[name] for name in names}
            say = (lambda line: print(line, file=sys.stderr)) if options.json else print
            work = Campaign(folder, seed=options.seed, report=say)
            goals = None if options.tries is None else dict.fromkeys(kinds, options.tries)
            seconds = None if options.minutes is None else 60 * options.minutes
            work.run(kinds, goals=goals, seconds=seconds)
            result = work.result(kinds)
    print(json.dumps(result, indent=2) if options.json else _table(result))
    sys.exit(bool(result["failures"]))


def _table(result: dict[str, object]) -> str:
    """The result as lines."""
    kinds = result.get("kinds")
    if not isinstance(kinds, dict):
        return json.dumps(result, indent=2)
    head = f"{'kind':<10} {'tries':>9} {'goal':>9} {'failures':>9} {'seconds':>9}"
    rows = [
        f"{name:<10} {one['tries']:>9,} {one['goal']:>9,} {one['failures']:>9,} {one['seconds']:>9,.1f}"
        for name, one in kinds.items()
    ]
    return "\n".join([head, *rows])


if __name__ == "__main__":
    main()
