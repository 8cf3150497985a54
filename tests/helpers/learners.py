"""A tiny model, a policy that guesses with its tokenizer, and a learner for them."""

from torch import nn

from at2po_agent.agents.model import ModelShape
from at2po_agent.config.sections import AlgorithmConfig, OptimizerConfig
from at2po_agent.learning.learner import Learner, Objective, make_optimizer
from at2po_agent.learning.step import give_credit
from at2po_agent.packing.rows import RowBatch, pack_rows
from at2po_agent.rollout import RolloutConfig, rollout
from helpers.guess_env import GuessEnv, GuessingPolicy, SmallTokenizer

SHAPE = ModelShape(
    vocab_size=len(SmallTokenizer.alphabet),
    hidden_size=16,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=8,
    ffn_size=16,
)


class SmallGuesses(GuessingPolicy):
    tokenizer = SmallTokenizer()

    def answer(self, request):
        generation = super().answer(request)
        text = "".join(map(chr, generation.ids))
        return type(generation)(tuple(self.tokenizer.encode(text)), generation.log_probs, "stop")


def sampled_batch(count: int = 4, advantages: str = "tree") -> RowBatch:
    shape = RolloutConfig(chains=4, forks=2, rounds=1)
    trees = rollout([{"index": i} for i in range(count)], GuessEnv(), SmallGuesses(), shape, seed=1)
    credit = [give_credit(tree, AlgorithmConfig(credit=advantages)).advantages for tree in trees]
    return pack_rows(trees, credit)


def learner(
    model: nn.Module, *, budget: int = 10**6, loss: str = "atpo", lr: float = 1e-2, **options
) -> Learner:
    optimizer = make_optimizer(model, OptimizerConfig(lr=lr))
    objective = Objective.of(AlgorithmConfig(loss=loss, loss_options=options))
    return Learner(model, optimizer, objective, token_budget=budget, max_grad_norm=1e9)
