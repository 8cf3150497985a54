"""An environment that takes as long as a test wants, and a small transformers policy for it."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable
from typing import Any

import at2po_env
from at2po_agent.agents.model import ModelShape, build_model
from at2po_agent.policies.hf.policy import HFPolicy
from at2po_env.data.tasks import Task
from helpers.guess_env import CharTokenizer, GuessEnv

TURNS = 5
Wait = Callable[[str], None]


def no_wait(action: str) -> None:
    del action


class SlowEnv(GuessEnv):
    """Answers any action with a digest of the episode so far; every fourth digest ends the episode.

    Args:
        wait: Called within every step, in whatever thread that is.
    """

    def __init__(self, wait: Wait = no_wait) -> None:
        super().__init__()
        self.tasks = at2po_env.TaskList([Task(str(n), f"Task {n}?", (), {}) for n in range(20)])
        self.wait = wait

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        _, info = super().reset(seed=seed, options=options)
        return f"Task {info['task_id']}?\n", info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        before = self._state
        self.wait(action)
        assert self._state == before, "somebody else touched this environment during its step"
        digest, turn = zlib.crc32(f"{before} {action}".encode()), before[1] + 1
        self._state = (digest, turn)
        reward = digest % 100 / 100
        if digest % 4 == 0:
            return "", reward, True, False, {"outcome": "answer", "em": float(reward > 0.5)}
        if turn == TURNS:
            return "", reward, False, True, {"outcome": "limit"}
        return f" {digest % 1000}\n", 0.0, False, False, {"outcome": "tool"}


class AsciiTokenizer(CharTokenizer):
    """One id for each of the 128 characters; id 0 ends a sequence."""

    def __len__(self) -> int:
        return 128


def small_policy(slots: int = 64) -> HFPolicy:
    """A transformers model of random weights over `AsciiTokenizer`'s ids."""
    sizes = {"hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn_size": 48}
    model = build_model(ModelShape(vocab_size=128, **sizes), seed=1)
    return HFPolicy(model, AsciiTokenizer(), slots=slots)


def step_threads() -> list[threading.Thread]:
    """Return the threads of rollouts that are alive."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("at2po-step")]
