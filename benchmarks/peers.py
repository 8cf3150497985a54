"""One training step here and in TRL, side by side: sampling, learning, peak memory.

    pip install 'at2po[agent,trl]' && python -m benchmarks.peers --json

Both sides have the quickstart's model, the same environment and number of leaves, take turns in every round,
and use one thread. A speed-up is TRL's median over ours: 3 means three times as fast.

*learner*: one update of AT²PO on one random tree: gradient, clipping, AdamW. Here: `Learner.update` on packed
trees. TRL: `ATPOTrainer`, that is, TRL's padded rows, its fused head and its optimiser. Both have the same
gradient (`gradient_error`). TRL takes the rows of the tree at once or two by two, and the faster counts.
Tokens are those of the rows, without padding, on both sides. The goal is 3 at the published shape, and never
below 1.

*step*: the quickstart's model after a short cold start, on its world, two questions a step; weights are new
at every step. Here: trees. TRL cannot fork and samples as many chains: each turn of all episodes is one
padded batch of its `generate`, which ends a row at the closing tags and keeps no cache between turns. Both
then learn from the trees that were sampled here. Sampled tokens a second are each side's own tokens, of which
forks need fewer for as many leaves; so the seconds for all leaves are compared too.

Peak memory is the growth of the process's peak resident set by one update, in a process of its own, after an
update on a tiny tree. Every tree has the credit of rewards 0 and 1 in turn, so that every branch is trained.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from at2po_agent.agents.agent import build_agent, build_weights
from at2po_agent.agents.model import train_tokenizer
from at2po_agent.config.loading import load_config
from at2po_agent.config.sections import AlgorithmConfig, OptimizerConfig
from at2po_agent.environments import make_training_env
from at2po_agent.integrations.trl import ATPOConfig, ATPOTrainer, TreeRollout, task_dataset
from at2po_agent.learning.learner import Learner, Objective, make_optimizer
from at2po_agent.packing.rows import pack_rows
from at2po_agent.packing.trees import pack_trees
from at2po_agent.policies.hf import HFPolicy
from at2po_agent.rollout import RolloutConfig, rollout
from at2po_agent.tree import Tree
from at2po_env import fork
from benchmarks._timing import Case, Timing, command_line, measure, peak_kb, report
from benchmarks.packing import BUDGET, LONG
from benchmarks.random_trees import TreeShape, random_tree
from benchmarks.step import cold_start, mixed_credit

LEARNER: Mapping[str, TreeShape] = {
    "published": TreeShape(),
    "published, long observations": TreeShape(observation=LONG),
    "quickstart": TreeShape(6, 3, 2, (2, 4), (10, 20), (5, 15), (30, 60)),
    "22 chains": TreeShape(chains=22, forks=0),
    "2 leaves": TreeShape(chains=2, forks=0),
}
STEPS: Mapping[str, tuple[int, int, int]] = {
    "published": (10, 6, 2),
    "quickstart": (6, 3, 2),
    "22 chains": (22, 0, 0),
}
QUESTIONS = 2
VOCABULARY = 560
WAYS = ("here", "trl", "trl_pairs")
Update = Callable[[], Any]


def our_learner(model: PreTrainedModel) -> Learner:
    """The learner of a run with AT²PO's defaults."""
    optimizer = OptimizerConfig()
    return Learner(
        model,
        make_optimizer(model, optimizer),
        Objective.of(AlgorithmConfig()),
        token_budget=BUDGET,
        max_grad_norm=optimizer.max_grad_norm,
    )


def trl_trainer(
    model: PreTrainedModel, tokenizer: Any, env: Any, config: RolloutConfig, folder: Path
) -> ATPOTrainer:
    """TRL's trainer of trees of a shape; TRL's own generation has the rollout's limit of a turn."""
    settings = {
        "num_generations": config.leaves,
        "per_device_train_batch_size": config.leaves,
        "max_steps": 1,
        "learning_rate": OptimizerConfig().lr,
        "activation_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": True,
    }
    trainer = ATPOTrainer(
        model,
        TreeRollout(env, config, credit="benchmark_mixed"),
        ATPOConfig(str(folder), **settings),
        train_dataset=task_dataset(env, range(QUESTIONS)),
        processing_class=tokenizer,
    )
    trainer.create_optimizer()
    trainer.generation_config.max_new_tokens = config.max_turn_tokens
    trainer.generation_kwargs["max_new_tokens"] = config.max_turn_tokens
    return trainer


def updates(learner: Learner, trainer: ATPOTrainer, trees: Sequence[Tree]) -> dict[str, Update]:
    """One update of each side on the same trees; TRL's batch is the one that TRL makes of them."""
    packed = pack_trees(trees, [mixed_credit(tree).advantages for tree in trees])
    old = learner.log_probs(packed)
    leaves = len(trees[0].leaves())
    rows = [row for tree in trees for row in trainer.rollout_func._completions(tree, leaves)]
    sampler, trainer.rollout_func = (
        trainer.rollout_func,
        lambda *_: {k: [r[k] for r in rows] for k in rows[0]},
    )
    trainer.model.train()
    batch = trainer._generate_and_score_completions(
        [{"prompt": [{"role": "user", "content": ""}]} for _ in rows]
    )
    trainer.rollout_func = sampler
    return {
        "here": partial(learner.update, packed, old),
        "trl": partial(trl_update, trainer, batch, len(rows)),
        "trl_pairs": partial(trl_update, trainer, batch, 2),
    }


