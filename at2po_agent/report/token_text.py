"""The text of each token of an action, so that tokens can be coloured one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

Decode = Callable[[Sequence[int]], str]


def run_decoder(run: Path) -> Decode | None:
    """Decoder of the tokenizer that a run kept with its newest checkpoint; None when there is none to use."""
    files = sorted(run.glob("checkpoints/*/tokenizer.json")) + sorted(run.glob("tokenizer/tokenizer.json"))
    if not files:
        return None
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None
    tokenizer = Tokenizer.from_file(str(files[-1]))
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False))


def token_pieces(ids: Sequence[int], text: str, decode: Decode) -> list[str] | None:
    """Cut a text into the pieces of its tokens.

    A character whose bytes are spread over several tokens goes to the last of them; the others get "".

    Args:
        ids: The tokens.
        text: What they are together.
        decode: Tokens to text.

    Returns:
        One piece per token whose concatenation is `text`, or None when these tokens do not give this text.
    """
    pieces: list[str] = []
    begin = done = 0  # decoding starts at `begin`, since a piece may depend on the token before it
    for end in range(1, len(ids) + 1):
        known, longer = decode(ids[begin:done]), decode(ids[begin:end])
        complete = longer.startswith(known) and (not longer.endswith("\ufffd") or end == len(ids))
        pieces.append(longer[len(known) :] if complete else "")
        if complete:
            begin, done = done, end
    return pieces if "".join(pieces) == text else None
