"""Compares one packed tree with one row per leaf: time and peak memory of forward and backward.

    python -m benchmarks.packing --json

Every case is one tree; three ways to the gradient of the same turn loss take turns. *padded*: rows in their
order, all as long as the longest, logits at every position. *sorted*: the learner's rows, sorted by length,
in micro-batches of at most 16,384 positions with their padding, logits only where a token is trained.
*packed*: the learner's packs of at most 16,384 tokens, every unique token once. Seconds are medians over the
rounds; the passes that compare the gradients come first and warm up.

Peak memory is the growth of the process's peak resident set during one forward and backward pass, in a
process of its own for each way, after a pass over a tiny tree has loaded every library.

`gradient_error` is the norm of the difference between the gradients of sorted and packed, relative to that of
sorted. `speedup` is sorted / packed; `goal` is 0.9 x flattened / unique tokens. `cuts` compares the cuts of
`prefixes.cut_branches` on small random trees with the best ones; `gpu` is a large model where there is a GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from at2po_agent.agents.model import ModelShape, build_model
from at2po_agent.learning.learner import checkpoint_activations
from at2po_agent.losses import LossTotals, atpo_loss
from at2po_agent.packing.batch import Batch, MicroBatch
from at2po_agent.packing.log_probs import token_stats
from at2po_agent.packing.prefixes import SortedBranches, cut_branches, lower_bound, sort_branches
from at2po_agent.packing.rows import RowBatch, pack_rows
from at2po_agent.packing.trees import check_model, pack_trees
from at2po_agent.tree import Tree
from benchmarks._timing import Case, command_line, measure, peak_kb, report
from benchmarks.random_trees import TreeShape, advantages, random_tree

BUDGET = 16_384
GPU_BUDGET = 65_536
SHAPE = ModelShape(vocab_size=4096, hidden_size=256, layers=6, heads=8, kv_heads=4, head_dim=32, ffn_size=768)
LONG = (150, 350)
CASES: Mapping[str, TreeShape] = {
    "published, short observations": TreeShape(),
    "published, long observations": TreeShape(observation=LONG),
    "1 leaf": TreeShape(chains=1, forks=0),
    "2 leaves": TreeShape(chains=2, forks=0),
    "4 leaves": TreeShape(chains=2, forks=1),
    "8 leaves": TreeShape(chains=4, forks=2),
    "16 leaves": TreeShape(chains=8, forks=4),
    "32 leaves": TreeShape(chains=16, forks=8),
    "64 leaves": TreeShape(chains=32, forks=16),
}
WAYS = ("padded", "sorted", "packed")


def passes(model: nn.Module, tree: Tree) -> dict[str, Callable[[], Tensor]]:
    """Forward and backward of each way; gradients go to the model's parameters."""
    rows, packs = pack_rows([tree], [advantages(tree)]), pack_trees([tree], [advantages(tree)])
    return {
        "padded": partial(_padded, model, rows),
        "sorted": partial(_cut, model, rows),
        "packed": partial(_cut, model, packs),
    }


