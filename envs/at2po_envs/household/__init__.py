"""ALFWorld's household in text, published and generated games.

Read `pddl` (a problem), `published` (rules and sentences), `game` (a game and one moment of it), `world`
(what commands do), `expert`, `rooms` (games from a seed), `games` (files and sources), `env`.
"""

from at2po_envs.household.env import make, make_vector

__all__ = ["make", "make_vector"]
