"""Measures at2po/WebShop-v0, and the original's text environment beside it.

    python -m benchmarks.webshop --json
    python -m benchmarks.webshop --json --dataset FOLDER --original CHECKOUT --original-python PYTHON

Both walk through the same episodes of six turns (search, open the first product, read its description, go
back, choose an option, buy), resets included. Steps are timed by the CPU clock of the thread, which leaves
out what other processes take. `steps_per_second` begins each round with nothing remembered: every search is
made and every page written; `steps_per_second_again` is of episodes played before. Start-up is a new
process, from its start to the first observation, with the index made before; its memory is that of the whole
process then. `fork_us` is one `fork` and one `restore`, `snapshot_us` one `snapshot`, after four turns.

The original's time of indexing is left out of its start-up, as ours is.

Without `--original` only ours is measured. What that program needs is said in
`benchmarks/webshop_original.py`.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import gymnasium
from at2po_envs.webshop.reward import token_set_ratio

import at2po_env
from at2po_env.data.cache import SAMPLE
from benchmarks._timing import Case, command_line, measure, repeat, report
from benchmarks.webshop_original import TURNS, next_command

STARTUP = """
import sys, time, warnings
warnings.simplefilter("ignore")
import gymnasium, at2po_env
env = gymnasium.make("at2po/WebShop-v0", **eval(sys.argv[2]))
env.reset(options={"index": 0})
seconds = time.time() - float(sys.argv[1])
from benchmarks.webshop_original import memory_mib
print(seconds, memory_mib())
"""


def main() -> None:
    """Measure and print."""
    parser = command_line(__doc__, rounds=7)
    parser.add_argument("--episodes", type=int, default=30, help="episodes of a round (default 30)")
    parser.add_argument("--dataset", default=str(SAMPLE / "webshop"), help="default: the shipped sample")
    parser.add_argument("--retriever", default="bm25", help="ours: bm25 (default) or lucene")
    parser.add_argument("--original", help="folder of a checkout of princeton-nlp/WebShop")
    parser.add_argument("--original-python", default=sys.executable, help="an interpreter for it")
    options = parser.parse_args()
    result = measure_ours(options)
    if options.original:
        original = measure_original(options)
        result |= {f"original_{name}": value for name, value in original.items()}
        result["steps_ratio"] = result["steps_per_second"] / original["steps_per_second"]
        result["startup_ratio"] = original["startup_s"] / result["startup_s"]
        result["memory_ratio"] = original["memory_mib"] / result["memory_mib"]
    report(result, options)


def measure_ours(options: argparse.Namespace) -> dict[str, Any]:
    """Start-up, memory, steps, forks."""
    arguments = {"dataset": options.dataset, "split": "all", "retriever": options.retriever}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env: Any = gymnasium.make("at2po/WebShop-v0", **arguments)
    walks = [walk(env, number) for number in range(min(options.episodes, len(env.unwrapped.tasks)))]
    command = [sys.executable, "-c", STARTUP]
    printed = subprocess.run(
        [*command, str(time.time()), repr(arguments)], capture_output=True, text=True, check=True
    ).stdout
    startup, memory = map(float, printed.split())

    def play() -> None:
        for number, commands in enumerate(walks):
            env.reset(options={"index": number})
            for one in commands:
                env.step(one)

    base = env.unwrapped

    def forget() -> None:
        for cached in (base._page, base.searcher.find, base.shop.product, base.goals.goal):
            cached.cache_clear()
        token_set_ratio.cache_clear()

    young = at2po_env.fork(env)
    young.reset(options={"index": 0})
    for one in walks[0][:4]:
        young.step(one)
    snap = at2po_env.snapshot(young)
    timings = measure(
        {
            "steps": Case(play, sum(map(len, walks)), prepare=forget),
            "steps_again": Case(play, sum(map(len, walks))),
            "fork": repeat(lambda: at2po_env.restore(at2po_env.fork(young), snap), 2_000),
            "snapshot": repeat(functools.partial(at2po_env.snapshot, young), 2_000),
        },
        rounds=options.rounds,
        clock=time.thread_time,
    )
    return {
        "startup_s": startup,
        "memory_mib": memory,
        "steps_per_second": 1 / timings["steps"].median,
        "steps_per_second_again": 1 / timings["steps_again"].median,
        "fork_us": timings["fork"].median * 1e6,
        "snapshot_us": timings["snapshot"].median * 1e6,
        "products": len(base.shop),
        "goals": len(base.tasks),
        "search": options.retriever,
        "nouns": base.nouns,
        "spread": {name: round(timing.spread, 4) for name, timing in timings.items()},
        "rounds": options.rounds,
    }


def walk(env: Any, number: int) -> list[str]:
    """Play an episode and return its actions."""
    _, info = env.reset(options={"index": number})
    question, actions = info["question"], []
    for turn in range(TURNS):
        names = [command[6:-1] for command in info["admissible_commands"] if command.startswith("click[")]
        actions.append(f"<action>{next_command(turn, question, names)}</action>")
        _, _, terminated, _, info = env.step(actions[-1])
        if terminated:
            break
    return actions


def measure_original(options: argparse.Namespace) -> dict[str, Any]:
    """Run the original in its own interpreter, on the same files."""
    from at2po_envs.webshop.products import find_sources

    sources = find_sources(options.dataset)
    with tempfile.TemporaryDirectory() as folder:
        nobody = Path(folder) / "items_human_ins.json"
        nobody.write_text("{}", "utf-8")
        command = [options.original_python, str(Path(__file__).with_name("webshop_original.py"))]
        command += ["--code", options.original, "--items", str(sources.items), "--mined", str(sources.mined)]
        command += ["--human", str(sources.human or nobody), "--episodes", str(options.episodes)]
        command += ["--goals", "human" if sources.human else "synthetic", "--began", str(time.time())]
        printed = subprocess.run(command, capture_output=True, text=True, check=False)
    if printed.returncode:
        sys.exit(f"the original does not run:\n{printed.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(printed.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
