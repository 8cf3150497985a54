"""Inside the engine: a fork finds its prefix to the last token, where vLLM's prefix cache finds whole blocks.

vLLM shares blocks that are full and equal. Of the block in which a prefix ends, or leaves another sequence,
nothing is shared, so each fork would compute up to `block_size` - 1 tokens again. This connector (vLLM's
interface for keys and values from elsewhere) finds them in the engine's own storage: it remembers what every
block holds (`BlockIndex`), and where a block begins as the request's prefix goes on, that block is copied
into the request's own before the step. The rest of the copy is overwritten as the request grows.

No memory is kept for it: a block counts until the engine gives it to another sequence, and can still be
read in that step, before the step writes. vLLM gives away first what is not full; the last block of a
finished request is marked as a cached one instead, and goes when its turn comes. Requests that arrive
together with the same prefix wait one step for the first of them. With new weights everything is forgotten.

Needs prompts that are computed in one step and one step at a time (no chunked prefill, no asynchronous
scheduling; see `spec.engine_arguments`). Names of the interface were read in vLLM 0.32. Loaded by name in the
engine's process; importing it needs vLLM.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id
from vllm.v1.worker.utils import copy_kv_cache_blocks_inplace

from at2po_agent.policies.vllm.exact_prefixes.block_index import BlockIndex

_CACHED = make_block_hash_with_group_id(BlockHash(b"part of a block"), 0)
"""Marks a block that is not full as cached; no lookup finds it by this hash."""


@dataclass
class Copies(KVConnectorMetadata):  # type: ignore[misc]  # of vLLM, untyped here
    """Tells the workers what to copy before a step: (from block, to block)."""

    pairs: list[tuple[int, int]] = field(default_factory=list)


class ForkConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Copies the block that a prefix shares in part.

    The engine makes two: one beside its scheduler, which decides, and one in each worker, which copies.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._size = int(vllm_config.cache_config.block_size)
        self._number = int(kv_cache_config.num_blocks)
        self._storage: list[Tensor] = []
        self._ready = BlockIndex()
        self._coming = BlockIndex()  # what this step computes
        self._places: dict[str, tuple[int, int | None]] = {}  # where full blocks end, and what to copy
        self._pairs: list[tuple[int, int]] = []
        self._pool: Any = None

    @property
    def requires_kv_delivery(self) -> bool:
        """No: what is lost is computed again."""
        return False

    # In the workers --------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """Take the storage of all layers."""
        self._storage = list(kv_caches.values())

    def start_load_kv(self, forward_context: Any, **more: Any) -> None:
        """Copy, all sources read before the first is written."""
        del forward_context, more
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, Copies)
        copy_kv_cache_blocks_inplace(self._storage, self._number, metadata.pairs)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Copies are in order with the step."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **more: Any) -> None:
        """Keys and values stay where the engine writes them."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""

    # Beside the scheduler --------------------------------------------------------------------------------

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """Take the engine's pool of blocks."""
        self._pool = gpu_block_pool

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens beyond the full blocks that a copy brings; None where it is better to wait a step."""
        first, parent = num_computed_tokens, self._parent(request, num_computed_tokens)
        last = min(first + self._size, request.num_tokens - 1)  # one token is computed, for its logits
        wanted = request.all_token_ids[first:last]
        found = self._ready.find(parent, wanted)
        if self._coming.find(parent, wanted).tokens > found.tokens:
            return None, False
        self._places[request.request_id] = (first, found.block)
        if found.block is not None:  # as after a hit of vLLM's own: it goes to the end of the queue
            source = [self._pool.blocks[found.block]]
            self._pool.touch(source)
            self._pool.free_blocks(source)
        return found.tokens, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note the copy for a request that has got its blocks, and what they hold after this step."""
        own = blocks.get_block_ids()[0]
        first, source = self._places.pop(request.request_id)
        if num_external_tokens and source is not None:
            self._pairs.append((source, own[first // self._size]))
        self._put(self._coming, request, own, first, request.num_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Copies:
        """The step is planned: hand its copies over, and see which blocks it gives to others."""
        for blocks in scheduler_output.scheduled_cached_reqs.new_block_ids:
            for block in blocks[0] if blocks else ():
                self._ready.drop(block)
        self._ready.take(self._coming)
        pairs, self._pairs = self._pairs, []
        return Copies(pairs)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Remember what was sampled; the engine may free the blocks at once."""
        self._places.pop(request.request_id, None)  # looked up, and never admitted
        start = request.num_prompt_tokens // self._size * self._size
        self._put(self._ready, request, block_ids, start, request.num_computed_tokens)
        last = self._pool.blocks[block_ids[-1]] if block_ids else None
        if last is not None and last.block_hash is None:
            last.set_block_hash(_CACHED)
        return False, None

    def reset_cache(self) -> bool:
        """Forget all: the weights are new."""
        self._ready.clear()
        self._coming.clear()
        return True

    def _put(self, index: BlockIndex, request: Any, blocks: list[int], first: int, end: int) -> None:
        """Say what a request's blocks hold from position `first`, where a block begins, to `end`."""
        for position in range(first, end, self._size):
            tokens = request.all_token_ids[position : min(position + self._size, end)]
            index.put(blocks[position // self._size], self._parent(request, position), tokens)

    def _parent(self, request: Any, position: int) -> Hashable:
        """Names all that comes before a block's first position, adapters and salts included."""
        if position:
            before: Hashable = request.block_hashes[position // self._size - 1]
            return before
        lora = request.lora_request
        return (None if lora is None else lora.lora_int_id, request.cache_salt)
