"""A text space that accepts any text a policy can write.

`gymnasium.spaces.Text` rejects spaces, punctuation and the empty string by default, and its full-Unicode
charset pickles to 46 MB. This one checks the type and the length, and samples short printable ASCII.
"""

from __future__ import annotations

import string
from collections.abc import Iterable
from typing import Any

from gymnasium import Space
from gymnasium.wrappers.utils import create_zero_array

from at2po_env.errors import EnvError

ALPHABET = string.ascii_letters + string.digits + string.punctuation + " \n"
MAX_SAMPLE = 64


class Text(Space[str]):
    """Every `str` of at most `max_length` characters, the empty one included.

    Args:
        max_length: Longest text in the space, in characters.
        seed: Seed of the sampler.

    Example:
        >>> space = Text(max_length=8, seed=0)
        >>> "käse" in space, "" in space, "a" * 9 in space, b"bytes" in space
        (True, True, False, False)
    """

    def __init__(self, max_length: int = 1_000_000, *, seed: int | None = None) -> None:
        if max_length < 0:
            raise EnvError(f"Text needs max_length >= 0, got {max_length}")
        self.max_length = max_length
        super().__init__(dtype=str, seed=seed)

    @property
    def is_np_flattenable(self) -> bool:
        """Whether samples flatten to a fixed-size array: never."""
        return False

    def sample(self, mask: Any | None = None, probability: Any | None = None) -> str:
        """Draw printable ASCII of at most 64 characters; masks are refused, text has no finite support."""
        if mask is not None or probability is not None:
            raise EnvError("Text.sample takes no mask and no probability: the space has no finite support")
        length = int(self.np_random.integers(min(self.max_length, MAX_SAMPLE) + 1))
        picks = self.np_random.integers(len(ALPHABET), size=length)
        return "".join([ALPHABET[pick] for pick in picks])

    def contains(self, x: Any) -> bool:
        """Whether `x` is a string that is not too long."""
        return isinstance(x, str) and len(x) <= self.max_length

    def to_jsonable(self, sample_n: Iterable[str]) -> list[str]:
        """Texts are their own JSON."""
        return list(sample_n)

    def from_jsonable(self, sample_n: list[Any]) -> list[str]:
        """Inverse of `to_jsonable`."""
        return [str(sample) for sample in sample_n]

    def __repr__(self) -> str:
        return f"Text(max_length={self.max_length})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Text) and self.max_length == other.max_length

    def __hash__(self) -> int:
        return hash((Text, self.max_length))


@create_zero_array.register(Text)
def _zero_text(space: Text) -> str:  # type: ignore[misc]  # its fallback is generic: the relation is hidden
    """What Gymnasium's delaying and stacking wrappers pad with."""
    del space
    return ""
