"""An agent of your own in the tree trainer: any model and any sampler behind `Policy.generate`.

The agent here is no language model at all: a bag of all ids so far, and logits over ready-made turns. It
knows nothing of trees; the trainer forks its episodes, gives its turns their credit and updates its weights.
"""

import tempfile
from collections.abc import Sequence
from types import SimpleNamespace
from zlib import crc32

import numpy as np
import torch
from custom_tool_env import STOCK  # registers examples/Warehouse-v0

from at2po_agent.agents.agent import Agent
from at2po_agent.config.sections import Config
from at2po_agent.policies.base import Request
from at2po_agent.run import run_training
from at2po_agent.types import Generation

TURNS = [f"<count>{item}</count>" for item in STOCK] + [f"<answer>{n}</answer>" for n in range(5, 17)]
READ = 128  # ids for what the agent reads, after those of the turns


class WholeTurns:
    """One id per ready-made turn; any other text is read as words, each hashed to an id."""

    eos_id = len(TURNS)

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        words = text.split()
        return (
            [TURNS.index(text)] if text in TURNS else [len(TURNS) + crc32(w.encode()) % READ for w in words]
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; words that were read do not come back."""
        return "".join(TURNS[i] for i in ids if i < len(TURNS))


class BagOfPrefix(torch.nn.Module):
    """Logits float[B, T, len(TURNS)] from the sum of all ids up to each position."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(len(TURNS) + READ, 64)
        self.head = torch.nn.Linear(64, len(TURNS))

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        """What the trainer calls; it reads `.logits`, as of a transformers model."""
        bag = self.embed(input_ids).cumsum(dim=1) / 4.0
        return SimpleNamespace(logits=self.head(torch.tanh(bag)))


class OneTurnSampler:
    """The agent's side of the protocol: token ids in; sampled ids, log-probs and stop reason out."""

    def __init__(self, model: BagOfPrefix) -> None:
        self.model, self.tokenizer = model, WholeTurns()

    @torch.no_grad()
    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Answer each request with one ready-made turn."""
        answers = []
        for request in requests:
            logits = self.model(torch.tensor([request.prefix_ids])).logits[0, -1]
            log_probs = logits.log_softmax(-1).double().numpy()
            if request.temperature == 0:
                chosen = int(log_probs.argmax())
            else:
                rng = np.random.default_rng(request.seed)
                chosen = int(rng.choice(len(TURNS), p=np.exp(log_probs) / np.exp(log_probs).sum()))
            answers.append(Generation((chosen,), log_probs[[chosen]].astype(np.float32), "stop"))
        return answers


def main(steps: int = 30) -> tuple[float, float]:
    """Train, and return the exact match before and after."""
    torch.manual_seed(0)
    model = BagOfPrefix()
    with tempfile.TemporaryDirectory() as folder:
        config = Config.model_validate(
            {
                # 15 questions are all there are: this agent can only remember, so none is held out.
                "env": {"id": "examples/Warehouse-v0", "kwargs": {"prompt": "short"}, "held_out": 0},
                "eval": {"questions": 15},
                "rollout": {"chains": 6, "forks": 3, "rounds": 2},
                "optimizer": {"lr": 0.03},
                "train": {"steps": steps, "questions": 4, "minibatch_questions": 4},
                "run": {"dir": f"{folder}/run"},
            }
        )
        summary = run_training(config, agent=Agent(model, OneTurnSampler(model)))
    return summary["sampled_em_before"], summary["sampled_em_after"]


if __name__ == "__main__":
    print("exact match, sampled, before and after:", main())
