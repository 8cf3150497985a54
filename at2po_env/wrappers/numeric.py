"""Shows numbers instead of text, for value-based agents and Stable-Baselines3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, SupportsFloat

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.spaces import Box, Discrete, MultiDiscrete

from at2po_env.errors import EnvError, SnapshotError

Choice = str | Callable[[str], str]
BYTES = 257


def encode_bytes(text: str) -> list[int]:
    """Return the UTF-8 bytes plus one, so that 0 is free for padding; lone surrogates are kept."""
    return [byte + 1 for byte in text.encode("utf-8", "surrogatepass")]


def decode_bytes(ids: Sequence[int]) -> str:
    """Invert `encode_bytes`; bytes that are not UTF-8 become U+FFFD."""
    return bytes([number - 1 for number in ids]).decode("utf-8", "replace")


class NumericView(gymnasium.Wrapper[Any, Any, str, str]):
    r"""Observations are fixed-length arrays of token ids; actions are numbers.

    An observation holds the newest `length` ids, at the end of the array; 0 fills the front. Put it over
    `FullTranscript` to show the whole episode. Actions are indices into `choices`, or without choices arrays
    of `action_length` ids, of which the first 0 ends the text.

    Over a world of commands, `action_masks` says which of the choices are possible.

    Args:
        env: A text environment.
        length: Ids per observation.
        choices: The actions to choose from: texts, or functions from the newest observation text to a text.
        action_length: Ids per action; used without choices.
        encode: Text to ids from 1 to `vocabulary - 1`. Default: UTF-8 bytes plus one.
        decode: Ids to text.
        vocabulary: Number of ids, 0 included.
        scaled: Observations are float32 from 0 to 1 instead of ids: better input for a plain MLP.

    Raises:
        EnvError: If sizes are not positive, or `encode` gives an id outside the vocabulary.

    Example:
        >>> from at2po_env.contract.testing import PigEnv
        >>> env = NumericView(PigEnv(), length=8, choices=["roll", "hold"])
        >>> env.reset(seed=1)[0]  # "or hold."
        array([112, 115,  33, 105, 112, 109, 101,  47], dtype=int32)
        >>> env.action_space
        Discrete(2)
        >>> env.step(1)[2]
        True
    """

    fork_config = ("choices", "_encode", "_decode")

    def __init__(
        self,
        env: gymnasium.Env[str, str],
        *,
        length: int = 512,
        choices: Sequence[Choice] | None = None,
        action_length: int = 128,
        encode: Callable[[str], Sequence[int]] = encode_bytes,
        decode: Callable[[Sequence[int]], str] = decode_bytes,
        vocabulary: int = BYTES,
        scaled: bool = False,
    ) -> None:
        super().__init__(env)
        if min(length, action_length, vocabulary - 1) < 1 or (choices is not None and not choices):
            raise EnvError(
                "NumericView needs length and action_length >= 1, vocabulary >= 2 and choices that are not "
                f"empty, got {length}, {action_length}, {vocabulary} and {choices}"
            )
        self.choices = None if choices is None else tuple(choices)
        self.length = length
        self.vocabulary = vocabulary
        self.scaled = scaled
        self._encode = encode
        self._decode = decode
        self._text = ""
        if scaled:
            self.observation_space = Box(0.0, 1.0, (length,), np.float32)
        else:
            self.observation_space = Box(0, vocabulary - 1, (length,), np.int32)
        self.action_space = (
            Discrete(len(self.choices)) if self.choices else MultiDiscrete([vocabulary] * action_length)
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[npt.NDArray[Any], dict[str, Any]]:
        """Begin an episode."""
        self._text, info = self.env.reset(seed=seed, options=options)
        return self.observe(self._text), info

    def step(self, action: Any) -> tuple[npt.NDArray[Any], SupportsFloat, bool, bool, dict[str, Any]]:
        """Take one turn; `info["action"]` is the text of the action."""
        written = self.write(action)
        self._text, reward, terminated, truncated, info = self.env.step(written)
        return self.observe(self._text), reward, terminated, truncated, {**info, "action": written}

    def observe(self, text: str) -> npt.NDArray[Any]:
        """Return the observation that shows `text`."""
        ids = np.asarray(self._encode(text)[-self.length :], dtype=np.int64)
        if ids.size and not 1 <= ids.min() <= ids.max() < self.vocabulary:
            raise EnvError(
                f"encode gave ids from {ids.min()} to {ids.max()}. Expected 1 to {self.vocabulary - 1}"
            )
        shown = np.zeros(self.length, np.int32)
        shown[self.length - ids.size :] = ids
        return (shown / np.float32(self.vocabulary - 1)).astype(np.float32) if self.scaled else shown

    def write(self, action: Any) -> str:
        """Return the text that an action stands for."""
        if self.choices is None:
            ids = np.asarray(action).tolist()
            return self._decode(ids[: ids.index(0)] if 0 in ids else ids)
        choice = self.choices[int(action)]
        return choice if isinstance(choice, str) else choice(self._text)

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Return which of the choices are possible now, as sb3-contrib's MaskablePPO asks for it.

        The environment says what is possible (`CommandEnv.admissible_commands`). Where it says nothing, or
        nothing that is among the choices, all of them are.

        Raises:
            EnvError: The view has no choices.
        """
        if self.choices is None:
            raise EnvError("action_masks needs choices: actions that are written freely cannot be masked")
        possible: tuple[str, ...] = ()
        if self.env.has_wrapper_attr("admissible_commands"):
            possible = self.env.get_wrapper_attr("admissible_commands")
        masks = np.array([self.write(number) in possible for number in range(len(self.choices))])
        return masks if masks.any() else np.ones_like(masks)

    def get_state(self) -> str:
        """The newest observation as text."""
        return self._text

    def set_state(self, state: str) -> None:
        """Continue after an observation."""
        if not isinstance(state, str):
            raise SnapshotError(f"NumericView continues from a text, got {type(state).__name__}")
        self._text = state
