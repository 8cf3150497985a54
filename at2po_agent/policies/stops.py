"""Finds the end of a generation: stop strings in the text of sampled ids, without re-tokenising.

An id can complete a stop string only if its own piece holds the string or begins with one of its endings.
That set is computed once per stop string; only when such an id is sampled are the last few ids decoded.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from at2po_agent.transcripts.tokenizer import Tokenizer
from at2po_agent.types import BoolArray, StopReason

_REPLACEMENT = "\ufffd"  # what a piece of a split character decodes to


class StopTable:
    """Tells which ids may end a generation, per set of stop strings.

    Args:
        tokenizer: Decodes ids.
        vocab_size: Ids that the model can sample.
        eos_ids: Ids that always end a generation.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._eos_ids = frozenset(eos_ids)
        self._vocab_size = vocab_size
        self._pieces: list[str] = []
        self._number: dict[tuple[str, ...], int] = {}
        self._stops: list[tuple[str, ...]] = []
        self.candidates: BoolArray = np.zeros((0, vocab_size), dtype=np.bool_)

    def number(self, stop: tuple[str, ...]) -> int:
        """Row of `candidates` (bool[sets, V]: may this id end a generation?) for a set of stop strings."""
        if stop not in self._number:
            self._number[stop] = len(self._stops)
            self._stops.append(stop)
            self.candidates = np.concatenate([self.candidates, self._row(stop)[None]])
        return self._number[stop]

    def ends(self, number: int, ids: Sequence[int]) -> StopReason | None:
        """Return why the last id ends the generation: `eos`, `stop`, or None when it goes on."""
        if ids[-1] in self._eos_ids:
            return "eos"
        for mark in self._stops[number]:
            # Every id but those of split characters (at most 4 bytes) and empty pieces decodes to one
            # character or more, so this tail holds the string and one id of context.
            tail = ids[-(4 * len(mark) + 4) :]
            if mark in self._tokenizer.decode(tail):
                return "stop"
        return None

    def _row(self, stop: tuple[str, ...]) -> BoolArray:
        row = np.zeros(self._vocab_size, dtype=np.bool_)
        row[[token for token in self._eos_ids if token < self._vocab_size]] = True
        if stop and not self._pieces:
            self._pieces = _pieces(self._tokenizer, self._vocab_size)
        for mark in stop:
            endings = tuple(mark[start:] for start in range(len(mark)))
            split = not mark.isascii()
            for token, piece in enumerate(self._pieces):
                # Some decoders drop the space that begins a text, so the piece may follow one.
                spaced = f" {piece}"
                completes = piece.startswith(endings) or spaced.startswith(endings) or mark in spaced
                if completes or (split and _REPLACEMENT in piece):
                    row[token] = True
        return row


def _pieces(tokenizer: Tokenizer, count: int) -> list[str]:
    """The text of each id; at once where the tokenizer can."""
    if isinstance(tokenizer, _Piecewise):
        return tokenizer.pieces(count)
    return [tokenizer.decode([token]) for token in range(count)]


@runtime_checkable
class _Piecewise(Protocol):
    def pieces(self, count: int) -> list[str]: ...
