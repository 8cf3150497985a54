"""Configures engines of vLLM; nothing of vLLM is imported here."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class VLLMConfig(BaseModel):
    """Configures engines, their memory and their processes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    engines: int = Field(
        1, ge=0, description="Engines side by side; 0: as many as fit on the GPUs beside the learner's."
    )
    tensor_parallel: int = Field(1, ge=1, description="GPUs of one engine.")
    asynchronous: bool = Field(
        True, description="Run each engine in a process of its own; false: one engine in this process."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Number format of the sampler's weights; auto takes the one the learner computes in.",
    )
    max_model_len: int | None = Field(
        None, ge=1, description="Longest sequence, prompt included; none takes what the model can."
    )
    gpu_memory_utilization: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of each GPU's memory; none takes 0.9, or 0.35 of a GPU shared with the learner.",
    )
    kv_cache_gb: float | None = Field(
        None, gt=0, description="Memory for keys and values of one engine; none takes the rest (CPU: 1)."
    )
    block_size: int | None = Field(
        None, ge=1, description="Tokens of a block, the unit of prefix caching; none takes 16 (CPU: 32)."
    )
    exact_prefixes: Literal["auto"] | bool = Field(
        "auto",
        description="Share prefixes to the last token, not in whole blocks; auto does so with a version of "
        "vLLM that this was tested with, where every layer of the model attends to all tokens.",
    )
    enforce_eager: bool | None = Field(
        None, description="Do not compile the model; none compiles on GPUs and does not on CPU."
    )
    transfer: Literal["auto", "shared", "ipc", "nccl"] = Field(
        "auto",
        description="Way of new weights: shared memory (auto, for engines in processes), or vLLM's transfer "
        "within a GPU (ipc) or to other GPUs (nccl).",
    )
    sleep: bool = Field(True, description="Give memory back while the learner works, where both share a GPU.")
    lora_rank: int = Field(0, ge=0, description="Largest rank of adapters; 0 serves none.")
    threads: int = Field(0, ge=0, description="CPU: threads of one engine; 0 leaves the choice to OpenMP.")
    start_timeout_s: float = Field(
        1800.0, gt=0, description="Longest wait for an engine to start or to load."
    )
    stall_timeout_s: float = Field(
        300.0, gt=0, description="An engine with requests that makes no step for so long counts as hung."
    )

    @model_validator(mode="after")
    def _several_need_processes(self) -> Self:
        if self.engines != 1 and not self.asynchronous:
            raise ValueError(
                f"engines = {self.engines} needs asynchronous = true: a process holds one engine of vLLM"
            )
        return self
