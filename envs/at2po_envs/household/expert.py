"""Finds the commands that solve a game from any moment of it, with full knowledge of where things are.

The plan is built from errands: put away what is in the way, fetch an object, have it cleaned, heated or
cooled, bring it. Every choice of object and receptacle is tried, every plan is played by the rules, and the
shortest that reaches the goal is the answer. So a plan is always right; where there is none of this form,
there is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import permutations

from at2po_envs.household.game import NOWHERE, Household
from at2po_envs.household.world import is_won, obey, put_command, reachable

_MADE = {
    "pick_clean_then_place_in_recep": "clean",
    "pick_heat_then_place_in_recep": "heat",
    "pick_cool_then_place_in_recep": "cool",
}


def plan(state: Household) -> list[str] | None:
    """Return the shortest plan of errands, [] where the goal is reached, or None where there is none."""
    if is_won(state):
        return []
    best: list[str] | None = None
    for errand in _errands(state):
        if errand.won and (best is None or len(errand.commands) < len(best)):
            best = errand.commands
    return best


class Errand:
    """Commands and the moment that they lead to; `failed` once one of them is not possible."""

    def __init__(self, state: Household) -> None:
        self.state = state
        self.commands: list[str] = []
        self.failed = False

    @property
    def won(self) -> bool:
        """Whether the goal is reached."""
        return not self.failed and is_won(self.state)

    def do(self, command: str) -> None:
        """Give a command."""
        if self.failed:
            return
        after = obey(self.state, command)
        self.failed = not after.possible
        self.state = after.state
        self.commands.append(command)

    def visit(self, receptacle: int, *, opened: bool = True) -> None:
        """Go to a receptacle, and open it if that is needed to use it."""
        game = self.state.game
        name = game.receptacle_names[receptacle]
        if game.place_of[receptacle] != self.state.at:
            self.do(f"go to {name}")
        if opened and not self.failed and not reachable(self.state, receptacle):
            self.do(f"open {name}")

    def take(self, thing: int, source: int) -> None:
        """Fetch an object with an empty hand."""
        self.visit(source)
        game = self.state.game
        self.do(f"take {game.object_names[thing]} from {game.receptacle_names[source]}")

    def put(self, target: int) -> None:
        """Bring what is held."""
        self.visit(target)
        game = self.state.game
        if not self.failed:
            thing, there = game.object_names[self.state.holding], game.receptacle_names[target]
            self.do(put_command(game.words, thing, there))


def _errands(state: Household) -> Iterator[Errand]:
    """Yield every plan of this form; those that do not reach the goal are for the caller to leave out."""
    game = state.game
    family = game.goal.family
    for cleared in _with_free_hand(state):
        if family == "look_at_obj_in_light":
            lamps = [(lamp, home) for lamp in game.goal_targets for home in _homes(cleared.state, lamp)]
            for fetched in _each_fetched(cleared, game.goal_objects):
                for lamp, home in lamps:
                    errand = _again(fetched)
                    errand.visit(home, opened=False)
                    if not errand.won:
                        errand.do(f"use {game.object_names[lamp]}")
                    yield errand
            continue
        for target in game.goal_targets:
            if family == "pick_two_obj_and_place":
                yield from _bring_two(cleared, target)
            else:
                yield from _bring_one(cleared, target, _MADE.get(family))


def _bring_one(cleared: Errand, target: int, verb: str | None) -> Iterator[Errand]:
    """Bring an object to a receptacle, made clean, hot or cool on the way if that is asked."""
    game = cleared.state.game
    fit = [o for o in game.goal_objects if verb is None or game.fit_for[verb] >> o & 1]
    for fetched in _each_fetched(cleared, fit):
        thing = fetched.state.holding
        made = {"clean": fetched.state.clean, "heat": fetched.state.hot, "cool": fetched.state.cool}
        if verb is None or made[verb] >> thing & 1:
            errands = [_again(fetched)]
        else:
            errands = []
            for server in [n for n, serves in enumerate(game.serves[verb]) if serves]:
                errand = _again(fetched)
                errand.visit(server, opened=False)
                errand.do(f"{verb} {game.object_names[thing]} with {game.receptacle_names[server]}")
                errands.append(errand)
        for errand in errands:
            errand.put(target)
            yield errand


def _bring_two(cleared: Errand, target: int) -> Iterator[Errand]:
    """Bring objects to a receptacle until two of them are there."""
    inside = set(cleared.state.contents[target])
    outside = [o for o in cleared.state.game.goal_objects if o not in inside]
    missing = 2 - (len(cleared.state.game.goal_objects) - len(outside))
    held = cleared.state.holding
    for chosen in permutations(outside, max(missing, 1)):
        if held in outside and chosen[0] != held:
            continue
        errand = _again(cleared)
        for thing in chosen:
            if errand.state.holding != thing:
                home = next(iter(_homes(errand.state, thing)), None)
                if home is None:
                    errand.failed = True
                    break
                errand.take(thing, home)
            errand.put(target)
        yield errand


def _with_free_hand(state: Household) -> Iterator[Errand]:
    """Yield the moment as it is, if the hand is free or holds what is asked for; and with a freed hand."""
    game = state.game
    if state.holding == NOWHERE or state.holding in game.goal_objects:
        yield Errand(state)
    if state.holding != NOWHERE:
        where = [n for n, accepts in enumerate(game.accepts) if accepts >> state.holding & 1]
        # The cheapest places are as good as any other: nothing else depends on where it lies.
        for receptacle in sorted(
            where, key=lambda n: (game.place_of[n] != state.at, not reachable(state, n))
        )[:3]:
            errand = Errand(state)
            errand.put(receptacle)
            if not errand.failed:
                yield errand


def _each_fetched(cleared: Errand, wanted: Iterable[int]) -> Iterator[Errand]:
    """Yield the errand with each of the wanted objects in hand."""
    for thing in wanted:
        if cleared.state.holding == thing:
            yield _again(cleared)
        elif cleared.state.holding == NOWHERE:
            for home in _homes(cleared.state, thing):
                errand = _again(cleared)
                errand.take(thing, home)
                if not errand.failed:
                    yield errand


def _homes(state: Household, thing: int) -> list[int]:
    """Return the receptacles that an object is in, as far as one can go there."""
    places = zip(state.contents, state.game.place_of, strict=True)
    return [number for number, (inside, place) in enumerate(places) if thing in inside and place != NOWHERE]


def _again(errand: Errand) -> Errand:
    copy = Errand(errand.state)
    copy.commands, copy.failed = list(errand.commands), errand.failed
    return copy
