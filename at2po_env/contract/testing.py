"""Offers authors of environments a contract to inherit, and the smallest complete environment to copy.

A class in a test file

    class TestMyEnv(EnvContract):
        def make_env(self):
            return gymnasium.make("my/Env-v0")

runs every check of the fork contract as a test of its own. Written for pytest, which nothing here imports.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

from at2po_env.contract import rules
from at2po_env.contract.checker import check_gymnasium, check_process, play_for
from at2po_env.contract.rules import Env, Play
from at2po_env.errors import EnvError
from at2po_env.forking.base import ForkableEnv
from at2po_env.spaces import Text


def _test(check: Callable[[Env, Play], None]) -> Callable[[EnvContract], None]:
    """Return the test that a new environment keeps a rule."""

    def test(self: EnvContract) -> None:
        env = self.make_env()
        play = play_for(env, actions=self.actions, options=self.options, ignore_info=self.ignore_info)
        check(env, play)

    return test


class EnvContract:
    """Inherit, implement `make_env`, and get every contract test.

    Attributes:
        actions: Useful actions in order; by default the environment's `example_actions`.
        options: Options of every reset.
        ignore_info: Keys of `info` that may differ between two runs, such as clocks.
        another_process: `True`: it must be restorable in another process; `None`: if it can be built there.
    """

    actions: ClassVar[Sequence[Any] | None] = None
    options: ClassVar[dict[str, Any] | None] = None
    ignore_info: ClassVar[Collection[str]] = ()
    another_process: ClassVar[bool | None] = None

    def make_env(self) -> Env:
        """Return a new environment; called once per test."""
        raise NotImplementedError("EnvContract needs make_env: return a new environment there")

    test_follows_gymnasium = _test(lambda env, _: check_gymnasium(env))
    test_observations_lie_in_their_space = _test(rules.check_spaces)
    test_a_seed_gives_one_episode = _test(rules.check_deterministic)
    test_fork_is_the_same_episode = _test(rules.check_fork)
    test_forks_are_independent = _test(rules.check_independence)
    test_restore_rewinds = _test(rules.check_restore)
    test_snapshot_survives_json = _test(rules.check_json)
    test_copies_keep_the_episode = _test(rules.check_copies)
    test_generators_are_independent = _test(rules.check_generators)
    test_any_text_is_an_action = _test(rules.check_bad_actions)

    def test_snapshot_fits_another_process(self) -> None:
        """A snapshot restored in another process gives the same episode."""
        check = partial(check_process, required=self.another_process)
        _test(check)(self)


class PigState(NamedTuple):
    """A game of Pig: the points so far, the turns taken, and whether it is over."""

    points: int = 0
    turn: int = 0
    over: bool = True


class PigEnv(ForkableEnv):
    """The dice game Pig as text: `roll` adds a die to the points, a 1 loses them all, `hold` ends the game.

    The reward at the end is the points, at most 100, divided by 100. The smallest complete `ForkableEnv`: the
    episode is one immutable value, randomness comes from `np_random`, any other text is a recorded outcome.

    Args:
        max_turns: The game is truncated after so many turns.
        render_mode: `None` or "ansi".

    Example:
        >>> from at2po_env.forking.base import fork
        >>> env = PigEnv()
        >>> env.reset(seed=1)[0]
        'Say roll or hold.'
        >>> child = fork(env)
        >>> env.step("roll")[0], child.step("roll")[0]
        ('You rolled 3 and have 3 points.', 'You rolled 3 and have 3 points.')
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 1}  # noqa: RUF012  (Gymnasium's own shape)

    def __init__(self, *, max_turns: int = 20, render_mode: str | None = None) -> None:
        self.action_space = Text()
        self.observation_space = Text()
        self.max_turns = max_turns
        self.render_mode = render_mode
        self._game = PigState()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Begin a game."""
        super().reset(seed=seed, options=options)
        self._game = PigState(over=False)
        return "Say roll or hold.", {"turn": 0}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Play one turn."""
        points, turn, over = self._game
        if over:
            raise EnvError("The game is over. Fix: call reset before step")
        word = action.strip().lower()
        if word == "roll":
            die = int(self.np_random.integers(1, 7))
            points = 0 if die == 1 else points + die
            text = f"You rolled {die} and have {points} points."
        else:
            text = f"You hold {points} points." if word == "hold" else "Say roll or hold."
        terminated = word == "hold"
        truncated = not terminated and turn + 1 >= self.max_turns
        self._game = PigState(points, turn + 1, terminated or truncated)
        reward = min(points, 100) / 100 if self._game.over else 0.0
        return text, reward, terminated, truncated, {"turn": turn + 1}

    def render(self) -> str:
        """Show the game as one line."""
        return f"turn {self._game.turn}: {self._game.points} points"

    def get_state(self) -> PigState:
        """The game."""
        return self._game

    def set_state(self, state: PigState) -> None:
        """Continue from a game."""
        self._game = state

    def dump_state(self, state: PigState) -> list[Any]:
        """The game as a list."""
        return list(state)

    def load_state(self, data: Any) -> PigState:
        """Inverse of `dump_state`."""
        points, turn, over = data
        if not (type(points) is int and type(turn) is int and type(over) is bool):
            raise ValueError(f"a game is [points, turn, over], got {data!r:.80}")
        return PigState(points, turn, over)

    def example_actions(self) -> list[str]:
        """Some rolls, a slip of the tongue, and the end."""
        return ["roll", "roll again?", "roll", "roll", "hold"]
