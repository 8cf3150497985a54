"""Shows the whole transcript at every turn, for agents that keep none themselves."""

from __future__ import annotations

from typing import Any, SupportsFloat

import gymnasium
from gymnasium.utils import RecordConstructorArgs

from at2po_env.errors import SnapshotError
from at2po_env.spaces import Text


class FullTranscript(gymnasium.Wrapper[str, str, str, str], RecordConstructorArgs):
    r"""The observation is everything so far: the prompt, then actions and observations in order.

    The new part stands in `info["new"]`. The transcript is state: a fork continues its own.

    Args:
        env: A text environment.
        max_length: Longest transcript in the observation space, in characters.

    Example:
        >>> from at2po_env import fork
        >>> from at2po_env.contract.testing import PigEnv
        >>> env = FullTranscript(PigEnv())
        >>> env.reset(seed=1)[0]
        'Say roll or hold.'
        >>> child = fork(env)
        >>> env.step("hold")[0]
        'Say roll or hold.holdYou hold 0 points.'
        >>> observation, _, _, _, info = child.step(" roll\n")
        >>> observation
        'Say roll or hold. roll\nYou rolled 3 and have 3 points.'
        >>> info["new"]
        'You rolled 3 and have 3 points.'
    """

    def __init__(self, env: gymnasium.Env[str, str], *, max_length: int = 10_000_000) -> None:
        RecordConstructorArgs.__init__(self, max_length=max_length)
        super().__init__(env)
        self.observation_space = Text(max_length)
        self._transcript = ""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Begin an episode; the transcript is the prompt."""
        self._transcript, info = self.env.reset(seed=seed, options=options)
        return self._transcript, {**info, "new": self._transcript}

    def step(self, action: str) -> tuple[str, SupportsFloat, bool, bool, dict[str, Any]]:
        """Take one turn; the transcript grows by the action and the observation."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._transcript += action + observation
        return self._transcript, reward, terminated, truncated, {**info, "new": observation}

    def get_state(self) -> str:
        """The transcript."""
        return self._transcript

    def set_state(self, state: str) -> None:
        """Continue a transcript."""
        if not isinstance(state, str):
            raise SnapshotError(f"FullTranscript continues from a text, got {type(state).__name__}")
        self._transcript = state
