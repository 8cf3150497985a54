"""Compares the turn-level loss of AT2PO with the token-level loss of GRPO, forward and backward.

    python -m benchmarks.losses --json

Both take the same four tensors of the published size, 88 rows of 6,192 tokens, take turns, and compute the
loss, its metrics and the gradient of the log-probs. `turn_loss_ms` and `token_loss_ms` are medians over the
rounds, `ratio` is their quotient; the quartiles of both and the quotient of the fastest rounds tell how quiet
the machine was.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from at2po_agent.losses import atpo_loss, grpo_loss
from benchmarks._timing import Case, command_line, measure, report

ROWS, TOKENS, TURNS = 88, 6192, 7


def published_rows(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, old log-probs, advantages and turn ids of one minibatch.

    Up to seven turns per row, each an action after an observation of about the same length; ragged ends.
    """
    rng = np.random.default_rng(seed)
    turn_ids = np.full((ROWS, TOKENS), -1)
    per_turn = rng.normal(size=(ROWS, TURNS))
    for row in range(ROWS):
        cuts = np.sort(rng.integers(1, TOKENS, 2 * int(rng.integers(2, TURNS + 1))))
        for turn, (start, end) in enumerate(zip(cuts[::2], cuts[1::2], strict=True)):
            turn_ids[row, start:end] = turn
    advantages = np.where(turn_ids >= 0, np.take_along_axis(per_turn, np.maximum(turn_ids, 0), 1), 0.0)
    old = -rng.exponential(size=turn_ids.shape)
    log_probs = old + 0.02 * rng.normal(size=turn_ids.shape)
    floats = (torch.from_numpy(x.astype(np.float32)) for x in (log_probs, old, advantages))
    return (*floats, torch.from_numpy(turn_ids))  # type: ignore[return-value]


def forward_backward(loss: Callable[..., tuple[Tensor, dict[str, Tensor]]], rows: tuple[Tensor, ...]) -> Case:
    """One update's work on the log-probs: loss, metrics, gradient."""
    leaf = rows[0].clone().requires_grad_()

    def run() -> None:
        leaf.grad = None
        value, _ = loss(leaf, *rows[1:])
        value.backward()  # type: ignore[no-untyped-call]

    return Case(run)


def run(rounds: int) -> dict[str, Any]:
    """Time both losses in turns."""
    rows = published_rows()
    cases = {"token": forward_backward(grpo_loss, rows), "turn": forward_backward(atpo_loss, rows)}
    timings = measure(cases, rounds=rounds, warmup=5)
    token, turn = timings["token"], timings["turn"]
    return {
        "turn_loss_ms": turn.median * 1e3,
        "token_loss_ms": token.median * 1e3,
        "ratio": turn.median / token.median,
        "ratio_of_fastest": turn.best / token.best,
        "turn_loss_ms_quartiles": [turn.low * 1e3, turn.high * 1e3],
        "token_loss_ms_quartiles": [token.low * 1e3, token.high * 1e3],
        "rows": ROWS,
        "tokens_per_row": TOKENS,
        "sampled_share": float((rows[3] >= 0).float().mean()),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "rounds": rounds,
    }


def main() -> None:
    """Command line."""
    options = command_line("Turn-level against token-level loss", rounds=51).parse_args()
    report(run(options.rounds), options)


if __name__ == "__main__":
    main()
