"""Sends new weights to engines: in place, by the name of each weight.

- direct: the engine runs in this process and takes the learner's tensors (`Engine.load`).
- shared: the engines read one file in shared memory, in the sampler's number format. Works wherever learner
  and engines are on one machine, whatever their devices; the way that tests run.
- ipc, nccl: vLLM's own weight transfer, for an engine on the learner's GPU, and for engines on other GPUs.

This module knows neither requests nor training.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
import socket
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from at2po_agent.policies.vllm.shared_files import note_files
from at2po_agent.policies.weights import base_weights, is_adapted
from at2po_env.errors import PolicyError

NamedTensors = Iterable[tuple[str, Tensor]]
_ALIGNMENT = 64
_RELOADING = "vllm.model_executor.model_loader.reload.layerwise"


class FileWeight(NamedTuple):
    """Locates one weight in the shared file: bytes start..start+size-1."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class EngineCalls(Protocol):
    """Calls methods of an engine, here or in another process."""

    def begin(self, method: str, *arguments: Any) -> None:
        """Start a call of `Engine`."""
        ...

    def end(self) -> Any:
        """Wait for it."""
        ...


def call_all(engines: Sequence[EngineCalls], method: str, *arguments: Any) -> list[Any]:
    """Call a method of all engines at the same time."""
    for engine in engines:
        engine.begin(method, *arguments)
    return [engine.end() for engine in engines]


def save_model(model: nn.Module, folder: str) -> None:
    """Write configuration and weights as vLLM reads them; adapters of peft are left out.

    Raises:
        PolicyError: The model is none of transformers.
    """
    inner: Any = model.get_base_model() if is_adapted(model) else model  # type: ignore[operator]  # peft's
    if not isinstance(inner, PreTrainedModel):
        raise PolicyError(
            f"vLLM serves models of transformers, got {type(model).__name__}. Fix: model.sampler=hf"
        )
    config = copy.deepcopy(inner.config)
    config.architectures = [type(inner).__name__]
    config.save_pretrained(folder)
    weights = {name: tensor.contiguous().cpu() for name, tensor in base_weights(model).items()}
    save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})


