"""Compares the transformers policy with `model.generate` on one tree-like workload, in the same run.

    python -m benchmarks.policy --json

Questions of several chains each, several turns per chain, ragged prompts, actions and observations; then
forks of random turns. Each sampler is used as it allows. The policy streams: a branch goes on as soon as its
own action is there. `generate` gets a round, the next turn of every branch, as one left-padded batch and runs
to its longest budget; only tokens that were asked for count as sampled. The policy is also measured in rounds
(`hf_policy_rounds_tokens_per_s`). Same model, same threads, interleaved; the best of the repeats counts.
`prefill_over_unique`: prefix tokens that the policy computed, over the distinct ones that no sampling fed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads would measure the neighbours' load

import torch
from transformers import PreTrainedModel

from at2po_agent.agents.model import ModelShape, build_model, train_tokenizer
from at2po_agent.policies.base import Request
from at2po_agent.policies.hf.policy import HFPolicy
from at2po_agent.transcripts.tokenizer import HFTokenizer
from benchmarks._timing import command_line, report

_VOCABULARY = 512
_PAD = 0


@dataclass(frozen=True)
class Workload:
    """Sizes of the trees; lengths are drawn uniformly from (low, high)."""

    questions: int = 16
    chains: int = 6
    forks: int = 6
    turns: int = 4
    prompt: tuple[int, int] = (60, 120)
    action: tuple[int, int] = (10, 50)
    observation: tuple[int, int] = (50, 90)

    @property
    def slots(self) -> int:
        """Sequences that are under way together."""
        return self.questions * max(self.chains, self.forks)


@dataclass
class _Branch:
    """One chain: its ids so far, and what it will still do: (observation, action length) per turn."""

    ids: tuple[int, ...]
    turns: list[tuple[tuple[int, ...], int]]
    seed: int
    starts: list[tuple[int, ...]] = field(default_factory=list)

    def ask(self) -> Request:
        """Show the next observation; returns what the policy is asked for then."""
        observation, length = self.turns.pop(0)
        self.ids += observation
        self.starts.append(self.ids)
        return Request(self.ids, length, seed=self.seed + len(self.starts))


Roll: TypeAlias = Callable[[list[_Branch]], None]
"""Takes branches to their ends."""
Answer: TypeAlias = Callable[[list[Request]], list[tuple[int, ...]]]
"""The sampled ids of each request of a round."""


def make_model() -> PreTrainedModel:
    """The quickstart's model with a larger vocabulary, of random weights."""
    return build_model(ModelShape(vocab_size=_VOCABULARY), seed=0)


def make_tokenizer() -> HFTokenizer:
    """A tokenizer for it; the load has ids only."""
    return train_tokenizer(["a"], vocab_size=_VOCABULARY)


def _draw(rng: np.random.Generator, bounds: tuple[int, int]) -> tuple[int, ...]:
    return tuple(rng.integers(2, _VOCABULARY, rng.integers(*bounds, endpoint=True)).tolist())


def _turns(rng: np.random.Generator, work: Workload, first: int) -> list[tuple[tuple[int, ...], int]]:
    return [
        (_draw(rng, work.observation) if turn else (), int(rng.integers(*work.action, endpoint=True)))
        for turn in range(first, work.turns)
    ]


