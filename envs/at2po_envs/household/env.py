"""The household as an environment: `at2po/Household-v0`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from at2po_env import CommandEnv, CommandResult, Task, TextVectorEnv, vector
from at2po_env.data import cache_dir
from at2po_env.episodes.command_env import FORMAT
from at2po_env.errors import ConfigError, EnvError
from at2po_envs.household import world
from at2po_envs.household.expert import plan
from at2po_envs.household.game import Household
from at2po_envs.household.games import SPLITS, GameFiles, Games, GeneratedGames
from at2po_envs.household.pddl import FAMILIES
from at2po_envs.household.published import Words

INSTRUCTIONS = f"""You are in a household and have a task. You act by commands: go to, open, close, take,
{{put}}, use, heat, clean, cool, slice, examine, look, inventory, help.
{FORMAT}
Your task is to: {{question}}.
"""

SETS = ("opened", "clean", "hot", "cool", "toggled", "sliced")


class HouseholdEnv(CommandEnv):
    """ALFWorld's text games: find, change and bring things in a household.

    Args:
        games: Where games come from.
        max_turns: Turns of an episode; the original has 50.
        instructions: A template with `{question}`. Default: the commands, and how to write a turn.
        **options: `show_commands` and `render_mode` of `CommandEnv`.
    """

    def __init__(
        self, games: Games, *, max_turns: int = 50, instructions: str | None = None, **options: Any
    ) -> None:
        if instructions is None:
            put = "put" if isinstance(games, GeneratedGames) and games.words.puts else "move"
            instructions = INSTRUCTIONS.replace("{put}", put)
        super().__init__(tasks=games, instructions=instructions, max_turns=max_turns, **options)
        self.games = games

    def begin(self, task: Task) -> tuple[Household, str]:
        """Return the first moment of a task's game."""
        state = self.games.game(task.id).start
        return state, world.first_words(state)

    def obey(self, state: Household, command: str) -> CommandResult:
        """Return what a command does; the reward is 1 at the goal."""
        after, said, possible = world.obey(state, command)
        won = world.is_won(after)
        metrics = {"success": 1.0} if won else {}
        return CommandResult(after, said, float(won), terminated=won, valid=possible, metrics=metrics)

    def commands(self, state: Household) -> Sequence[str]:
        """Return the commands that are possible, sorted."""
        return world.possible_commands(state)

    def expert_commands(self) -> list[str] | None:
        """Return commands that solve the game from here, with full knowledge; None where none do."""
        return None if self._state is None else plan(self._state.world)

    def conceivable_commands(self) -> tuple[str, ...]:
        """Return every command that may become possible in the present game: choices of a `NumericView`.

        Raises:
            EnvError: No episode is running.
        """
        if self._state is None:
            raise EnvError("no episode is running. Fix: call reset first")
        return world.conceivable_commands(self._state.world.game)

    def dump_world(self, state: Household) -> Any:
        """Return a moment as JSON; the game goes in by name."""
        return {
            "game": state.game.name,
            "at": state.at,
            "holding": state.holding,
            "contents": [list(inside) for inside in state.contents],
            "lying": sorted(map(list, state.lying)),
            "taken": sorted(map(list, state.taken)),
            **{name: hex(getattr(state, name)) for name in SETS},
        }

    def load_world(self, data: Any) -> Household:
        """Return the moment that `dump_world` wrote.

        Raises:
            DataError: There is no such game.
            ValueError: It is no moment of that game.
        """
        game = self.games.game(data["game"])
        contents = tuple(tuple(inside) for inside in data["contents"])
        lying = [(thing, place) for thing, place in data["lying"]]
        taken = [(thing, receptacle) for thing, receptacle in data["taken"]]
        ranges = [
            ([data["holding"]], -1, len(game.objects)),
            ([data["at"], *(place for _, place in lying)], 0, len(game.places)),
            ([receptacle for _, receptacle in taken], 0, len(game.receptacles)),
            ([thing for thing, _ in [*lying, *taken]], 0, len(game.objects)),
            (list(chain(*contents)), 0, len(game.objects)),
        ]
        for numbers, low, high in ranges:
            if any(type(number) is not int or not low <= number < high for number in numbers):
                raise ValueError(f"a number beyond {low} to {high - 1}")
        if len(contents) != len(game.receptacles) or any(
            list(inside) != sorted(set(inside)) for inside in contents
        ):
            raise ValueError("the contents do not fit the receptacles of the game")
        sets = {name: int(data[name], 16) for name in SETS}
        for name, value in sets.items():
            if not 0 <= value < 1 << len(game.receptacles if name == "opened" else game.objects):
                raise ValueError(f"{name} has a bit beyond its objects")
        return Household(
            game, data["at"], data["holding"], contents, frozenset(lying), frozenset(taken), **sets
        )

    def example_actions(self) -> Sequence[str]:
        """Return the expert's commands, written in both ways, and one that is not possible."""
        commands = self.expert_commands() or ["look"]
        return [f"<think>Next.</think><action>{commands[0]}</action>", "fly away", *commands[1:], "inventory"]


def make(
    *,
    dataset: str | Path | None = None,
    games: str | None = None,
    split: str = "train",
    families: Sequence[str] = FAMILIES,
    size: str = "full",
    wording: str = "move",
    **options: Any,
) -> HouseholdEnv:
    """Make the household.

    Args:
        dataset: A folder of published games, or one `game.tw-pddl`.
        games: "generated" or "published"; by default published games if `dataset` is given, else generated.
            Published games without `dataset` are those in the cache (`at2po data get alfworld`).
        split: Generated: "train" or "eval". Published: "train", "valid_seen" or "valid_unseen".
        families: The task families of generated games.
        size: "full" or "small" rooms of generated games.
        wording: Generated games say "move X to Y" (version 2.1.2) or "put X in/on Y" (2.1.1). Published games
            have their own words.
        **options: max_turns, instructions, show_commands and render_mode of `HouseholdEnv`.

    Raises:
        ConfigError, DataError: There are no such games.
    """
    source = games or ("generated" if dataset is None else "published")
    if source == "published":
        if tuple(families) != FAMILIES or size != "full" or wording != "move":
            raise ConfigError(
                "families, size and wording choose generated games; published ones have their own"
            )
        return HouseholdEnv(GameFiles(dataset or cache_dir() / "datasets/alfworld", split), **options)
    if source != "generated" or dataset is not None or wording not in ("move", "put") or split not in SPLITS:
        raise ConfigError(
            f"games={games!r}, dataset={dataset!r}, split={split!r}, wording={wording!r}: expected games "
            "'generated' (without dataset, split 'train' or 'eval', wording 'move' or 'put') or 'published'"
        )
    words = Words(puts=wording == "put")
    return HouseholdEnv(GeneratedGames(split, tuple(families), size, words), **options)


def make_vector(**options: Any) -> TextVectorEnv:
    """Build many, stepped concurrently."""
    return vector.make_vector(make, **options)
