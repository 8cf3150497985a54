"""A transformers model as a policy, with our own continuous batching.

Every step runs one forward pass over a packed batch: the next token of every live sequence, and the uncached
part of every new prefix. Prefixes are looked up in a radix tree, so that a forked prefix is never computed
twice, not even by requests that arrive together. Ids come back verbatim; stop strings are found without
re-tokenising.

Log-probs are those of the model at the request's temperature (a greedy request: at temperature 1) before
top-p, in nats. At temperature 1 and top-p 1 that is both the distribution sampled from and what a full
forward pass gives.

This module knows no environment, no tree and no training.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from at2po_agent.policies.base import PolicyStats, Request, SteppingPolicy, check_fits
from at2po_agent.policies.hf.batching import Batcher, SeatedRequest
from at2po_agent.policies.hf.decoder import ModelDecoder
from at2po_agent.policies.hf.fused import FusedDecoder, fits
from at2po_agent.policies.hf.prefix_cache import PrefixCache
from at2po_agent.policies.hf.slots import Slots
from at2po_agent.policies.sampling import choose
from at2po_agent.policies.stops import StopTable
from at2po_agent.policies.weights import check_weights
from at2po_agent.transcripts.inline import InlineTranscript, Transcript
from at2po_agent.transcripts.tokenizer import Tokenizer
from at2po_agent.types import Generation
from at2po_env.errors import PolicyError


class HFPolicy(SteppingPolicy):
    """Samples from a decoder of transformers.

    Args:
        model: Any causal language model that uses the attention interface; shared with the trainer, which
            calls `weights_changed` after each update.
        tokenizer: Its tokenizer.
        slots: Sequences decoded at the same time; further requests wait.
        cache_tokens: Tokens whose KV the prefix cache keeps.
        kv_tokens: Most slots x positions of the KV buffers; None takes 4 GiB (CPU) or half of the free
            memory.
        max_prefill: Prefix tokens of one step, beyond which further requests wait.
        eos_ids: Ids that end a generation; None takes the tokenizer's.
        transcript: Turns what the environment shows into ids in rollouts; None encodes it as it is.

    Raises:
        PolicyError: The model's layers cannot be served from slots.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        *,
        slots: int = 256,
        cache_tokens: int = 262_144,
        kv_tokens: int | None = None,
        max_prefill: int = 8192,
        eos_ids: Collection[int] | None = None,
        transcript: Transcript | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.transcript = transcript or InlineTranscript(tokenizer)
        self._vocab_size = int(model.config.vocab_size)
        if slots < 1:
            raise PolicyError(f"slots must be at least 1, got {slots}")
        ends = (tokenizer.eos_id,) if eos_ids is None else eos_ids
        self._stops = StopTable(tokenizer, self._vocab_size, ends)
        general = ModelDecoder(model)
        self.decoder = FusedDecoder(model) if fits(model) else general
        if not kv_tokens:
            on_gpu = model.device.type == "cuda"
            room = torch.cuda.mem_get_info(model.device)[0] // 2 if on_gpu else 4 << 30
            values = sum(heads * width for layer in general.shapes for heads, width in layer)
            kv_tokens = room // (model.dtype.itemsize * values)  # keys and values of one position, all layers
        self._limits = [(kv_tokens, f"kv_tokens ({kv_tokens}), the size of the KV buffers")]
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is not None:
            limit = (
                f"the model's {positions} positions (max_position_embeddings of {type(model).__name__}); "
                "shorten the prefix or max_tokens"
            )
            self._limits.insert(0, (positions, limit))
        self._cache = PrefixCache(cache_tokens)
        self.slots = Slots(general.shapes, max_tokens=kv_tokens, dtype=model.dtype, device=model.device)
        self._batcher = Batcher(
            self.decoder, self.slots, self._cache, max_rows=slots, max_prefill=max_prefill
        )
        self._parameters = list(model.parameters())
        self._weights = self._fingerprint()

    @property
    def version(self) -> int:
        """Counts weight updates; every generation carries the version that sampled its first token."""
        return self._batcher.version

    def count_from(self, version: int) -> None:
        """Set the version of the present weights; the next update counts on from it."""
        self._batcher.version = version

    @property
    def stats(self) -> PolicyStats:
        """Counts of all that was computed since the policy was made."""
        return self._batcher.stats

    @property
    def idle(self) -> bool:
        """True if no request waits or is under way."""
        return self._batcher.idle and not self._finished

    @property
    def cached_now(self) -> int:
        """Tokens that the prefix cache holds."""
        return self._cache.tokens

    def cancel(self, ticket: int) -> None:
        """Forget a request, finished or not; `poll` will not report it."""
        if self._finished.pop(ticket, None) is None:
            with torch.inference_mode():
                self._batcher.remove(ticket)

    def abort(self, ticket: int) -> Generation:
        """Stop a request now and return what it generated so far.

        Raises:
            PolicyError: No such request is under way.
        """
        finished = self._finished.pop(ticket, None)
        if finished is not None:
            return finished
        with torch.inference_mode():
            row = self._batcher.remove(ticket)
        if row is None:
            raise PolicyError(f"no request with ticket {ticket} is under way")
        return row.generation("abort")

    def update_weights(self, weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Copy new weights into the model by name, then `weights_changed`.

        Raises:
            PolicyError: A name is unknown or a shape does not fit; nothing is copied then.
        """
        new, own = dict(weights), self.model.state_dict()
        check_weights(self.model, new)
        with torch.no_grad():
            for name, value in new.items():
                own[name].copy_(value)
        self.weights_changed()

    def weights_changed(self) -> None:
        """The model's weights were changed in place: forget all KV and count up `version`.

        Requests under way go on with the new weights, their KV computed afresh. A change that autograd's
        version counters show (`copy_`, `load_state_dict`, an optimiser's unless it is fused) is noticed
        without this call.
        """
        with torch.inference_mode():
            self._batcher.version += 1
            self._batcher.restart()
            self.decoder.refresh()
            self._weights = self._fingerprint()

    @torch.inference_mode()
    def _advance(self) -> None:
        """Generate one token for every live request."""
        if self._weights != self._fingerprint():
            self.weights_changed()
        rows, logits = self._batcher.step()
        if logits is None:
            return
        try:
            ended = choose(rows, logits, self._stops)
        except FloatingPointError as error:
            self._batcher.reset()
            raise PolicyError(f"{error}; all requests under way are dropped") from error
        except BaseException:
            self._batcher.rewind()
            raise
        for row, reason in ended:
            self._batcher.leave(row)
            self._finished[row.ticket] = row.generation(reason)
        self._batcher.stats.decoded_tokens += len(rows)

    def _fingerprint(self) -> list[tuple[int, int]]:
        """Changes when a weight is written or replaced."""
        return [(parameter._version, parameter.data_ptr()) for parameter in self._parameters]

    def _check(self, request: Request) -> None:
        check_fits(request, self._vocab_size, self._limits)

    def _begin(self, ticket: int, request: Request) -> None:
        stop = self._stops.number(request.stop)
        self._batcher.submit(
            SeatedRequest(
                ticket=ticket,
                request=request,
                stop=stop,
                version=self.version,
                context=request.prefix_ids,
            )
        )
