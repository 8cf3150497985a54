"""Plays household games with TextWorld's PDDL engine, as ALFWorld sets it up; needs `make test-worlds`.

To save time, pure functions of the engine are remembered between calls, because each reset and each step
repeats them with the same texts: the translation of a problem (the second one, which only plans need, is left
out) and the parsing of grammar texts. Contexts of the grammar are copied by one level, since nothing in them
changes. None of this alters what the engine says.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import fast_downward
import textworld
from alfworld.agents.utils.misc import Demangler
from textworld.envs import PddlEnv
from textworld.envs.pddl import textgen


class Moment(NamedTuple):
    """What the engine shows after a command."""

    said: str
    commands: tuple[str, ...]
    reward: int
    done: bool


class Reference:
    """TextWorld's engine with a game loaded; `remember=False` leaves the engine as it is, to measure it."""

    def __init__(self, game: Mapping[str, Any], *, remember: bool = True) -> None:
        if remember:
            _remember()
        self.env = PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True))
        self.env.load(game)
        names = Demangler(game_infos=self.env._entity_infos)
        for info in self.env._entity_infos.values():
            info.name = names.demangle_alfred_name(info.id)

    def reset(self) -> Moment:
        state = self.env.reset()
        return Moment(state.feedback, tuple(state["admissible_commands"]), 0, bool(state["won"]))

    def step(self, command: str) -> Moment:
        state, reward, done = self.env.step(command)
        return Moment(state.feedback, tuple(state["admissible_commands"]), reward, bool(done))


@functools.cache
def _remember() -> None:
    translate = functools.cache(fast_downward.pddl2sas)
    fast_downward.pddl2sas = lambda domain, problem, **_: translate(domain, problem)
    parse = functools.cache(lambda text, rule: _parse(text, rule_name=rule))
    textgen._parse_and_convert = lambda text, rule_name, **_: deepcopy(parse(text, rule_name))
    query = textgen.Rule.parse_conjunctive_query
    textgen.Rule.parse_conjunctive_query = staticmethod(functools.cache(query))
    own = ("variables", "mapping")
    textgen.copy_context = lambda context: context | {key: dict(context[key]) for key in own}


_parse = textgen._parse_and_convert