class SharedSender:
    """Writes weights into a shared file that every worker reads.

    Args:
        engines: Receivers.
        dtype: Number format of floating-point weights in the file; None leaves each as it is.
    """

    def __init__(self, engines: Sequence[EngineCalls], dtype: torch.dtype | None) -> None:
        self._engines = engines
        self._dtype = dtype
        self._path: Path | None = None

    def send(self, weights: Mapping[str, Tensor]) -> None:
        """Write all weights, then let the workers of all engines load them."""
        layout = list(self._layout(weights))
        size = layout[-1].start + layout[-1].size
        path = self._file(size)
        whole = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
        for weight, tensor in zip(layout, weights.values(), strict=True):
            view(whole, weight).copy_(tensor)
        call_all(self._engines, "load_file", str(path), size, layout)

    def _layout(self, weights: Mapping[str, Tensor]) -> Iterator[FileWeight]:
        start = 0
        for name, tensor in weights.items():
            dtype = self._dtype if self._dtype is not None and tensor.is_floating_point() else tensor.dtype
            size = tensor.numel() * dtype.itemsize
            yield FileWeight(name, str(dtype).removeprefix("torch."), tuple(tensor.shape), start, size)
            start += -(-size // _ALIGNMENT) * _ALIGNMENT

    def _file(self, size: int) -> Path:
        """The file, with room for so many bytes: writing into a mapped file without any ends the process."""
        if self._path is None:
            memory = Path("/dev/shm")  # a disk serves where that is too small
            roomy = memory.is_dir() and shutil.disk_usage(memory).free > size
            handle, name = tempfile.mkstemp(prefix="at2po-weights-", dir=memory if roomy else None)
            os.close(handle)
            self._path = Path(name)
            weakref.finalize(self, self._path.unlink, missing_ok=True)
            if roomy:
                note = note_files(f"weights-{self._path.name}", [self._path.name])
                if note is not None:
                    weakref.finalize(self, note.unlink, missing_ok=True)
        with self._path.open("r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                file.truncate(0)
                needed, folder = f"{size / 1e6:,.0f} MB", self._path.parent
                raise PolicyError(
                    f"no room for new weights: {needed} in {folder} ({error.strerror}). Fix: make room "
                    "there, or set TMPDIR to a folder that has some"
                ) from error
        return self._path


def view(whole: Tensor, weight: FileWeight) -> Tensor:
    """One weight of the shared file."""
    part = whole[weight.start : weight.start + weight.size]
    dtype: torch.dtype = getattr(torch, weight.dtype)
    return part.view(dtype).view(weight.shape)


def load_file(worker: Any, path: str, size: int, layout: Sequence[FileWeight]) -> None:
    """Load every weight of a shared file; the engine runs this in its workers."""
    whole = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
    reload_weights(worker, ((weight.name, view(whole, weight)) for weight in layout))


def reload_weights(worker: Any, weights: NamedTensors | None) -> None:
    """Load weights (None: from the model's folder) in place; the engine runs this in its workers."""
    logging.getLogger(_RELOADING).setLevel(logging.ERROR)  # it warns of modules that have nothing to load
    worker.reload_weights(weights_iterator=weights)
    if worker.device.type != "cpu":
        return
    for module in worker.get_model().modules():
        if hasattr(module, "tie_weights"):  # a tied head keeps a packed copy that loading leaves as it was
            module.quant_method.process_weights_after_loading(module)


class TransferSender:
    """vLLM's own weight transfer, "ipc" or "nccl". Its data plane needs CUDA.

    Args:
        engines: Receivers.
        backend: Which.
        workers: GPUs of one engine.
        dtype: Number format that travels.
    """

    def __init__(
        self, engines: Sequence[EngineCalls], backend: str, *, workers: int, dtype: torch.dtype | None
    ) -> None:
        self._engines = engines
        self._workers = workers
        self._backend = backend
        self._dtype = dtype
        self._connection: Any = None
        self._weights: Mapping[str, Tensor] = {}

    def send(self, weights: Mapping[str, Tensor]) -> None:
        """Send all weights."""
        wanted = self._dtype
        self._weights = {
            name: tensor if wanted is None or not tensor.is_floating_point() else tensor.to(wanted)
            for name, tensor in weights.items()
        }
        if not all(tensor.is_cuda for tensor in self._weights.values()):
            raise PolicyError(
                f"model.vllm.transfer = {self._backend} sends from a GPU, but the learner's weights are not "
                "on one. Fix: model.vllm.transfer=shared"
            )
        if self._connection is None:
            self._connection = self._connect()
        self._connection.send_weights()
        self._weights = {}

    def _connect(self) -> Any:
        from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        sender, info = self, None

        class Source(WeightSource):  # type: ignore[misc]  # vLLM is not there when types are checked
            def metadata(self) -> list[Any]:
                return [ParamMeta(name, t.dtype, tuple(t.shape)) for name, t in sender._weights.items()]

            def __iter__(self) -> Iterator[tuple[str, Tensor]]:
                return iter(sender._weights.items())

        if self._backend == "ipc":
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            info = IPCTrainerInitInfo(rank=0)
        else:
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            world = 1 + len(self._engines) * self._workers
            info = NCCLTrainerInitInfo("127.0.0.1", port, world, rank=0)
        return WeightTransferTrainerFactory.trainer_init(info, client=self, source=Source())

    # What vLLM's trainer side calls, on behalf of the receiving side: each of its steps, in every worker.

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let every worker join; each engine's ranks follow those of the engines before it."""
        for number, engine in enumerate(self._engines):
            info = dict(init_info)
            if "rank_offset" in info:
                info["rank_offset"] += number * self._workers
            engine.begin("run_in_workers", "init_weight_transfer_engine", info)
        for engine in self._engines:
            engine.end()

    def shutdown_weight_transfer_engine(self) -> None:
        """Leave."""
        call_all(self._engines, "run_in_workers", "shutdown_weight_transfer_engine")

    def start_weight_update(self) -> None:
        """Get ready."""
        call_all(self._engines, "run_in_workers", "start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Receive."""
        call_all(self._engines, "run_in_workers", "update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """All weights are there."""
        del weight_version
        call_all(self._engines, "run_in_workers", "finish_weight_update")
