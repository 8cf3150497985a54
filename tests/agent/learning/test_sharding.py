from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.forests import random_forest, tiny_model
from torch import distributed, multiprocessing, nn

from at2po_agent.learning.learner import weight_change
from at2po_agent.packing.trees import pack_trees

PROCESSES = 2


def gradient(model: nn.Module) -> torch.Tensor:
    """Of a sum over the log-probs of a forest, in several packs."""
    forest, advantages = random_forest(5)
    batch = pack_trees(forest, advantages)
    with batch.attention(model):
        for _, pack in batch.micro_batches(40):
            (pack.log_probs(model) * pack.advantages).sum().backward()
    grads = (p.grad for p in model.parameters() if p.grad is not None)
    return torch.cat([getattr(grad, "full_tensor", lambda grad=grad: grad)().flatten() for grad in grads])


def change(model: nn.Module) -> float:
    """Of all weights when each grows by a hundredth."""
    weights = list(model.parameters())
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight.mul_(1.01)
    return float(weight_change(before, weights))


def work(rank: int, folder: str) -> None:
    """One process: the gradient of the whole model against that of its shards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    try:
        whole, sharded = (tiny_model(dtype=torch.float32) for _ in range(2))
        mesh = init_device_mesh("cpu", (PROCESSES,))
        for layer in sharded.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        expected, got = gradient(whole), gradient(sharded)
        moved = [change(model) for model in (whole, sharded)]
        if rank == 0:
            error = float((got - expected).norm() / expected.norm())
            Path(folder, "result.json").write_text(
                json.dumps({"error": error, "size": float(expected.norm()), "moved": moved})
            )
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
def test_a_sharded_model_has_the_gradient_of_the_whole_one(tmp_path: Path) -> None:
    multiprocessing.spawn(work, args=(str(tmp_path),), nprocs=PROCESSES)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["size"] > 0.1
    assert result["error"] < 1e-6
    whole, sharded = result["moved"]
    assert whole > 0.01
    assert sharded == pytest.approx(whole, rel=1e-5)
