"""Where games come from: files as the original publishes them, and the generator.

A game file, `game.tw-pddl`, is JSON with the domain, the grammar and the problem. A file that cannot be
played is one `DataError` that names it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from at2po_env import Task, TaskSource
from at2po_env.errors import ConfigError, DataError
from at2po_envs.household.expert import plan
from at2po_envs.household.game import Game
from at2po_envs.household.pddl import FAMILIES, read_problem, write_problem
from at2po_envs.household.published import Words, read_domain, read_grammar, write_domain, write_grammar
from at2po_envs.household.rooms import SIZES, draw_game

FILE = "game.tw-pddl"
LARGEST = 20_000_000
PUBLISHED_SPLITS = ("train", "valid_seen", "valid_unseen", "valid_train")
SPLITS = ("train", "eval")
GAMES_PER_FAMILY = {"train": 100_000, "eval": 100}


class Games(TaskSource, Protocol):
    """Tasks, and the game of each."""

    def game(self, task_id: str) -> Game:
        """Return the game of a task; raise a `DataError` where there is none that can be played."""
        ...


class GeneratedGames:
    """Games drawn from seeds; the id of a task, "full/train/FAMILY/NUMBER", says which.

    Args:
        split: "train" or "eval"; they share no seed.
        families: The families to draw from, in turns.
        size: "full" or "small" rooms.
        words: The sentences.
    """

    def __init__(
        self,
        split: str = "train",
        families: Sequence[str] = FAMILIES,
        size: str = "full",
        words: Words = Words(),  # noqa: B008 - immutable
    ) -> None:
        if split not in SPLITS or size not in SIZES or not families or not set(families) <= set(FAMILIES):
            raise ConfigError(
                f"split={split!r}, size={size!r}, families={list(families)}: generated games have the splits "
                f"{', '.join(SPLITS)}, the sizes {', '.join(SIZES)} and the families {', '.join(FAMILIES)}"
            )
        self.split, self.families, self.size, self.words = split, tuple(families), size, words

    def __len__(self) -> int:
        """Return the number of games."""
        return len(self.families) * GAMES_PER_FAMILY[self.split]

    def __getitem__(self, index: int) -> Task:
        """Return the task at `index`."""
        number, family = divmod(range(len(self))[index], len(self.families))
        return self._task(self.families[family], number)

    def by_id(self, task_id: str) -> Task:
        """Return the task with this id."""
        return self._task(*self._read(task_id))

    def game(self, task_id: str) -> Game:
        """Return the game of a task."""
        return generated_game(self.size, self.split, *self._read(task_id), self.words)

    def _task(self, family: str, number: int) -> Task:
        game = generated_game(self.size, self.split, family, number, self.words)
        return Task(game.name, game.task, (), {"family": family})

    def _read(self, task_id: str) -> tuple[str, int]:
        size, split, family, number = (str(task_id).split("/") + [""] * 4)[:4]
        if (
            str(task_id).count("/") != 3
            or (size, split) != (self.size, self.split)
            or family not in self.families
            or not (number.isascii() and number.isdigit() and str(int(number)) == number)
            or int(number) >= GAMES_PER_FAMILY[self.split]
        ):
            raise DataError(
                f"no generated game {task_id!r:.120}. Expected {self.size}/{self.split}/FAMILY/NUMBER, "
                f"such as {self.size}/{self.split}/{self.families[0]}/0"
            )
        return family, int(number)


@functools.lru_cache(maxsize=1024)
def generated_game(size: str, split: str, family: str, number: int, words: Words) -> Game:
    """Return a generated game; equal arguments give equal games on every machine."""
    seeds = (SIZES.index(size), SPLITS.index(split), FAMILIES.index(family), number)
    problem, task = draw_game(family, size, np.random.default_rng(np.random.SeedSequence(seeds)))
    return Game(problem, words, task, f"{size}/{split}/{family}/{number}")


class GameFiles:
    """Published games: a folder is searched for `game.tw-pddl`, as the original does.

    Games with movable receptacles or sliced objects, and those that say that they cannot be solved, are left
    out. The id of a task is its folder. Files are read when they are played.

    Args:
        path: The folder, or one file.
        split: "train", "valid_seen" or "valid_unseen": the games below a folder of that name. Where no folder
            has such a name, all of them.

    Raises:
        DataError: There is no game.
    """

    def __init__(self, path: str | Path, split: str = "train") -> None:
        if split not in PUBLISHED_SPLITS:
            raise ConfigError(f"split={split!r}: expected one of {', '.join(PUBLISHED_SPLITS)}")
        root = Path(path)
        found = [root] if root.is_file() else sorted(root.rglob(FILE))
        if not found:
            raise DataError(f"{root}: no {FILE} in this folder or below it. Fix: `at2po data get alfworld`")
        # The folder itself may be that of a split.
        parts = {file: {*file.relative_to(root).parts, root.name} for file in found}
        if any(named & set(PUBLISHED_SPLITS) for named in parts.values()):
            found = [file for file in found if split in parts[file]]
        if not root.is_file():
            found = [file for file in found if "movable" not in str(file) and "Sliced" not in str(file)]
            found = [file for file in found if not _says_unsolvable(file)]
        if not found:
            raise DataError(f"{root}: no game of the split {split!r} that can be played")
        self.root = root
        self.files = {
            "game" if file == root else file.parent.relative_to(root).as_posix(): file for file in found
        }
        self._ids = tuple(self.files)

    def __len__(self) -> int:
        """Return the number of games."""
        return len(self._ids)

    def __getitem__(self, index: int) -> Task:
        """Return the task at `index`."""
        return self.by_id(self._ids[index])

    def by_id(self, task_id: str) -> Task:
        """Return the task with this id."""
        game = self.game(task_id)
        return Task(task_id, game.task, (), {"family": game.goal.family})

    def game(self, task_id: str) -> Game:
        """Return the game of a task."""
        file = self.files.get(task_id)
        if file is None:
            raise DataError(f"{self.root}: no game {task_id!r:.200}. It has {len(self)}: {self._ids[0]}, ...")
        return read_game(file, task_id)


def _says_unsolvable(file: Path) -> bool:
    """Look for the flag without reading the whole as JSON: there are thousands of files."""
    text = file.read_bytes()
    _, flag, rest = text.rpartition(b'"solvable"')
    return bool(flag) and rest.lstrip().lstrip(b":").lstrip().startswith(b"false")


@functools.lru_cache(maxsize=256)
def read_game(file: Path, name: str = "") -> Game:
    """Read a game file.

    Args:
        file: `game.tw-pddl`.
        name: The id of its task; the file by default.

    Raises:
        DataError: It is no game, is cut, does not play by the published rules, or cannot be solved.
    """
    try:
        if file.stat().st_size > LARGEST:
            raise DataError(f"{file}: has {file.stat().st_size} bytes. Expected a game of at most {LARGEST}")
        data: Any = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read as a game ({type(error).__name__}: {error})") from error
    texts: dict[str, str] = {}
    for key in ("pddl_domain", "grammar", "pddl_problem"):
        text = data.get(key) if isinstance(data, dict) else None
        if isinstance(text, str):
            texts[key] = text
        else:
            raise DataError(f"{file}: has no {key}. Expected JSON with pddl_domain, grammar and pddl_problem")
    helps = read_domain(texts["pddl_domain"], str(file))
    task, words = read_grammar(texts["grammar"], str(file), helps=helps)
    problem = read_problem(texts["pddl_problem"], str(file))
    try:
        game = Game(problem, words, task, name or str(file))
    except DataError as error:
        raise DataError(f"{file}: {error}") from error
    if plan(game.start) is None:
        raise DataError(f"{file}: cannot be solved: no plan reaches its goal, {' '.join(game.goal)}")
    return game


def game_data(game: Game) -> dict[str, Any]:
    """Return a game as the content of a game file, with the expert's plan as its walkthrough."""
    walkthrough = plan(game.start)
    return {
        "pddl_domain": write_domain(game.words),
        "grammar": write_grammar(game.task, game.words),
        "pddl_problem": write_problem(game.problem),
        "walkthrough": walkthrough,
        "solvable": walkthrough is not None,
    }


def write_game(game: Game, file: Path) -> None:
    """Write a game as a game file, which TextWorld plays too."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(game_data(game)), "utf-8")