def trl_gradient(trainer: ATPOTrainer, batch: Mapping[str, Any], rows: int) -> None:
    """TRL's gradient of a batch, so many rows at a time."""
    count = len(batch["completion_ids"]) // rows
    trainer.current_gradient_accumulation_steps = count
    for number in range(count):
        part = slice(number * rows, (number + 1) * rows)
        piece = {name: value[part] if value.ndim else value for name, value in batch.items()}
        trainer.accelerator.backward(trainer.compute_loss(trainer.model, piece))


def trl_update(trainer: ATPOTrainer, batch: Mapping[str, Any], rows: int) -> None:
    """TRL's gradient of a batch, clipped, and its optimiser's step."""
    trl_gradient(trainer, batch, rows)
    trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.model.zero_grad()


def sample_chains(trainer: ATPOTrainer, policy: HFPolicy, env: Any, config: RolloutConfig) -> int:
    """Sample the leaves of a step as chains, with TRL's generation; returns the sampled tokens."""
    encode, decode = policy.tokenizer.encode, policy.tokenizer.decode
    envs, contexts, starts = [], [], []
    for index in range(QUESTIONS):
        prompt, _ = env.reset(options={"index": index})
        envs += [fork(env) for _ in range(config.leaves)]
        contexts += [encode(prompt) for _ in range(config.leaves)]
        starts += [len(contexts[-1])] * config.leaves
    live, tokens = list(range(len(envs))), 0
    while live:
        written, _ = trainer._generate_single_turn([contexts[i] for i in live], None, {}, 1)
        going_on = []
        for i, ids in zip(live, written, strict=True):
            tokens += len(ids)
            observation, _, terminated, truncated, _ = envs[i].step(decode(ids))
            contexts[i] += [*ids, *encode(observation)]
            if not (terminated or truncated or len(contexts[i]) - starts[i] > config.max_response_tokens):
                going_on.append(i)
        live = going_on
    return tokens


def learner_case(
    name: str, *, rounds: int, clock: Callable[[], float], folder: Path, memory: bool
) -> dict[str, Any]:
    """Time one tree on both sides; all ways begin with the same weights."""
    tree = random_tree(LEARNER[name], vocabulary=VOCABULARY, seed=0)
    learner, trainer, ways = _learner_sides(tree, folder)
    error = _gradient_error(learner, trainer, ways)
    timings = measure({way: Case(run) for way, run in ways.items()}, rounds=rounds, warmup=1, clock=clock)
    rows = pack_rows([tree], [mixed_credit(tree).advantages])
    tokens = int(rows.lengths.sum())
    return {
        "case": name,
        "leaves": len(tree.leaves()),
        "tokens": tokens,
        **_seconds(timings, tokens),
        **_speedup(timings),
        "gradient_error": error,
        "parameters": sum(p.numel() for p in learner.model.parameters()),
        **({f"{way}_peak_mb": peak_mb(name, way) for way in WAYS} if memory else {}),
    }


def _learner_sides(tree: Tree, folder: Path) -> tuple[Learner, ATPOTrainer, dict[str, Update]]:
    leaves = len(tree.leaves())
    quickstart = load_config("quickstart", [])
    models = [build_weights(quickstart.model, seed=0, vocab_size=VOCABULARY) for _ in range(2)]
    learner = our_learner(models[0])
    tokenizer = train_tokenizer(["a"], vocab_size=300).hf
    env = make_training_env(quickstart)
    config = RolloutConfig(chains=leaves, forks=0, rounds=0)
    trainer = trl_trainer(models[1], tokenizer, env, config, folder)
    return learner, trainer, updates(learner, trainer, [tree])


def _gradient_error(learner: Learner, trainer: ATPOTrainer, ways: Mapping[str, Update]) -> float:
    """Norm of the difference of both gradients, relative to that of ours; the weights stay as they are."""
    learner.backward(*ways["here"].args)  # type: ignore[attr-defined]  # a partial
    trl_gradient(*ways["trl"].args)  # type: ignore[attr-defined]
    here, there = (
        torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()
        for model in (learner.model, trainer.model)
    )
    trainer.model.zero_grad()
    return float((here - there).norm() / here.norm())


