"""The transformers policy against `model.generate` on one tree-like workload, in the same run.

    python -m benchmarks.policy --json

Questions of several chains each, several turns per chain, ragged prompts, actions and observations; then
forks of random turns. Both samplers get the same requests round by round (a chain's next prefix is its own
past), with the same model and threads, interleaved; the best of the repeats counts. `generate` gets each
round as one left-padded batch and runs to its longest budget; only tokens that were asked for count as
sampled.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads would measure the neighbours' load

import torch
from transformers import PreTrainedModel

from at2po_agent.model import ModelShape, build_model, train_tokenizer
from at2po_agent.policies.base import Request
from at2po_agent.policies.hf import HFPolicy

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


@dataclass
class _Branch:
    """One chain: its ids so far and what it will still do, (observation, action length) per turn."""

    ids: tuple[int, ...]
    turns: list[tuple[tuple[int, ...], int]]
    starts: list[tuple[int, ...]] = field(default_factory=list)


Answer = Callable[[list[tuple[tuple[int, ...], int, int]]], list[tuple[int, ...]]]
"""(prefix, max_tokens, seed) of a round -> the sampled ids of each."""


def _draw(rng: np.random.Generator, bounds: tuple[int, int]) -> tuple[int, ...]:
    return tuple(rng.integers(2, _VOCABULARY, rng.integers(*bounds, endpoint=True)).tolist())


def _turns(rng: np.random.Generator, work: Workload, first: int) -> list[tuple[tuple[int, ...], int]]:
    return [
        (_draw(rng, work.observation) if turn else (), int(rng.integers(*work.action, endpoint=True)))
        for turn in range(first, work.turns)
    ]


def run_rounds(work: Workload, answer: Answer, seed: int) -> int:
    """Grow all trees, a round at a time; returns the number of tokens that were asked for."""
    rng = np.random.default_rng(seed)
    prompts = [_draw(rng, work.prompt) for _ in range(work.questions)]
    chains = [_Branch(prompt, _turns(rng, work, 0)) for prompt in prompts for _ in range(work.chains)]
    sampled = _roll(chains, answer, seed)
    forks = []
    for question in range(work.questions):
        for _ in range(work.forks):
            origin = chains[question * work.chains + int(rng.integers(work.chains))]
            turn = int(rng.integers(work.turns))
            again = _turns(rng, work, turn)
            forks.append(_Branch(origin.starts[turn], [((), again[0][1]), *again[1:]]))
    return sampled + _roll(forks, answer, seed + 1)


def _roll(branches: list[_Branch], answer: Answer, seed: int) -> int:
    sampled, number = 0, seed << 20
    while live := [branch for branch in branches if branch.turns]:
        asked = []
        for branch in live:
            observation, length = branch.turns.pop(0)
            branch.ids += observation
            branch.starts.append(branch.ids)
            asked.append((branch.ids, length, number := number + 1))
        for branch, ids in zip(live, answer(asked), strict=True):
            branch.ids += ids
            sampled += len(ids)
    return sampled


def policy_answer(policy: HFPolicy) -> Answer:
    """Rounds answered by our policy."""

    def answer(asked: list[tuple[tuple[int, ...], int, int]]) -> list[tuple[int, ...]]:
        return [
            g.ids for g in policy.generate([Request(ids, length, seed=seed) for ids, length, seed in asked])
        ]

    return answer


def generate_answer(model: PreTrainedModel) -> Answer:
    """Rounds answered by transformers' `generate`, one left-padded batch each."""

    def answer(asked: list[tuple[tuple[int, ...], int, int]]) -> list[tuple[int, ...]]:
        width = max(len(ids) for ids, _, _ in asked)
        inputs = torch.tensor([[_PAD] * (width - len(ids)) + list(ids) for ids, _, _ in asked])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _, _ in asked])
        torch.manual_seed(asked[0][2])
        output = model.generate(
            inputs=inputs.to(model.device),
            attention_mask=mask.to(model.device),
            do_sample=True,
            top_k=0,
            max_new_tokens=max(length for _, length, _ in asked),
            pad_token_id=_PAD,
        )
        rows = output[:, width:].tolist()
        return [tuple(row[:length]) for row, (_, length, _) in zip(rows, asked, strict=True)]

    return answer


class _Unique:
    """Counts the prefix tokens that had to be computed: distinct ones that no sampling has fed already."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self.tokens = 0

    def prefix(self, ids: tuple[int, ...]) -> None:
        self.tokens += self._walk(ids)

    def decoded(self, ids: tuple[int, ...]) -> None:
        self._walk(ids[:-1])  # the last sampled id is not fed while sampling

    def _walk(self, ids: tuple[int, ...]) -> int:
        state, fresh = 0, 0
        for token in ids:
            state = hash((state, token))
            if state not in self._seen:
                self._seen.add(state)
                fresh += 1
        return fresh


def prefill_over_unique(policy: HFPolicy, work: Workload, seed: int) -> float:
    """Prefix tokens that went through the model, over the distinct ones that had to."""
    unique, inner = _Unique(), policy_answer(policy)
    before = policy.stats.prefill_tokens

    def answer(asked: list[tuple[tuple[int, ...], int, int]]) -> list[tuple[int, ...]]:
        for ids, _, _ in asked:
            unique.prefix(ids)
        answers = inner(asked)
        for (ids, _, _), sampled in zip(asked, answers, strict=True):
            unique.decoded(ids + sampled)
        return answers

    run_rounds(work, answer, seed)
    return (policy.stats.prefill_tokens - before) / unique.tokens


def measure(work: Workload, *, repeats: int, seed: int = 0) -> dict[str, float]:
    """Run both samplers, interleaved."""
    model = build_model(ModelShape(vocab_size=_VOCABULARY), seed=seed)
    tokenizer = train_tokenizer(["a"], vocab_size=_VOCABULARY)
    policy = HFPolicy(model, tokenizer, slots=work.questions * work.chains, eos_ids=())
    ours, theirs = policy_answer(policy), generate_answer(model)
    best = {"hf_policy_tokens_per_s": 0.0, "generate_tokens_per_s": 0.0}
    for repeat in range(repeats):
        for key, answer in (("hf_policy_tokens_per_s", ours), ("generate_tokens_per_s", theirs)):
            policy.weights_changed()
            start = time.perf_counter()
            tokens = run_rounds(work, answer, seed + 2 * repeat)
            best[key] = max(best[key], tokens / (time.perf_counter() - start))
    policy.weights_changed()
    ratio = best["hf_policy_tokens_per_s"] / best["generate_tokens_per_s"]
    return best | {"ratio": ratio, "prefill_over_unique": prefill_over_unique(policy, work, seed)}


def main() -> None:
    """Print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; 0 leaves its choice")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    numbers = measure(Workload(questions=arguments.questions), repeats=arguments.repeats)
    if arguments.json:
        print(json.dumps(numbers))
        return
    for key, value in numbers.items():
        print(f"{key:28} {value:12.3f}")


if __name__ == "__main__":
    main()