def grow_trees(work: Workload, roll: Roll, seed: int) -> tuple[int, float]:
    """Grow all trees; returns the number of tokens that were asked for, and the seconds it took."""
    rng = np.random.default_rng(seed)
    prompts = [_draw(rng, work.prompt) for _ in range(work.questions)]
    chains = [
        _Branch(prompt, _turns(rng, work, 0), 100 * number)
        for number, prompt in enumerate(prompt for prompt in prompts for _ in range(work.chains))
    ]
    asked = sum(length for branch in chains for _, length in branch.turns)
    start = time.perf_counter()
    roll(chains)
    seconds = time.perf_counter() - start
    forks = []
    for number in range(work.questions * work.forks):
        origin = chains[number // work.forks * work.chains + int(rng.integers(work.chains))]
        turn = int(rng.integers(work.turns))
        again = _turns(rng, work, turn)
        forks.append(_Branch(origin.starts[turn], [((), again[0][1]), *again[1:]], 100 * number + 50))
    asked += sum(length for branch in forks for _, length in branch.turns)
    start = time.perf_counter()
    roll(forks)
    return asked, seconds + time.perf_counter() - start


def streaming(policy: HFPolicy) -> Roll:
    """Every branch goes on as soon as its own action is there."""

    def roll(branches: list[_Branch]) -> None:
        live = {policy.submit(branch.ask()): branch for branch in branches}
        while live:
            for ticket, generation in policy.poll():
                branch = live.pop(ticket)
                branch.ids += generation.ids
                if branch.turns:
                    live[policy.submit(branch.ask())] = branch

    return roll


def rounds(answer: Answer) -> Roll:
    """All branches write a turn, then all see their observations."""

    def roll(branches: list[_Branch]) -> None:
        while live := [branch for branch in branches if branch.turns]:
            for branch, ids in zip(live, answer([branch.ask() for branch in live]), strict=True):
                branch.ids += ids

    return roll


def policy_answer(policy: HFPolicy) -> Answer:
    """Rounds answered by our policy."""
    return lambda requests: [generation.ids for generation in policy.generate(requests)]


def generate_answer(model: PreTrainedModel) -> Answer:
    """Rounds answered by transformers' `generate`, one left-padded batch each."""

    def answer(requests: list[Request]) -> list[tuple[int, ...]]:
        width = max(len(request.prefix_ids) for request in requests)
        missing = [width - len(request.prefix_ids) for request in requests]
        inputs = torch.tensor(
            [[_PAD] * m + list(r.prefix_ids) for m, r in zip(missing, requests, strict=True)]
        )
        mask = torch.tensor([[0] * m + [1] * (width - m) for m in missing])
        torch.manual_seed(requests[0].seed)
        output = model.generate(
            inputs=inputs.to(model.device),
            attention_mask=mask.to(model.device),
            do_sample=True,
            top_k=0,
            max_new_tokens=max(request.max_tokens for request in requests),
            pad_token_id=_PAD,
        )
        rows = output[:, width:].tolist()
        return [tuple(row[: request.max_tokens]) for row, request in zip(rows, requests, strict=True)]

    return answer


class Unique:
    """Counts the prefix tokens that had to be computed: distinct ones that no sampling has fed already."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self.tokens = 0

    def turn(self, prefix: tuple[int, ...], sampled: tuple[int, ...]) -> None:
        """The policy was asked to continue a prefix, and sampled these ids."""
        state = 0
        fed = prefix + sampled[:-1]  # the last sampled id is not fed while sampling
        for place, token in enumerate(fed):
            state = hash((state, token))
            if state not in self._seen:
                self._seen.add(state)
                self.tokens += place < len(prefix)


def prefill_over_unique(policy: HFPolicy, work: Workload, seed: int) -> float:
    """Prefix tokens that went through the model, over the distinct ones that had to."""
    unique, answer = Unique(), policy_answer(policy)
    policy.weights_changed()
    before = policy.stats.prefill_tokens

    def counted(requests: list[Request]) -> list[tuple[int, ...]]:
        answers = answer(requests)
        for request, sampled in zip(requests, answers, strict=True):
            unique.turn(request.prefix_ids, sampled)
        return answers

    grow_trees(work, rounds(counted), seed)
    return (policy.stats.prefill_tokens - before) / unique.tokens


def best_rates(
    work: Workload, ways: Mapping[str, tuple[Any, Roll]], *, repeats: int, seed: int = 0
) -> dict[str, float]:
    """Run all ways in turns, each with a policy that remembers nothing; the best tokens/s of each counts."""
    best = dict.fromkeys(ways, 0.0)
    for repeat in range(repeats):
        for name, (policy, roll) in ways.items():
            policy.weights_changed()
            tokens, seconds = grow_trees(work, roll, seed + repeat)
            best[name] = max(best[name], tokens / seconds)
    return best


def measure(work: Workload, *, repeats: int, seed: int = 0) -> dict[str, float]:
    """Run the samplers, interleaved."""
    model = make_model()
    policy = HFPolicy(model, make_tokenizer(), slots=work.slots, eos_ids=())
    ways = {
        "hf_policy_tokens_per_s": (policy, streaming(policy)),
        "hf_policy_rounds_tokens_per_s": (policy, rounds(policy_answer(policy))),
        "generate_tokens_per_s": (policy, rounds(generate_answer(model))),
    }
    best = best_rates(work, ways, repeats=repeats, seed=seed)
    ratio = best["hf_policy_tokens_per_s"] / best["generate_tokens_per_s"]
    return best | {"ratio": ratio, "prefill_over_unique": prefill_over_unique(policy, work, seed)}


def main() -> None:
    """Print the numbers."""
    parser = command_line(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; 0 leaves its choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    report(measure(Workload(questions=options.questions), repeats=options.repeats), options)


if __name__ == "__main__":
    main()