def _padded(model: nn.Module, batch: RowBatch) -> Tensor:
    totals, total = LossTotals.of(batch.turn_ids), torch.zeros(())
    for chosen in torch.split(torch.arange(len(batch.turn_ids)), max(1, BUDGET // batch.turn_ids.shape[1])):
        piece = batch.select(chosen)
        logits = model(input_ids=piece.input_ids, use_cache=False).logits
        found = token_stats(logits[:, :-1], piece.input_ids[:, 1:], with_entropies=False).log_probs
        total += _loss(nn.functional.pad(found, (1, 0)), piece, totals)
    return total


def _cut(model: nn.Module, batch: Batch, budget: int = BUDGET, device: str = "cpu") -> Tensor:
    totals, total = LossTotals.of(batch.turn_ids), torch.zeros((), device=device)
    with batch.attention(model):
        for _, part in batch.micro_batches(budget):
            piece = part.to(device)
            total += _loss(piece.log_probs(model), piece, totals)
    return total


def _loss(log_probs: Tensor, piece: MicroBatch, totals: LossTotals) -> Tensor:
    now = log_probs.detach()
    old = torch.where(piece.turn_ids >= 0, now + 1e-3 * torch.sin(37 * now), 0.0)
    loss, _ = atpo_loss(log_probs, old, piece.advantages, piece.turn_ids, totals=totals)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def gradient(model: nn.Module, way: Callable[[], Tensor]) -> Tensor:
    """The gradient of all parameters as one vector."""
    model.zero_grad()
    way()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()


def run_case(
    name: str, model: nn.Module, *, rounds: int, clock: Callable[[], float], memory: bool
) -> dict[str, Any]:
    """Time one tree, all ways in turns."""
    tree = random_tree(CASES[name], vocabulary=SHAPE.vocab_size, seed=0)
    ways = passes(model, tree)
    packs = pack_trees([tree], [advantages(tree)])
    exact = gradient(model, ways["sorted"])
    error = float((gradient(model, ways["packed"]) - exact).norm() / exact.norm())
    prepare = partial(model.zero_grad, set_to_none=True)
    timings = measure(
        {way: Case(run, prepare=prepare) for way, run in ways.items()}, rounds=rounds, warmup=0, clock=clock
    )
    ratio = packs.flattened_tokens / packs.unique_tokens
    result = {
        "case": name,
        "leaves": len(tree.leaves()),
        "flattened_tokens": packs.flattened_tokens,
        "unique_tokens": packs.unique_tokens,
        "trained_tokens": int((packs.turn_ids >= 0).sum()),
        **{f"{way}_s": timings[way].median for way in WAYS},
        **{f"{way}_best_s": timings[way].best for way in WAYS},
        "speedup": timings["sorted"].median / timings["packed"].median,
        "speedup_of_fastest": timings["sorted"].best / timings["packed"].best,
        "goal": 0.9 * ratio,
        "gradient_error": error,
    }
    if memory:
        result |= {f"{way}_peak_mb": peak_mb(name, way) for way in WAYS}
    return result


def peak_mb(name: str, way: str) -> float:
    """Growth of the peak resident set by one pass, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.packing", "--peak", name, way]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def _measure_peak(name: str, way: str) -> float:
    model = build_model(SHAPE, seed=0)
    check_model(model)
    tiny = TreeShape(2, 0, turns=(1, 1), prompt=(4, 4), action=(4, 4))
    passes(model, random_tree(tiny, vocabulary=SHAPE.vocab_size, seed=0))[way]()
    run = passes(model, random_tree(CASES[name], vocabulary=SHAPE.vocab_size, seed=0))[way]
    before = peak_kb()
    run()
    return (peak_kb() - before) / 1024


def on_gpu(rounds: int) -> dict[str, Any] | str:
    """Qwen3-4B's shape with random weights in bf16 on a published tree: time, memory, FLOPs of packed."""
    if not torch.cuda.is_available():
        return "skipped: no GPU"
    shape = ModelShape(
        vocab_size=151_936, hidden_size=2560, layers=36, heads=32, kv_heads=8, head_dim=128, ffn_size=9728
    )
    model = build_model(shape, seed=0, dtype="bfloat16", device="cuda")
    long = TreeShape(observation=(300, 700), action=(100, 300))
    tree = random_tree(long, vocabulary=shape.vocab_size, seed=0)
    rows, packs = pack_rows([tree], [advantages(tree)]), pack_trees([tree], [advantages(tree)])
    checkpoint_activations(model)
    check_model(model)
    model.train()

    def timed(batch: Batch, budget: int) -> Case:
        def run() -> None:
            _cut(model, batch, budget, "cuda")
            torch.cuda.synchronize()

        return Case(run, prepare=partial(model.zero_grad, set_to_none=True))

    cases = {"sorted": timed(rows, BUDGET), "packed": timed(packs, GPU_BUDGET)}
    timings = measure(cases, rounds=rounds, warmup=2)
    # The model's FLOPs of forward and backward; recomputation is not counted.
    head = shape.vocab_size * shape.hidden_size
    flops = 6.0 * (sum(p.numel() for p in model.parameters()) - head) * packs.unique_tokens
    for _, piece in packs.micro_batches(GPU_BUDGET):
        pairs = float(piece.position_ids.double().add(1).sum())
        flops += 6.0 * head * len(piece.targets) + 12.0 * shape.layers * shape.heads * shape.head_dim * pairs
    rate = flops / timings["packed"].median
    return {
        "device": torch.cuda.get_device_name(),
        "flattened_tokens": packs.flattened_tokens,
        "unique_tokens": packs.unique_tokens,
        **{f"{way}_s": timing.median for way, timing in timings.items()},
        "tera_flops_per_second": rate / 1e12,
        "utilisation_of_989_teraflops": rate / 989e12,
        "peak_gb": torch.cuda.max_memory_allocated() / 2**30,
    }


def cut_quality(trees: int = 2000, seed: int = 0) -> dict[str, float]:
    """Cuts of small random trees against the best of all groupings of their branches, by exhaustive search.

    Returns:
        optimal: Share of trees that were cut as well as possible; excess_mean and excess_max: tokens over the
        best, relative to it; bound_excess_mean: the same over `lower_bound`.
    """
    rng = np.random.default_rng(seed)
    excess, over_bound = [], []
    for _ in range(trees):
        tree = random_tree(
            TreeShape(int(rng.integers(2, 5)), int(rng.integers(1, 4)), 1, (1, 5), (5, 40), (3, 20), (3, 20)),
            vocabulary=50,
            seed=int(rng.integers(1 << 31)),
        )
        rows = sort_branches([np.array(tree.branch_ids(leaf)) for leaf in tree.leaves()])
        budget = int(rng.integers(rows.lengths.max(), rows.unique_tokens + 1))
        got = sum(_size(rows, cut) for cut in cut_branches(rows, budget))
        best = _best_grouping(rows, budget)
        excess.append(got / best - 1)
        over_bound.append(got / lower_bound(rows, budget) - 1)
    return {
        "optimal": float(np.mean(np.array(excess) == 0)),
        "excess_mean": float(np.mean(excess)),
        "excess_max": float(np.max(excess)),
        "bound_excess_mean": float(np.mean(over_bound)),
    }


def _size(rows: SortedBranches, cut: slice) -> int:
    return int((rows.lengths[cut] - rows.shared[cut]).sum() + rows.shared[cut.start])


def _best_grouping(rows: SortedBranches, budget: int) -> int:
    """The fewest tokens over all set partitions of the branches into packs within the budget."""
    count = len(rows.order)
    sizes = {}
    for chosen in range(1, 1 << count):
        part = rows.keep(rows.order[[i for i in range(count) if chosen >> i & 1]])
        sizes[chosen] = part.unique_tokens
    best = {0: 0}
    for chosen in range(1, 1 << count):
        first, part, options = chosen & -chosen, chosen, []
        while part:
            if part & first and sizes[part] <= budget:
                options.append(sizes[part] + best[chosen ^ part])
            part = (part - 1) & chosen
        best[chosen] = min(options)
    return best[(1 << count) - 1]


def main() -> None:
    """Command line."""
    parser = command_line("Packed trees against rows", rounds=3)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU time of one thread: for a loaded machine"
    )
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(_measure_peak(*options.peak))
        return
    if options.cpu_time:
        torch.set_num_threads(1)
    clock = time.thread_time if options.cpu_time else time.perf_counter
    model = build_model(SHAPE, seed=0)
    names = [name for name in CASES if options.only in name]
    measured = []
    for number, name in enumerate(names, start=1):
        print(f"[{number}/{len(names)}] {name}", file=sys.stderr, flush=True)
        measured.append(
            run_case(name, model, rounds=options.rounds, clock=clock, memory=not options.no_memory)
        )
    result = {
        "cases": measured,
        "parameters": sum(p.numel() for p in model.parameters()),
        "clock": "CPU time of one thread" if options.cpu_time else f"wall, {torch.get_num_threads()} threads",
        "load": os.getloadavg()[0],
        "rounds": options.rounds,
        "gpu": on_gpu(options.rounds),
        "cuts": cut_quality(200),
    }
    report(result, options)


if __name__ == "__main__":
    main()
