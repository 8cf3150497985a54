"""Makes engines of vLLM from their specification: every name of vLLM's own options stands here.

Nothing of vLLM is imported before an engine is made.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from at2po_agent.policies.base import PolicyStats
from at2po_agent.policies.vllm.config import VLLMConfig
from at2po_agent.policies.vllm.exact_prefixes import CONNECTOR, shares_to_the_token
from at2po_env.errors import PolicyError, require

_SAMPLER = "at2po_agent.policies.vllm.logits_processor:SeededSampling"
_NEEDED = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's core runs where it is made; processes are ours
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # our logits processor has the interface of the V1 sampler
}
_WISHED = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # binding would pin the learner's threads too
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",  # its warnings are about choices that are made here
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # what a command prints is its result
}
_GIGABYTE = 1 << 30
_CPU_KV_CACHE_GB = 1.0
_CPU_BLOCK = 32  # the smallest block of its attention
_GPU_BLOCK = 16
_OWN_GPU, _SHARED_GPU = 0.9, 0.35
_STEP_TOKENS = 8192
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those that it has kernels for


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """All that an engine is made from; it travels to the engine's process.

    Attributes:
        model: Folder or hub name.
        config: Memory and processes; dtype is not "auto" any more.
        max_sequences: Sequences that decode at the same time.
        eos_ids: Ids that end a generation.
        shared: Whether the learner uses the same GPU.
        devices: GPUs that the engine's process sees; None leaves the environment alone.
    """

    model: str
    config: VLLMConfig
    max_sequences: int
    eos_ids: tuple[int, ...]
    shared: bool = False
    devices: tuple[str, ...] | None = None


class Limits(NamedTuple):
    """Limits an engine: ids below `vocab_size`, sequences of `max_positions`, and the size of its blocks."""

    vocab_size: int
    max_positions: int
    block_size: int


class EngineGPUs(NamedTuple):
    """The GPUs that an engine's process sees (None: those of this one); shared with the learner or not."""

    devices: tuple[str, ...] | None
    shared: bool


def place_engines(config: VLLMConfig, learner: torch.device | None) -> list[EngineGPUs]:
    """Give every engine its GPUs, the learner's last.

    Raises:
        PolicyError: There are too few.
    """
    if not torch.cuda.is_available():
        return [EngineGPUs(None, False)] * max(1, config.engines)
    on_gpu = learner is not None and learner.type == "cuda"
    if not config.asynchronous:
        return [EngineGPUs(None, on_gpu)]
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    visible = named.split(",")[:count] if named else [str(number) for number in range(count)]
    own = None
    if learner is not None and on_gpu:
        own = torch.cuda.current_device() if learner.index is None else learner.index
    return share_out(visible, own, engines=config.engines, each=config.tensor_parallel)


