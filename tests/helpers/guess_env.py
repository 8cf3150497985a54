"""A twenty-line environment and a policy of three lines: what the agent's tests grow trees with."""

from collections.abc import Sequence
from typing import Any

import numpy as np

import at2po_env
from at2po_agent.policies.base import Request
from at2po_agent.types import Generation
from at2po_env.data.tasks import Task
from at2po_env.spaces import Text

TURNS = 4


class GuessEnv(at2po_env.ForkableEnv):
    """Find a digit: each turn names one ("7!"), the environment answers "higher" or "lower"."""

    def __init__(self, broken_guess: int | None = None) -> None:
        self.action_space = Text()
        self.observation_space = Text()
        self.tasks = at2po_env.TaskList(
            [Task(str(digit), f"Which digit is {digit}?", (str(digit),), {}) for digit in range(10)]
        )
        self._broken_guess = broken_guess
        self._state: tuple[int, int] = (0, 0)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        digit = int(self.np_random.integers(len(self.tasks))) if options is None else options["index"]
        self._state = (digit, 0)
        return "Guess a digit:\n", {"task_id": str(digit), "stop": ("!",)}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        (digit, turn), guess = self._state, int(action[0]) if action[:1].isdigit() else -1
        self._state = (digit, turn + 1)
        if guess == self._broken_guess:
            raise RuntimeError("the server is down")
        scores = {"em": float(guess == digit), "f1": float(guess == digit), "answer": action}
        if guess == -1:
            return "", -1.0, True, False, {"outcome": "malformed", "reason": "no digit", **scores}
        if guess == digit:
            return "", 1.0, True, False, {"outcome": "answer", **scores}
        if turn + 1 == TURNS:
            return "", 0.0, False, True, {"outcome": "limit", **scores}
        return ("higher\n" if digit > guess else "lower\n"), 0.0, False, False, {"outcome": "tool"}

    def get_state(self) -> tuple[int, int]:
        return self._state

    def set_state(self, state: tuple[int, int]) -> None:
        self._state = state

    def dump_state(self, state: tuple[int, int]) -> Any:
        return list(state)

    def load_state(self, data: Any) -> tuple[int, int]:
        return (data[0], data[1])


class CharTokenizer:
    """One id per character; id 0 ends a sequence."""

    eos_id = 0

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


class SmallTokenizer:
    """One id for each of the characters that occur; id 0 ends a sequence."""

    eos_id = 0
    alphabet = "\0!\n0123456789Gues adigt:hrlow"

    def encode(self, text: str) -> list[int]:
        return [self.alphabet.index(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.alphabet[index] for index in ids)


class GuessingPolicy:
    """Guesses a uniform digit drawn from the request's seed."""

    tokenizer = CharTokenizer()

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def answer(self, request: Request) -> Generation:
        self.requests.append(request)
        digit = int(np.random.default_rng(request.seed).integers(10))
        log_probs = np.array([np.log(0.1), 0.0], dtype=np.float32)
        return Generation((ord("0") + digit, ord("!")), log_probs, "stop")

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        return [self.answer(request) for request in requests]
