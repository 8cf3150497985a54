"""Makes the training runs of a benchmark: several at a time, each with a file of figures once it is finished.

A run that has its file is not made again, so a command that was stopped goes on where it was.
"""

import json
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

JobT = TypeVar("JobT")


def make_runs(work: Callable[[JobT], str], jobs: Sequence[JobT], processes: int) -> None:
    """Do jobs in processes of their own, with one thread each, and print how each of them ended.

    A run that fails is printed, and the others go on. It leaves no file, so the next call tries it again.

    Args:
        work: Does one job and writes its file; returns a line about it.
        jobs: What is missing.
        processes: How many run at a time.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn, initializer=_use_one_thread) as pool:
        for number, done in enumerate(as_completed([pool.submit(work, job) for job in jobs]), start=1):
            error = done.exception()
            line = done.result() if error is None else f"failed: {type(error).__name__}: {error}"
            print(f"[{number}/{len(jobs)}] {line}", flush=True)


def _use_one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def write_figures(path: Path, figures: Mapping[str, Any]) -> None:
    """Write the figures of a finished run; the file appears when it is whole."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    partial.replace(path)
