"""Compares rollouts that never wait for the slowest tool with lock-step rounds, and policies with each other.

    python -m benchmarks.rollout --json [--only scheduling|batch|overhead|samplers]

Trees of the published shape (M 10, K 6, L 2) over a tool that sleeps: 50 ms in the median, 2 s in 2% of the
calls (`benchmarks.slow_world`). `scheduler` is `at2po_agent.rollout` as it comes. `lockstep` is the same
code with the barrier of lock-step rounds put back: all branches write a turn, all their tools run together
(in as many threads), and only when the slowest is back does the next turn begin; a tree still expands as soon
as it is ready itself. Same model, same seeds: both sample the same trees, which is checked. They take turns;
medians over the rounds. `at_once` has no latency at all: the most that any scheduler can reach.

The gain depends on which is slower. `scheduling` asks 16 questions of a model so small that two cores
decode about as fast as the tools answer, as an accelerator does with a real one. `batch` (keys with `batch_`,
one round) is the published batch of 64 questions with the quickstart's model, where decoding decides.

`prefill_over_unique`: prefix tokens that the policy computed, over the distinct ones that no sampling fed.
`hf_policy`, `generate`, `vllm` and `vllm_blocks` (vLLM's own prefix cache alone) sample the load of
`benchmarks.policy`. `overhead_us_per_turn`: the time of a rollout that is neither the policy's nor the
environment's, over its turns, with 64 questions, a policy that answers at once and a tool that does not sleep
(`_threads`: every step in a thread, and the steps included).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Any
from unittest import mock

import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads would measure the neighbours' load

import torch

from at2po_agent.agents.model import ModelShape, build_model
from at2po_agent.policies.base import Request
from at2po_agent.policies.hf.policy import HFPolicy
from at2po_agent.rollout import GrownTrees, RolloutConfig, engine, rollout
from at2po_agent.rollout.engine import Scheduler
from at2po_agent.tree import Tree
from at2po_agent.types import Generation
from benchmarks import policy as policy_benchmark
from benchmarks._timing import command_line, report, summarise
from benchmarks.slow_world import make_env, make_tokenizer

QUESTIONS, BATCH = 16, 64
SHAPE = RolloutConfig(max_turn_tokens=32)


class LockStep(Scheduler):
    """Rounds: all branches write, then all tools run."""

    def _advance(self) -> None:
        self._ask()
        while self._asked:
            for ticket, generation in self.requests.collect():
                self._hand_over(*self._asked.pop(ticket), generation)
        answers = []
        while self.steps.pending:
            answers += self.steps.collect(float("inf"))
        for branch, stepped in answers:
            branch.arrive(stepped, self._transcript)
            self._go_on(branch)


_LIGHT = {"hidden_size": 64, "layers": 2, "heads": 2, "kv_heads": 1, "ffn_size": 128}


def make_policy(*, light: bool) -> HFPolicy:
    """The quickstart's model (484,160 parameters), or one of 94,528, of random weights."""
    tokenizer = make_tokenizer()
    sizes = _LIGHT if light else {}
    model = build_model(ModelShape(vocab_size=len(tokenizer), **sizes), seed=0)
    return HFPolicy(model, tokenizer, slots=BATCH * SHAPE.chains, cache_tokens=1 << 20)


def grow(
    policy: Any, seed: int, *, questions: int = QUESTIONS, scale: float = 1.0, lockstep: bool = False
) -> tuple[GrownTrees, float]:
    """One rollout; returns its trees and its seconds."""
    env, tasks = make_env(questions, scale=scale), [{"index": index} for index in range(questions)]
    scheduler = LockStep if lockstep else Scheduler
    start = time.perf_counter()
    with mock.patch.object(engine, "Scheduler", scheduler):
        trees = rollout(tasks, env, policy, SHAPE, seed=seed)
    return trees, time.perf_counter() - start


def unique_prefill(trees: Iterable[Tree]) -> int:
    """Distinct prefix tokens of some trees that no sampling has fed."""
    unique = policy_benchmark.Unique()
    for tree in trees:
        for node in range(1, len(tree)):
            turn = tree.turns[node]
            assert turn is not None
            before = (*tree.branch_ids(int(tree.parent[node])), *turn.observation_ids)
            unique.turn(before, turn.action_ids)
    return unique.tokens


def scheduling(
    *, rounds: int, questions: int = QUESTIONS, scale: float = 1.0, light: bool = True
) -> dict[str, Any]:
    """Sampled tokens per second of the scheduler and of lock-step rounds, in turns."""
    policy = make_policy(light=light)
    speeds: dict[str, list[float]] = {way: [] for way in ("scheduler", "lockstep", "at_once")}
    busy: dict[str, list[float]] = {way: [] for way in speeds}
    prefill = 0.0
    grow(policy, rounds, questions=questions, scale=0.0)  # lays out the policy's storage
    for number in range(rounds):
        sampled = {}
        for way in speeds:
            policy.weights_changed()
            before = policy.stats.prefill_tokens
            trees, seconds = grow(
                policy,
                number,
                questions=questions,
                scale=0.0 if way == "at_once" else scale,
                lockstep=way == "lockstep",
            )
            stats = trees.stats
            speeds[way].append(stats.sampled_tokens / seconds)
            busy[way].append(stats.policy_seconds / seconds)
            sampled[way] = [tree.branch_ids(leaf) for tree in trees for leaf in tree.leaves()]
            if way == "scheduler":
                prefill = max(prefill, (policy.stats.prefill_tokens - before) / unique_prefill(trees))
        assert sampled["scheduler"] == sampled["lockstep"] == sampled["at_once"], "timing decided results"
    result: dict[str, Any] = {}
    for way, values in speeds.items():
        timing = summarise(values)
        result[f"{way}_tokens_per_s"] = timing.median
        result[f"{way}_spread"] = timing.spread
        result[f"{way}_policy_share"] = float(np.median(busy[way]))
    ratios = [ours / theirs for ours, theirs in zip(speeds["scheduler"], speeds["lockstep"], strict=True)]
    return result | {
        "scheduler_over_lockstep": summarise(ratios).median,
        "scheduler_over_lockstep_lowest": min(ratios),
        "prefill_over_unique": {"hf": prefill},
        "sampled_tokens": stats.sampled_tokens,
        "turns": stats.turns,
        "questions": questions,
        "rounds": rounds,
    }


