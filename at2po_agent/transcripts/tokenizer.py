"""Declares tokenizers, and adapts fast tokenizers of Hugging Face.

Encoding adds no special tokens and decoding is verbatim, so pieces can be concatenated as ids and the text of
a sampled turn is exactly what the model wrote. This module knows no model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self, runtime_checkable

from at2po_env.errors import PolicyError, require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back. `decode` is verbatim: special tokens show, nothing is cleaned up."""

    @property
    def eos_id(self) -> int:
        """The id that ends a sequence."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens added.

        A tokenizer that parses control tokens written in a text lists them in `control_tokens`, as
        `HFTokenizer` does; transcripts then break them up in what an environment shows.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, verbatim."""
        ...


@runtime_checkable
class HasControlTokens(Protocol):
    """A tokenizer that parses control tokens written in a text."""

    @property
    def control_tokens(self) -> Sequence[str]:
        """The control tokens."""
        ...


class OutsideText:
    """Breaks up control tokens in text from outside, so that it is encoded as text: `< |im_end|>`.

    A retrieved page then can neither end the sequence or its message nor speak as the assistant.

    Args:
        control_tokens: The tokens.
    """

    def __init__(self, control_tokens: Iterable[str]) -> None:
        longest_first = sorted(set(control_tokens), key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def __call__(self, text: str) -> str:
        """The text, with a space after the first character of each control token."""
        return self._tokens.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)


class HFTokenizer:
    """Adapter for `transformers.PreTrainedTokenizerFast`.

    Args:
        tokenizer: The wrapped tokenizer; it must have an end-of-sequence token.

    Raises:
        PolicyError: The tokenizer has no end-of-sequence token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        if tokenizer.eos_token_id is None:
            raise PolicyError("the tokenizer has no eos token; set tokenizer.eos_token before wrapping it")
        self.hf = tokenizer
        self._eos_id = int(tokenizer.eos_token_id)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Load from a checkpoint folder (or a name that the local hub cache holds)."""
        transformers = require("transformers", "agent")
        try:
            return cls(transformers.AutoTokenizer.from_pretrained(str(path)))
        except (OSError, ValueError) as error:
            raise PolicyError(f"no tokenizer can be loaded from {str(path)!r}: {error}") from error

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the tokenizer's files into a folder."""
        self.hf.save_pretrained(str(save_directory))

    @property
    def eos_id(self) -> int:
        """The id that ends a sequence."""
        return self._eos_id

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Tokens that steer a model: ends, padding, marks of messages; no added words such as `<think>`."""
        flagged = {token.content for token in self.hf.added_tokens_decoder.values() if token.special}
        return tuple(sorted(flagged | set(self.hf.all_special_tokens)))

    def __len__(self) -> int:
        return len(self.hf)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens added; special tokens written in the text are parsed."""
        ids: list[int] = self.hf.encode(text, add_special_tokens=False)
        return ids

    def pieces(self, count: int) -> list[str]:
        """The text of each id below `count` by itself; empty where there is no such id."""
        known = [[token] for token in range(min(count, len(self.hf)))]
        texts: list[str] = self.hf.backend_tokenizer.decode_batch(known, skip_special_tokens=False)
        return texts + [""] * (count - len(texts))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, verbatim."""
        text: str = self.hf.backend_tokenizer.decode(list(ids), skip_special_tokens=False)
        return text