def share_out(visible: Sequence[str], learner: int | None, *, engines: int, each: int) -> list[EngineGPUs]:
    """GPUs for every engine.

    Args:
        visible: Names of the GPUs.
        learner: Index of the one that the learner uses.
        engines: Number of engines; 0 takes as many as fit beside the learner, at least one.
        each: GPUs of one engine.

    Raises:
        PolicyError: There are too few GPUs.
    """
    others = [name for number, name in enumerate(visible) if number != learner]
    engines = engines or max(1, len(others) // each)
    pool = others if learner is None or len(others) >= engines * each else [*others, visible[learner]]
    if len(pool) < engines * each:
        raise PolicyError(
            f"{engines} engines of {each} GPUs need {engines * each}, but {len(visible)} are visible; "
            "lower model.vllm.engines or model.vllm.tensor_parallel"
        )
    parts = [tuple(pool[start : start + each]) for start in range(0, engines * each, each)]
    return [EngineGPUs(part, learner is not None and visible[learner] in part) for part in parts]


class Counters:
    """The engine's own counters, summed: it stands in for vLLM's stat loggers."""

    def __init__(self) -> None:
        self.stats = PolicyStats()

    def record(self, scheduler_stats: Any, iteration_stats: Any, **more: Any) -> None:
        """Take the counters of a step."""
        del more
        if scheduler_stats is not None:
            cache = scheduler_stats.prefix_cache_stats
            hits = cache.hits + cache.preempted_hits
            copied = scheduler_stats.connector_prefix_cache_stats
            if copied is not None:
                hits += copied.hits + copied.preempted_hits
            self.stats.cached_tokens += hits
            self.stats.prefill_tokens += cache.queries + cache.preempted_queries - hits
        if iteration_stats is not None:
            self.stats.decoded_tokens += iteration_stats.num_generation_tokens
            self.stats.steps += 1

    def log(self) -> None:
        """Nothing is printed."""

    def record_sleep_state(self, *state: Any) -> None:
        """Nothing is counted there."""


def make_engine(spec: EngineSpec) -> tuple[Any, Counters]:
    """An `LLMEngine` whose core runs in this process, and its counters.

    Raises:
        MissingExtraError: vLLM is not installed.
        PolicyError: This process runs one already whose prefixes are exact: vLLM has room for one connector.
    """
    require("vllm.v1", "vllm")
    prepare_environment()
    set_num_threads = torch.set_num_threads  # vLLM's CPU worker forbids to call it, for good
    try:
        import vllm
        from vllm import EngineArgs, LLMEngine
        from vllm.config import KVTransferConfig
        from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown, has_kv_transfer_group
        from vllm.platforms import current_platform

        if has_kv_transfer_group():
            raise PolicyError(
                "this process runs an engine of vLLM already, and can hold one. Fix: close() that policy "
                "first, or set model.vllm.asynchronous=true, which gives each engine a process of its own"
            )
        arguments = EngineArgs(**engine_arguments(spec, on_cpu=bool(current_platform.is_cpu())))
        if shares_to_the_token(
            spec.config.exact_prefixes,
            version=vllm.__version__,
            attends_to_all=attends_to_all(arguments.create_model_config()),
        ):
            arguments.kv_transfer_config = KVTransferConfig(
                kv_connector="ForkConnector", kv_connector_module_path=CONNECTOR, kv_role="kv_both"
            )
        try:
            engine = LLMEngine.from_engine_args(arguments)
        except BaseException:
            ensure_kv_transfer_shutdown()
            raise
    finally:
        torch.set_num_threads = set_num_threads
    counters = Counters()
    engine.logger_manager = counters  # in place of Prometheus, which costs more than a step of a small model
    return engine, counters


def engine_arguments(spec: EngineSpec, *, on_cpu: bool) -> dict[str, Any]:
    """Keywords of vLLM's `EngineArgs`."""
    config = spec.config
    kv_cache_gb = config.kv_cache_gb or (_CPU_KV_CACHE_GB if on_cpu else None)
    share = config.gpu_memory_utilization or (_SHARED_GPU if spec.shared else _OWN_GPU)
    arguments: dict[str, Any] = {
        "model": spec.model,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "dtype": config.dtype,
        "tensor_parallel_size": config.tensor_parallel,
        "distributed_executor_backend": "uni" if config.tensor_parallel == 1 else "mp",
        "max_model_len": config.max_model_len,
        "max_num_seqs": spec.max_sequences,
        # A prompt goes through the model in one step, as the logits processor needs it.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(_STEP_TOKENS, config.max_model_len or 0),
        "enable_prefix_caching": True,
        "block_size": config.block_size or (_CPU_BLOCK if on_cpu else _GPU_BLOCK),
        "gpu_memory_utilization": share,
        "kv_cache_memory_bytes": None if kv_cache_gb is None else int(kv_cache_gb * _GIGABYTE),
        "enforce_eager": on_cpu if config.enforce_eager is None else config.enforce_eager,
        "enable_sleep_mode": config.sleep and spec.shared and not on_cpu,
        "logits_processors": [_SAMPLER],
        "logprobs_mode": "processed_logits",
        "async_scheduling": False,
        "disable_log_stats": False,
        "seed": 0,
    }
    if config.lora_rank:
        rank = next((rank for rank in _LORA_RANKS if rank >= config.lora_rank), config.lora_rank)
        arguments |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1}
    if config.transfer in ("ipc", "nccl"):
        from vllm.config.weight_transfer import WeightTransferConfig

        arguments["weight_transfer_config"] = WeightTransferConfig(backend=config.transfer)
    return arguments


def attends_to_all(model: Any) -> bool:
    """True if every layer of a model (vLLM's `ModelConfig`) attends to all tokens: its blocks are alike."""
    kinds = getattr(model.hf_text_config, "layer_types", None) or ["full_attention"]
    special = model.is_hybrid or model.is_attention_free or model.is_encoder_decoder
    return not special and set(kinds) == {"full_attention"} and not model.get_sliding_window()


def prepare_environment() -> None:
    """Options that vLLM reads from the environment: requirements, and defaults for those that are not set."""
    os.environ.update(_NEEDED)
    for name, value in _WISHED.items():
        os.environ.setdefault(name, value)