def batch(*, rounds: int) -> dict[str, Any]:
    """The same with the published batch, once."""
    del rounds
    return {
        f"batch_{key}": value for key, value in scheduling(rounds=1, questions=BATCH, light=False).items()
    }


class Instant:
    """Streams: answers every request at the next poll, with ids that its seed decides, at next to no cost."""

    def __init__(self, length: int = 35) -> None:
        self.tokenizer = make_tokenizer()
        self._texts = [
            tuple(np.random.default_rng(number).integers(100, 250, length).tolist()) for number in range(512)
        ]
        self._log_probs = np.full(length, -1.0, dtype=np.float32)
        self._waiting: list[tuple[int, Request]] = []
        self._tickets = 0

    def submit(self, request: Request) -> int:
        """Queue a request."""
        self._tickets += 1
        self._waiting.append((self._tickets, request))
        return self._tickets

    def poll(self) -> list[tuple[int, Generation]]:
        """Answer all that wait."""
        waiting, self._waiting = self._waiting, []
        return [
            (ticket, Generation(self._texts[request.seed % 512], self._log_probs, "length"))
            for ticket, request in waiting
        ]

    def cancel(self, ticket: int) -> None:
        """Forget a request."""
        self._waiting = [entry for entry in self._waiting if entry[0] != ticket]

    def generate(self, requests: Iterable[Request]) -> list[Generation]:
        """Not used: this policy streams."""
        raise NotImplementedError(len(list(requests)))


def overhead(*, rounds: int, questions: int = BATCH) -> dict[str, float]:
    """Microseconds of the scheduler per turn."""
    env, tasks = make_env(questions, scale=0.0), [{"index": index} for index in range(questions)]
    policy = Instant()
    threads = SHAPE.model_copy(update={"tool_deadline_s": 60.0})
    inline: list[float] = []
    handed: list[float] = []
    for number in range(rounds + 1):
        stats = rollout(tasks, env, policy, SHAPE, seed=number).stats
        inline.append((stats.env_seconds - stats.tool_seconds) / stats.turns * 1e6)
        stats = rollout(tasks, env, policy, threads, seed=number).stats
        handed.append(stats.env_seconds / stats.turns * 1e6)
    timing = summarise(inline[1:])
    return {
        "overhead_us_per_turn": timing.median,
        "overhead_spread": timing.spread,
        "overhead_threads_us_per_turn": summarise(handed[1:]).median,
    }


def samplers(*, rounds: int, questions: int = 16) -> dict[str, Any]:
    """The transformers policy, `generate`, and vLLM where it is installed, on one load."""
    work = policy_benchmark.Workload(questions=questions)
    numbers = policy_benchmark.measure(work, repeats=rounds)
    keys = ("hf_policy_tokens_per_s", "hf_policy_rounds_tokens_per_s", "generate_tokens_per_s")
    result: dict[str, Any] = {key: numbers[key] for key in keys}
    result["hf_policy_over_generate"] = numbers["ratio"]
    result["prefill_over_unique"] = {"hf": numbers["prefill_over_unique"]}
    served = vllm(work, rounds)
    result["prefill_over_unique"] |= served.pop("prefill_over_unique", {})
    return result | served


def vllm(work: policy_benchmark.Workload, rounds: int) -> dict[str, Any]:
    """The same load on vLLM, prefixes shared to the token and in its own blocks, in turns.

    Null and a reason where it is not installed.
    """
    model, tokenizer = policy_benchmark.make_model(), policy_benchmark.make_tokenizer()
    policies: dict[str, Any] = {}
    try:
        from at2po_agent.policies.vllm import VLLMPolicy
        from at2po_agent.policies.vllm.config import VLLMConfig

        for name, exact in (("vllm", "auto"), ("vllm_blocks", False)):
            settings = VLLMConfig(exact_prefixes=exact)
            policies[name] = VLLMPolicy(model, tokenizer, config=settings, slots=work.slots, eos_ids=())
        ways = {name: (policy, policy_benchmark.streaming(policy)) for name, policy in policies.items()}
        best = policy_benchmark.best_rates(work, ways, repeats=rounds)
        prefill = {
            name: policy_benchmark.prefill_over_unique(policy, work, 0) for name, policy in policies.items()
        }
    except ImportError as error:
        return {"vllm_tokens_per_s": None, "vllm_reason": str(error)}
    finally:
        for policy in policies.values():
            policy.close()
    return {f"{name}_tokens_per_s": best[name] for name in policies} | {"prefill_over_unique": prefill}


def main() -> None:
    """Print the numbers."""
    parts = {"scheduling": scheduling, "batch": batch, "overhead": overhead, "samplers": samplers}
    parser = command_line(__doc__, rounds=3)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--only", choices=sorted(parts), help="one part alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {}
    for name, part in parts.items():
        if options.only in (None, name):
            fresh = part(rounds=options.rounds)
            prefill = {**result.get("prefill_over_unique", {}), **fresh.get("prefill_over_unique", {})}
            result = {**result, **fresh, **({"prefill_over_unique": prefill} if prefill else {})}
    report(result, options)


if __name__ == "__main__":
    main()
