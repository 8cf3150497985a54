"""The learners of a run: who they are, and what they do together.

A process belongs to a group when a launcher started it (`torchrun`, or `launch` for `cluster.learners`): the
launcher's environment variables say which learner it is. All learners run the same program, so they meet in
the same calls of the methods below, in the same order. With one learner, which is the normal case, every
method returns at once and changes nothing.

What has to be the same everywhere is never decided by one process: a stop that a signal asks for counts only
when all learners have heard of it, in `together`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, distributed

from at2po_agent.config.sections import Config
from at2po_agent.runs.interrupts import StopRequested
from at2po_env.errors import At2poError, ConfigError

ResultT = TypeVar("ResultT")

PATIENCE = timedelta(days=7)
"""How long a learner waits for the others. One that died is noticed at once, for its connections close and
its launcher ends the rest; one that trains alone (a cold start) or whose tools are slow may take hours."""


class LearnerError(At2poError):
    """One of several learners has failed, and with it the run; the message names it."""


class Learners:
    """The group of processes that this one belongs to; by default it is alone.

    Args:
        rank: Which of the learners this is, from 0.
        count: How many there are.
        device: Kind of device of their models: "cpu" or "cuda".

    Attributes:
        rank: Which of the learners this is; the first, 0, writes the run's folder and talks to a person.
        count: How many there are.
    """

    def __init__(self, rank: int = 0, count: int = 1, device: str = "cpu") -> None:
        self.rank = rank
        self.count = count
        self.device = device
        self._apart = False

    @property
    def first(self) -> bool:
        """Whether this is the learner that writes files and messages."""
        return self.rank == 0

    @property
    def may_stop(self) -> bool:
        """Whether all learners would hear of a `StopRequested`: of those that are raised in `together`."""
        return self.count == 1 or self._apart

    def together(self, work: Callable[[], ResultT]) -> list[ResultT]:
        """Let every learner do its part of some work; give all parts to all, in the order of the learners.

        Raises:
            StopRequested: One of them gave up its part with it; then all do.
        """
        if self.count == 1:
            return [work()]
        part: ResultT | None = None
        stopped, self._apart = False, True
        try:
            part = work()
        except StopRequested:
            stopped = True
        finally:
            self._apart = False
        parts: list[tuple[bool, ResultT]] = [None] * self.count  # type: ignore[list-item]
        distributed.all_gather_object(parts, (stopped, part))
        if any(gave_up for gave_up, _ in parts):
            raise StopRequested
        return [result for _, result in parts]

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor of one shape over all learners."""
        if self.count > 1:
            tensor = tensor.clone()
            distributed.all_reduce(tensor)
        return tensor

    def largest(self, tensor: Tensor) -> Tensor:
        """Take the largest of each number of a tensor over all learners."""
        if self.count > 1:
            tensor = tensor.clone()
            distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
        return tensor


def share_out(costs: Sequence[int], count: int) -> list[int]:
    """Share out pieces of work so that the largest share is small: the costliest first, to who has least.

    Args:
        costs: What each piece costs.
        count: How many learners there are.

    Returns:
        The learner of each piece. Ties go to the earlier piece and to the earlier learner.

    References:
        Graham 1969, https://doi.org/10.1137/0117039: at most 4/3 - 1/(3 count) times the best.
    """
    loads, owners = [0] * count, [0] * len(costs)
    for piece in np.argsort(-np.asarray(costs, dtype=np.int64), kind="stable"):
        owner = min(range(count), key=loads.__getitem__)
        owners[piece] = owner
        loads[owner] += costs[piece]
    return owners


def rank() -> int:
    """Which process of its group this one is; 0 for a process alone."""
    return int(os.environ["RANK"]) if distributed.is_torchelastic_launched() else 0


def launched() -> int:
    """Count the processes of the group in which torch's launcher started this one; 1 for a process alone."""
    return int(os.environ["WORLD_SIZE"]) if distributed.is_torchelastic_launched() else 1


@contextlib.contextmanager
def join(config: Config) -> Iterator[tuple[Learners, Config]]:
    """Meet the other learners of a run, until the end of the block; a group that they made already is used.

    Args:
        config: The run. `cluster.learners` must be how many were launched; if it is 1, it becomes that.

    Yields:
        The learners, and the configuration with their number.

    Raises:
        ConfigError: More or fewer learners were launched than are configured.
        At2poError: That of the block; with several learners, its message names this one.
    """
    count, wanted = launched(), config.cluster.learners
    if wanted not in (1, count):
        raise ConfigError(
            f"cluster.learners: {wanted} learners are configured, and this is "
            f"{'a process alone' if count == 1 else f'a group of {count}'}. Fix: start the run with at2po "
            f"train, or a program with torchrun --nproc-per-node {wanted}; or set cluster.learners={count}"
        )
    if count == 1:
        yield Learners(), config
        return
    config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"learners": count})})
    check_learners(config, here=int(os.environ["LOCAL_WORLD_SIZE"]))
    device = torch.device(config.model.device).type
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "gloo" if device == "cpu" else f"cpu:gloo,{device}:nccl"
    if not config.run.threads:  # torch's choice is all cores, for each process
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        torch.set_num_threads(max(1, torch.get_num_threads() // here))
    own = not distributed.is_initialized()
    if own:
        distributed.init_process_group(backend, timeout=PATIENCE)
    try:
        yield Learners(rank(), count, device), config
    except At2poError as error:
        error.args = (f"learner {rank()}: {error}",)
        raise
    finally:
        if own:
            distributed.destroy_process_group()


def check_learners(config: Config, *, here: int) -> None:
    """Make sure that a configuration can be trained by several learners.

    Args:
        config: The run; how many questions a minibatch must have is checked where it is read.
        here: How many learners this machine gets.

    Raises:
        ConfigError: It cannot.
    """
    device = torch.device(config.model.device)
    if device.index is not None:
        raise ConfigError(
            f"model.device: {config.model.device} is one device, and there are {config.cluster.learners} "
            f"learners; each takes one of its own. Fix: model.device={device.type}"
        )
    if device.type == "cuda" and here > torch.cuda.device_count():
        raise ConfigError(
            f"cluster.learners: {here} learners on this machine need a GPU each, and it has "
            f"{torch.cuda.device_count()}. Fix: fewer learners, or model.device=cpu"
        )
    if config.model.lora is not None:
        raise ConfigError(
            "model.lora: adapters are not supported with several learners "
            f"(cluster.learners={config.cluster.learners}). Fix: cluster.learners=1"
        )
    if config.model.sampler != "hf":
        raise ConfigError(
            f"model.sampler: {config.model.sampler} is not supported with several learners "
            f"(cluster.learners={config.cluster.learners}). Fix: model.sampler=hf"
        )
