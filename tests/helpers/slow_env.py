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
from at2po_env.spaces import Text

TURNS = 5
Wait = Callable[[str], None]


def no_wait(action: str) -> None:
    del action


class SlowEnv(at2po_env.ForkableEnv):
    """Answers any action with a digest of the episode so far; every fourth digest ends the episode.

    Args:
        wait: Called within every step, in whatever thread that is.
    """

    def __init__(self, wait: Wait = no_wait) -> None:
        self.action_space = Text()
        self.observation_space = Text()
        self.tasks = at2po_env.TaskList(
            [Task(str(number), f"Task {number}?", (), {}) for number in range(20)]
        )
        self.wait = wait
        self._state: tuple[int, int] = (0, 0)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        index = int(self.np_random.integers(20)) if options is None else options["index"]
        self._state = (index, 0)
        return f"Task {index}?\n", {"task_id": str(index), "stop": ("!",)}

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

    def get_state(self) -> tuple[int, int]:
        return self._state

    def set_state(self, state: tuple[int, int]) -> None:
        self._state = state

    def dump_state(self, state: tuple[int, int]) -> Any:
        return list(state)

    def load_state(self, data: Any) -> tuple[int, int]:
        return (data[0], data[1])


class AsciiTokenizer:
    """One id for each of the 128 characters; id 0 ends a sequence."""

    eos_id = 0

    def __len__(self) -> int:
        return 128

    def encode(self, text: str) -> list[int]:
        return list(text.encode("ascii"))

    def decode(self, ids: Any) -> str:
        return bytes(ids).decode("ascii")


def small_policy(slots: int = 64) -> HFPolicy:
    """A transformers model of random weights over `AsciiTokenizer`'s ids."""
    sizes = {"hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn_size": 48}
    model = build_model(ModelShape(vocab_size=128, **sizes), seed=1)
    return HFPolicy(model, AsciiTokenizer(), slots=slots)


def step_threads() -> list[threading.Thread]:
    """Return the threads of rollouts that are alive."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("at2po-step")]
