"""Measures the household beside TextWorld's PDDL engine, on the same games and the same commands.

    make test-worlds                                      # once: makes .venv-worlds
    .venv-worlds/bin/python -m benchmarks.household --json

Both play generated games of all six families in rooms of the published size, from the same `game.tw-pddl`
files. A step of ours is a whole `env.step` with reading the command, the transcript and the list of possible
commands; a step of TextWorld's is `env.step` of `PddlEnv`, with names as ALFWorld gives them and with
`admissible_commands`, which ALFWorld asks for too. Cases take turns. Start-up and memory are those of new
processes: from the start of Python to the first observation, peak memory (read as Linux shows it) with one
game and with nine held. Where TextWorld is not installed, ours is measured alone. TextWorld cannot fork.
"""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
from at2po_envs.household.games import generated_game, write_game
from at2po_envs.household.pddl import FAMILIES
from at2po_envs.household.published import Words
from at2po_envs.household.world import is_won, obey, possible_commands

import at2po_env
from benchmarks._timing import Case, command_line, measure, repeat, report

WALK = 20
OURS = r"""
import re, sys, gymnasium, at2po_env
envs = []
for file in sys.argv[1:]:
    env = gymnasium.make("at2po/Household-v0", dataset=file)
    env.reset(seed=0)
    envs.append(env)
print(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])
"""
THEIRS = r"""
import re, sys, warnings
warnings.simplefilter("ignore")
from benchmarks.household import textworld_game
envs = []
for file in sys.argv[1:]:
    env = textworld_game(file)
    env.reset()
    envs.append(env)
print(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])
"""


def textworld_game(file: str) -> Any:
    """Load a game into TextWorld's engine, with names as ALFWorld gives them."""
    import textworld
    from alfworld.agents.utils.misc import Demangler
    from textworld.envs import PddlEnv

    arguments = list(sys.argv)
    env = PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True))
    env.load(file)
    sys.argv = arguments  # the planner's translation replaces them
    names = Demangler(game_infos=env._entity_infos)
    for info in env._entity_infos.values():
        info.name = names.demangle_alfred_name(info.id)
    return env


def write_games(folder: Path) -> list[tuple[Path, list[str]]]:
    """Write a game of each family, and a walk in it that does not reach the goal."""
    games = []
    for number, family in enumerate(FAMILIES):
        game = generated_game("full", "train", family, number, Words())
        file = folder / family / "game.tw-pddl"
        write_game(game, file)
        rng, state, walk = random.Random(number), game.start, list[str]()
        while len(walk) < WALK:
            command = rng.choice(possible_commands(state))
            after = obey(state, command).state
            if not is_won(after):
                state = after
                walk.append(command)
        games.append((file, walk))
    return games


def walks(plays: list[Any]) -> Callable[[], None]:
    """Return a function that takes the walk of each environment."""

    def run() -> None:
        for _, step, walk in plays:
            for command in walk:
                step(command)

    return run


def cases_of(games: list[tuple[Path, list[str]]], *, with_textworld: bool) -> dict[str, Case]:
    """Return the timed cases; resets are not part of a step."""
    ours, theirs = [], []
    for file, walk in games:
        env = gymnasium.make("at2po/Household-v0", dataset=str(file), max_turns=10**9)
        ours.append((env.reset, env.step, walk))
        if with_textworld:
            engine = textworld_game(str(file))
            theirs.append((engine.reset, engine.step, walk))

    def begin(plays: list[Any]) -> Callable[[], None]:
        def run() -> None:
            for reset, *_ in plays:
                reset()

        return run

    steps = len(games) * WALK
    young, old = (gymnasium.make("at2po/Household-v0") for _ in range(2))
    young.reset(seed=0)
    old.reset(seed=0)
    for number in range(40):
        old.step(f"<think>{number}</think><action>look</action>")
    cases = {
        "steps": Case(walks(ours), steps, begin(ours)),
        "reset": Case(begin(ours), len(games)),
        "fork_turn0": repeat(lambda: at2po_env.fork(young), 2_000),
        "fork_turn40": repeat(lambda: at2po_env.fork(old), 2_000),
    }
    if with_textworld:
        cases["textworld_steps"] = Case(walks(theirs), steps, begin(theirs))
        cases["textworld_reset"] = Case(begin(theirs), len(games))
    return cases


def new_process(program: str, files: list[Path]) -> tuple[float, float]:
    """Return the seconds of a process until the first observation of these games, and its peak MiB."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, files)], capture_output=True, text=True, check=True
    )
    return time.perf_counter() - began, int(done.stdout.split()[-1]) / 1024


def main() -> None:
    """Measure and print."""
    options = command_line(__doc__, rounds=3).parse_args()
    there = all(importlib.util.find_spec(name) for name in ("textworld", "fast_downward", "alfworld"))
    result: dict[str, Any] = {"rounds": options.rounds, "textworld": there}
    with tempfile.TemporaryDirectory() as folder:
        games = write_games(Path(folder))
        timings = measure(cases_of(games, with_textworld=there), rounds=options.rounds, warmup=1)
        files = [file for file, _ in games]
        programs = {"": OURS, **({"textworld_": THEIRS} if there else {})}
        runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in programs}
        for _ in range(3):
            for name, program in programs.items():
                seconds, one = new_process(program, files[:1])
                _, nine = new_process(program, [*files, *files[:3]])
                runs[name].append((seconds, one, nine))
    for name in programs:
        seconds, one, nine = sorted(runs[name])[1]
        result[f"{name}startup_s"], result[f"{name}peak_mib"] = seconds, one
        result[f"{name}mib_per_further_game"] = (nine - one) / 8
        result[f"{name}steps_per_second"] = 1 / timings[f"{name}steps"].median
        result[f"{name}reset_ms"] = timings[f"{name}reset"].median * 1e3
    for turn in (0, 40):
        result[f"fork_us_turn{turn}"] = timings[f"fork_turn{turn}"].median * 1e6
    if there:
        result["times_as_fast"] = result["steps_per_second"] / result["textworld_steps_per_second"]
    result["spread"] = {name: round(one.spread, 3) for name, one in timings.items()}
    report(result, options)


if __name__ == "__main__":
    main()
