"""Losses by name, and the errors a configuration can meet."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from helpers.loss_batches import LOSSES, random_rows
from torch import Tensor

from at2po_agent.losses import LossTotals, get_loss, make_loss, register_loss, registry


@pytest.fixture
def own_names() -> Iterator[None]:
    before = dict(registry._LOSSES)
    yield
    registry._LOSSES.clear()
    registry._LOSSES.update(before)


def test_all_built_in_losses_are_registered() -> None:
    code = (
        "from at2po_agent.losses import loss_names; print(*loss_names())"  # without what other tests register
    )
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert fresh.split() == sorted(LOSSES)
    for name, function in LOSSES.items():
        assert get_loss(name).function is function


def test_options_reach_the_loss() -> None:
    rows = random_rows(5, 4, 30, 3, 1e-2)
    default, _ = make_loss("atpo")(*rows)
    wide, _ = make_loss("atpo", {"clip_low": 0.5, "clip_high": 0.5})(*rows)
    assert not torch.equal(default, wide)
    assert torch.equal(default, LOSSES["atpo"](*rows)[0])
    assert get_loss("atpo").options == {"clip_low": 3e-3, "clip_high": 4e-3, "aggregation": "branch"}
    assert "entropies" not in get_loss("aepo").options


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("apto", {}, "unknown loss 'apto'; registered names: aepo, atpo"),
        ("atpo", {"clip": 0.1}, "loss 'atpo' has no option clip; its options: clip_low, clip_high"),
        ("atpo", {"totals": None}, "loss 'atpo' has no option totals"),
        (
            "grpo",
            {"clip_low": -0.1},
            "loss 'grpo' refuses its options.*clip_low must be at least 0, got -0.1",
        ),
        ("grpo", {"dual_clip": 1.0}, "dual_clip must be greater than 1"),
        ("grpo", {"clip_high": "wide"}, "loss 'grpo' refuses its options"),
        ("aepo", {"entropy_weight": -1.0}, "entropy_weight must be at least 0"),
    ],
)
def test_bad_names_and_options_are_refused_before_training(
    name: str, options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_loss(name, options)


def test_aepo_cannot_lose_its_entropies_unnoticed() -> None:
    rows = random_rows(5, 4, 30, 3, 1e-2)
    loss = make_loss("aepo")
    with pytest.raises(ValueError, match="'aepo' needs entropies"):
        loss(*rows)
    entropies = rows.old_log_probs.square()
    value, metrics = loss(*rows, entropies=entropies, totals=LossTotals.of(rows.turn_ids, entropies))
    assert float(metrics["entropy_scale"]) > 0
    assert not torch.equal(value, LOSSES["aepo"](*rows)[0])


@pytest.mark.usefixtures("own_names")
def test_users_register_one_pure_function() -> None:
    def reinforce_loss(
        log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, turn_ids: Tensor, *, scale: float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        del old_log_probs
        sampled = turn_ids >= 0
        return -scale * (advantages * log_probs)[sampled].sum(), {}

    register_loss("reinforce", reinforce_loss)
    register_loss("reinforce", reinforce_loss)
    rows = random_rows(5, 4, 30, 3, 1e-2)
    once, _ = make_loss("reinforce")(*rows)
    twice, _ = make_loss("reinforce", {"scale": 2.0})(*rows)
    torch.testing.assert_close(twice, 2 * once)
    with pytest.raises(ValueError, match="a loss named 'atpo' exists already"):
        register_loss("atpo", reinforce_loss)
