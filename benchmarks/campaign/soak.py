"""Lets one process train, search, evaluate and call tools over and over, and watches what it holds.

After each round it notes its memory, threads, open files and processes, and the bytes of its folder.
The medians of the first and of the last quarter of the rounds are printed; they may differ by
no more than the limits below. The first rounds, in which libraries load and caches fill, do not count.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from at2po_env import Snapshot, TextVectorEnv, restore, snapshot
from at2po_env.data.corpus import Passage
from at2po_env.retrieval.bm25.retriever import Bm25Retriever
from at2po_env.retrieval.cache import CachedRetriever
from at2po_env.retrieval.client import HttpRetriever
from at2po_env.retrieval.server.app import ServerConfig
from at2po_env.retrieval.server.running import serving
from at2po_env.tools import PythonTool, SearchTool
from at2po_env.tools.base import ToolContext, call_tool
from benchmarks.campaign.runs import make_env, train

LIMITS = {"memory_mb": (1.05, 16.0), "threads": (1.0, 1.0), "files": (1.0, 3.0), "processes": (1.0, 1.0)}
LIMITS |= {"disk_mb": (1.0, 1.0)}
"""Growth that is allowed: a factor of the first quarter's median, and an amount on top of it."""


def soak(folder: Path, *, minutes: float) -> dict[str, Any]:
    """Go round after round for some minutes.

    Returns:
        Rounds, the medians of the first and the last quarter of what was watched, and under `failures` what
        grew beyond its limit.
    """
    torch.set_num_threads(1)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng, end = random.Random(0), time.monotonic() + 60 * minutes
    seen: list[dict[str, float]] = []
    passages = [Passage(str(n), f"Title {n}", f"the first program of number {n}", 1.0) for n in range(50)]
    with serving(Bm25Retriever.from_passages(passages), ServerConfig(port=0)) as url:
        retriever = HttpRetriever(url=url)
        while len(seen) < 12 or time.monotonic() < end:
            _round(folder, retriever, rng)
            gc.collect()
            seen.append(_held(folder))
    counted = seen[len(seen) // 10 :]
    quarter = max(1, len(counted) // 4)
    figures: dict[str, Any] = {}
    failures = []
    for name, (factor, more) in LIMITS.items():
        first = statistics.median(one[name] for one in counted[:quarter])
        last = statistics.median(one[name] for one in counted[-quarter:])
        figures[name] = {"first_quarter": round(first, 2), "last_quarter": round(last, 2)}
        if last > first * factor + more:
            failures.append(f"{name} grew from {first:.2f} to {last:.2f}")
    return {"kind": "soak", "minutes": minutes, "rounds": len(seen), **figures, "failures": failures}


def _round(folder: Path, retriever: HttpRetriever, rng: random.Random) -> None:
    """Train and evaluate, search with and without a cache, call tools, restore snapshots, step in threads."""
    run = folder / "run"
    train(run)
    shutil.rmtree(run)
    cached = CachedRetriever(retriever, folder / "cache.sqlite", max_results=50)
    for source in (retriever, cached):
        source.search([f"program {rng.randrange(200)}" for _ in range(20)], 3)
    cached.cache.close()
    env = make_env()
    context = ToolContext(env.tasks[0], None, 0, 0)
    call_tool(SearchTool(retriever), {"query": "program"}, context)
    call_tool(
        PythonTool(timeout_s=2.0), {"code": rng.choice(("print(1)", "1 / 0", "raise SystemExit(3)"))}, context
    )
    env.reset(seed=rng.randrange(1 << 30))
    for _ in range(50):
        restore(env, Snapshot.from_json(snapshot(env).to_json()))
    envs = TextVectorEnv([make_env] * 4)
    envs.reset(seed=0)
    envs.step(["<note>x</note>", "x", "", "<answer>x</answer>"])
    envs.close()


def _held(folder: Path) -> dict[str, float]:
    """What this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    own = Path("/proc/self/task").glob("*/children")
    return {
        "memory_mb": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        "threads": float(len(os.listdir("/proc/self/task"))),
        "files": float(len(os.listdir("/proc/self/fd"))),
        "processes": float(sum(len(path.read_text().split()) for path in own)),
        "disk_mb": _bytes_below(folder) / 1e6,
    }


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size
        except OSError:  # it has just gone, or is another user's
            continue
    return total
