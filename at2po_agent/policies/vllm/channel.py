"""Messages between an engine's process and its owner's."""

from __future__ import annotations

import io
import pickle
from typing import Any

from at2po_agent.transcripts.tokenizer import Tokenizer
from at2po_env.errors import PolicyError

_TOKENIZER = "tokenizer"


class Wire:
    """Pickles messages; the tokenizer, which interventions often hold, stays at home."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def dumps(self, message: Any) -> bytes:
        """Bytes of a message."""
        buffer, tokenizer = io.BytesIO(), self._tokenizer

        class Pickler(pickle.Pickler):
            def persistent_id(self, obj: Any) -> str | None:
                return _TOKENIZER if obj is tokenizer else None

        try:
            Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(message)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise PolicyError(
                f"a request cannot travel to the engine's process: {error}. Fix: define the intervention in "
                "a module, without open files or lambdas, or set model.vllm.asynchronous=false"
            ) from error
        return buffer.getvalue()

    def loads(self, data: bytes) -> Any:
        """The message of bytes."""
        tokenizer = self._tokenizer

        class Unpickler(pickle.Unpickler):
            def persistent_load(self, pid: Any) -> Any:  # noqa: ARG002  there is only one
                return tokenizer

        return Unpickler(io.BytesIO(data)).load()