def step_case(
    name: str, start: Path, *, rounds: int, clock: Callable[[], float], folder: Path
) -> dict[str, Any]:
    """Time sampling and learning of a step of the quickstart's world on both sides."""
    chains, forks, rounds_of_forks = STEPS[name]
    shape = {"chains": chains, "forks": forks, "rounds": rounds_of_forks}
    overrides = [f"model.path={start}", *(f"rollout.{key}={value}" for key, value in shape.items())]
    loaded = load_config("quickstart", overrides)
    env, config = make_training_env(loaded), loaded.rollout
    agent, other = build_agent(loaded), build_agent(loaded)
    policy, theirs = agent.policy, other.model
    assert isinstance(policy, HFPolicy)
    assert isinstance(theirs, PreTrainedModel)
    closing = [policy.tokenizer.encode(tag)[0] for tag in ("</search>", "</answer>")]
    theirs.generation_config.eos_token_id = [policy.tokenizer.eos_id, *closing]
    trainer = trl_trainer(theirs, policy.tokenizer.hf, env, config, folder)
    tasks = [{"index": index} for index in range(QUESTIONS)]
    grown: dict[str, Any] = {}

    def here() -> None:
        grown["here"] = rollout(tasks, env, policy, config, seed=0)

    def there() -> None:
        grown["trl"] = sample_chains(trainer, policy, env, config)

    cases = {
        "here": Case(here, prepare=policy.weights_changed),  # nothing of the last round stays in the cache
        "trl": Case(there, prepare=partial(torch.manual_seed, 0)),
    }
    sampling = measure(cases, rounds=rounds, warmup=1, clock=clock)
    ways = updates(our_learner(agent.model), trainer, grown["here"])
    learning = measure({way: Case(run) for way, run in ways.items()}, rounds=rounds, warmup=1, clock=clock)
    tokens = {"here": grown["here"].stats.sampled_tokens, "trl": grown["trl"]}
    learnt = min(learning["trl"].median, learning["trl_pairs"].median)
    step = {
        "here": sampling["here"].median + learning["here"].median,
        "trl": sampling["trl"].median + learnt,
    }
    return {
        "case": name,
        "leaves": QUESTIONS * config.leaves,
        "sampled_tokens": tokens,
        "sampling": _seconds(sampling, 0),
        "sampled_tokens_per_s": {side: tokens[side] / sampling[side].median for side in tokens},
        "sampling_speedup": sampling["trl"].median / sampling["here"].median,
        "sampling_speedup_per_token": (sampling["trl"].median / tokens["trl"])
        / (sampling["here"].median / tokens["here"]),
        "learner": _seconds(learning, 0) | _speedup(learning),
        "step_s": step,
        "step_speedup": step["trl"] / step["here"],
    }


def _seconds(timings: Mapping[str, Timing], tokens: int) -> dict[str, Any]:
    """Medians and quartiles of each way, and tokens a second where tokens are given."""
    found: dict[str, Any] = {}
    for way, timing in timings.items():
        found[f"{way}_s"] = [timing.low, timing.median, timing.high]
        if tokens:
            found[f"{way}_tokens_per_s"] = tokens / timing.median
    return found


def _speedup(timings: Mapping[str, Timing]) -> dict[str, float]:
    """TRL's faster way over ours: of medians, and of the best rounds, which a busy machine blurs less."""
    theirs = [timings[way] for way in WAYS[1:]]
    return {
        "speedup": min(timing.median for timing in theirs) / timings["here"].median,
        "speedup_of_fastest": min(timing.best for timing in theirs) / timings["here"].best,
    }


def peak_mb(name: str, way: str) -> float:
    """Growth of the peak resident set by one update, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.peers", "--peak", name, way]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def _measure_peak(name: str, way: str, folder: Path) -> float:
    tiny = TreeShape(2, 0, turns=(1, 1), prompt=(4, 4), action=(4, 4))
    _learner_sides(random_tree(tiny, vocabulary=VOCABULARY, seed=0), folder)[2][way]()
    _, _, ways = _learner_sides(random_tree(LEARNER[name], vocabulary=VOCABULARY, seed=0), folder)
    before = peak_kb()
    ways[way]()
    return (peak_kb() - before) / 1024


def main() -> None:
    """Command line."""
    parser = command_line("A training step here and in TRL", rounds=5)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU time of the thread: for a loaded machine"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--part", choices=("learner", "step"), help="one part; default both")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.peak:
            print(_measure_peak(*options.peak, folder))
            return
        clock = time.thread_time if options.cpu_time else time.perf_counter
        timed = {"rounds": options.rounds, "clock": clock, "folder": folder / "trl"}
        learner, chosen = (
            [case for case in cases if options.only in case and options.part in (None, part)]
            for part, cases in (("learner", LEARNER), ("step", STEPS))
        )
        updated = [learner_case(case, **timed, memory=not options.no_memory) for case in learner]
        start = cold_start(folder / "start") if chosen else folder
        torch.set_num_threads(1)
        steps = [step_case(case, start, **timed) for case in chosen]
    result = {
        "learner": updated,
        "step": steps,
        "clock": "CPU time of one thread" if options.cpu_time else "wall, one thread",
        "rounds": options.rounds,
        "load": os.getloadavg()[0],
    }
    report(result, options)


if __name__ == "__main__":
    main()
