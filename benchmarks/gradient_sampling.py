"""Samples what `benchmarks.gradient` measures: policies, vectors of questions, and true advantages of turns.

`prepare_policies` trains the policies, `measure_group` samples one group of questions and keeps its sums in a
file, and `adam_weights` samples the metric. Seeds belong to places: a group's trees of all methods have one
seed, so all trees of a question begin with the same chains. Trees of the reference have another seed, so its
noise has nothing to do with a method's.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from at2po_agent.agents.agent import Agent, build_agent
from at2po_agent.config.loading import load_config
from at2po_agent.config.sections import Config
from at2po_agent.credit import credit_rules, weighted_baseline_advantages
from at2po_agent.environments import TaskOrder, first_tasks, make_eval_env, make_training_env, number_of_tasks
from at2po_agent.evaluation.evaluate import evaluate
from at2po_agent.evaluation.metrics import sampled_tokens
from at2po_agent.expansion.registry import Expansion
from at2po_agent.packing.trees import pack_trees
from at2po_agent.rollout import Options, RolloutConfig, rollout
from at2po_agent.runs.folder import RunFolder
from at2po_agent.runs.progress import Progress
from at2po_agent.runs.seeding import RunPurpose, run_seed
from at2po_agent.trainer import Trainer
from at2po_agent.tree import ROOT, Tree
from at2po_agent.types import FloatArray, IntArray
from at2po_env.errors import ConfigError
from benchmarks.gradient_estimates import minibatch_mean_square
from benchmarks.race import BASE, prepare

REFERENCE_CHAINS = 24
FORKS = 64
"""Forks that estimate one value of a turn: Q goes on behind the turn, V samples it again."""
ADAM_QUESTIONS = 128
ADAM_MINIBATCH = 16
ADAM_EPS = 1e-8
LEVEL_QUESTIONS = 200
_METHODS, _REFERENCE, _ADAM = range(3)


class Row(NamedTuple):
    """A method: how its trees grow, and what their turns are worth.

    Attributes:
        name: Of the row in tables.
        rollout: Keys of `rollout` that differ from `race.yaml`.
        credit: Registered rule.
        options: Its keywords.
    """

    name: str
    rollout: Mapping[str, Any]
    credit: str
    options: Mapping[str, Any] = {}


class Job(NamedTuple):
    """One group of questions of one policy.

    Attributes:
        policy: Folder of the checkpoint.
        task: `key=value` texts on top of `race.yaml`.
        rows: The methods; of several rows of plain chains those with fewer take parts of the most.
        group: Number of the group.
        first: Place of its first question in the order of questions.
        questions: How many it has.
        credit_turns: Of so many questions one turn's true advantage is estimated.
        adam: File of the metric.
        result: The file for its sums.
        seed: Of the whole measurement.
        threads: Of torch.
    """

    policy: str
    task: tuple[str, ...]
    rows: tuple[Row, ...]
    group: int
    first: int
    questions: int
    credit_turns: int
    adam: str
    result: str
    seed: int
    threads: int


# Policies --------------------------------------------------------------------------------------------------


def prepare_policies(out: Path, task: Sequence[str], levels: Sequence[float]) -> dict[str, Path]:
    """The cold start of the race, trained by GRPO until sampled exact match passes each level; kept in `out`.

    Exact match is that on the first questions of the evaluation, after every second step. Levels that the
    cold start misses by no more than 0.05 are the cold start itself.

    Returns:
        The checkpoint of each level, under the names "em 0.1" and so on.

    Raises:
        SystemExit: `out` has policies of another task, or training does not reach a level.
    """
    start = prepare(out, task)
    wanted = {f"em {level:g}": level for level in sorted(levels)}
    folders = {name: out / "policies" / name.replace(" ", "_") for name in wanted}
    if all((folder / "exact_match.json").exists() for folder in folders.values()):
        return folders
    own = [f"model.path={start}", "cold_start.steps=0", "algorithm=grpo", "optimizer.lr=4e-4"]
    config = load_config(BASE, [*own, *task])
    trainer = Trainer(config, build_agent(config), RunFolder(out / "policies"), Progress())
    env, tasks = make_eval_env(config), first_tasks(make_eval_env(config), LEVEL_QUESTIONS)
    seed = run_seed(config.run.seed, RunPurpose.EVALUATION)
    while wanted:
        figures, _ = evaluate(tasks, env, trainer.agent.policy, config.rollout, seed=seed, temperature=1.0)
        near = 0.05 if trainer.state.step == 0 else 0.0
        reached = [name for name, level in wanted.items() if figures.em >= level - near]
        for name in reached:
            del wanted[name]
            folder = folders[name]
            trainer.agent.model.save_pretrained(folder)  # type: ignore[operator]
            trainer.agent.tokenizer.hf.save_pretrained(folder)  # type: ignore[attr-defined]
            about = {"exact_match": figures.em, "steps": trainer.state.step}
            (folder / "exact_match.json").write_text(json.dumps(about), encoding="utf-8")
            print(
                f"policy {name}: sampled EM {figures.em:.3f} after {trainer.state.step} steps",
                file=sys.stderr,
            )
        if wanted and trainer.state.step >= 400:
            raise SystemExit(
                f"GRPO reached a sampled EM of {figures.em:.3f} in 400 steps, and --em wants {list(wanted)}: "
                "leave these levels out, or give an easier --task"
            )
        for _ in range(2 if wanted else 0):
            trainer.step()
    return folders


class Player(NamedTuple):
    """A policy in the environment that its questions come from."""

    config: Config
    agent: Agent
    env: Any
    order: TaskOrder

    @classmethod
    def load(cls, policy: str, task: Sequence[str], *, seed: int, threads: int) -> "Player":
        """Load a checkpoint; everything else is that of `race.yaml` and the task."""
        torch.set_num_threads(threads)
        own = [f"model.path={policy}", f"run.seed={seed}", "cold_start.steps=0"]
        config = load_config(BASE, [*task, *own])
        env = make_training_env(config)
        count = number_of_tasks(env)
        order = TaskOrder(None if count is None else range(count), run_seed(seed, RunPurpose.TASKS))
        return cls(config, build_agent(config), env, order)

    def grow(self, tasks: Sequence[Options], shape: Mapping[str, Any], *, seed: int) -> list[Tree]:
        """One tree per question."""
        config = RolloutConfig(**{**self.config.rollout.model_dump(), **shape})
        trees = rollout(tasks, self.env, self.agent.policy, config, seed=seed)
        if not all(tree.leaves() for tree in trees):
            raise ConfigError(
                f"a prompt is longer than rollout.max_prompt_tokens ({config.max_prompt_tokens}): raise it "
                "by --task rollout.max_prompt_tokens=N"
            )
        return trees

    def vectors(self, tree: Tree, advantages: Sequence[FloatArray]) -> list[np.ndarray]:
        """Gradients under several credits, see `question_vectors`."""
        config = self.config
        return question_vectors(
            tree,
            advantages,
            self.agent.model,
            token_budget=config.train.micro_batch_tokens,
            temperature=config.rollout.temperature,
        )


# Vectors of questions --------------------------------------------------------------------------------------


def question_vectors(
    tree: Tree,
    advantages: Sequence[FloatArray],
    model: nn.Module,
    *,
    token_budget: int = 8192,
    temperature: float = 1.0,
) -> list[np.ndarray]:
    """`(1/B) sum_branches sum_tokens A grad log pi` of one tree under several credits.

    The tree goes through the model once. Credits that are linear combinations of others (every normalisation
    of a group's rewards is a multiple of another) share their backward passes.

    Args:
        tree: With leaves.
        advantages: float[L, N] each, of each branch's turns.
        model: The policy that sampled the tree.
        token_budget: Most tokens that go through the model at once.
        temperature: At which the tree was sampled.

    Returns:
        float32[P] for each credit, in the order of the model's parameters.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    size = sum(parameter.numel() for parameter in parameters)
    batch = pack_trees([tree], [np.zeros(len(tree))])
    turn_ids = batch.turn_ids.numpy()
    paths = [tree.path(leaf)[1:] for leaf in tree.leaves()]
    weights = np.zeros((len(advantages), *turn_ids.shape))
    for row, given in zip(weights, advantages, strict=True):
        for branch, values in enumerate(given):
            trained = turn_ids[branch] >= 0
            row[branch, trained] = values[paths[branch]][turn_ids[branch, trained]] / len(paths)
    basis, coefficients = _basis(weights.reshape(len(weights), -1))
    directions = np.zeros((len(basis), size))
    if len(basis):
        with batch.attention(model):
            for chosen, micro in batch.micro_batches(token_budget):
                log_probs = micro.log_probs(model, temperature=temperature)
                for number, credit in enumerate(basis):
                    cut = torch.from_numpy(weights[credit][chosen.numpy(), : log_probs.shape[1]])
                    gradients = torch.autograd.grad(
                        log_probs,
                        parameters,
                        cut.to(log_probs),
                        retain_graph=number + 1 < len(basis),
                        materialize_grads=True,
                    )
                    directions[number] += torch.cat([part.flatten() for part in gradients]).cpu().numpy()
    return list((coefficients @ directions).astype(np.float32))


def per_branch(tree: Tree, advantages: FloatArray) -> FloatArray:
    """Write advantages per node, per branch, or per branch and node as float[L, N]."""
    shape = (len(tree.leaves()), len(tree))
    columns = advantages[:, None] if advantages.shape == shape[:1] else advantages
    return np.array(np.broadcast_to(columns, shape))


def _basis(rows: FloatArray) -> tuple[list[int], FloatArray]:
    """Rows that span all rows, and float[R, number of them] that makes every row of them."""
    basis: list[int] = []
    for number, row in enumerate(rows):
        if row.any() and np.abs(row - _fit(rows[basis], row) @ rows[basis]).max() > 1e-9 * np.abs(row).max():
            basis.append(number)
    return basis, np.stack([_fit(rows[basis], row) for row in rows])


def _fit(basis: FloatArray, row: FloatArray) -> FloatArray:
    return np.asarray(np.linalg.lstsq(basis.T, row, rcond=None)[0]) if len(basis) else np.zeros(0)


def some_chains(tree: Tree, chosen: Sequence[int]) -> tuple[Tree, list[int]]:
    """The tree of some chains of a tree of chains, and the numbers that its nodes have in the whole tree."""
    part, nodes, leaves = Tree(tree.prompt_ids, tree.prompt, tree.task_id), [ROOT], tree.leaves()
    for chain in chosen:
        above = ROOT
        for node in tree.path(leaves[chain])[1:]:
            turn = tree.turns[node]
            assert turn is not None, "only the root has no turn"
            above = part.add(above, turn)
            nodes.append(node)
        part.close(above, float(tree.leaf_reward[nodes[-1]]), tree.outcomes[nodes[-1]])
    return part, nodes


def leave_one_out(tree: Tree) -> FloatArray:
    """The unbiased advantage of each chain: its reward less the mean of the others', float[L]."""
    rewards = tree.leaf_reward[tree.is_leaf]
    return weighted_baseline_advantages(rewards, np.ones(len(rewards)))


class Grown(NamedTuple):
    """A tree of one question as a credit rule sees it, perhaps some chains of those that were grown.

    Attributes:
        tree: That tree.
        advantages: float[L, N] of its branches and nodes, what the rule gives.
        whole: The same for all branches and nodes that were grown: 0 where the rule sees none, and scaled so
            that the mean over all branches is that over its own.
    """

    tree: Tree
    advantages: FloatArray
    whole: FloatArray

    @classmethod
    def credit(cls, row: Row, tree: Tree, chosen: Sequence[int] | None = None) -> "Grown":
        """Give credit to a tree, or to some of its chains."""
        part, nodes = (tree, list(range(len(tree)))) if chosen is None else some_chains(tree, chosen)
        branches = range(len(tree.leaves())) if chosen is None else chosen
        given = credit_rules()[row.credit](part, **row.options).advantages
        advantages = per_branch(part, np.asarray(given, dtype=np.float64))
        whole = np.zeros((len(tree.leaves()), len(tree)))
        whole[np.ix_(branches, nodes)] = advantages * len(whole) / len(advantages)
        return cls(part, advantages, whole)


def grow_rows(
    player: Player, rows: Sequence[Row], tasks: Sequence[Options], *, seed: int
) -> Iterator[tuple[list[int], list[tuple[Tree, list[list[Grown]]]]]]:
    """Grow the trees of all methods; methods with the same rollout share them.

    A row with fewer chains than were grown takes three parts of them, which begin at the first, fifth and
    ninth of twelve and go round; the mean over them is less noisy than one.

    Yields:
        Numbers of the rows that share trees; for each question the tree, and what each row makes of it, or of
        parts of it.
    """
    shared: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        shape = dict(row.rollout)
        if _is_chains(row):
            shape.pop("chains")
        shared.setdefault(json.dumps(shape, sort_keys=True), []).append(number)
    for numbers in shared.values():
        largest = max((rows[number].rollout for number in numbers), key=lambda shape: int(shape["chains"]))
        trees = player.grow(tasks, largest, seed=seed)
        found = []
        for tree in trees:
            grown, leaves = [], len(tree.leaves())
            for row in (rows[number] for number in numbers):
                few: int = row.rollout["chains"]
                parts: list[list[int] | None] = [None]
                if _is_chains(row) and few < leaves:
                    starts = (0, leaves // 3, 2 * leaves // 3)
                    parts = [[(start + i) % leaves for i in range(few)] for start in starts]
                grown.append([Grown.credit(row, tree, chosen) for chosen in parts])
            found.append((tree, grown))
        yield numbers, found


def _is_chains(row: Row) -> bool:
    return row.rollout.get("expansion") == "chains"


def adam_weights(player: Player, row: Row, *, first: int, seed: int) -> FloatArray:
    """`1 / (sqrt(v) + eps)`, float[P]: v is the mean square of a minibatch's gradient of a method.

    Args:
        player: The policy.
        row: The method.
        first: Place of the first question; these are not those of any group.
        seed: Of the measurement.
    """
    tasks = player.order.options(first, ADAM_QUESTIONS)
    total = squares = np.zeros(0)
    for start in range(0, ADAM_QUESTIONS, 32):
        place = run_seed(seed, RunPurpose.ROLLOUT, start, _ADAM)
        for _, trees in grow_rows(player, [row], tasks[start : start + 32], seed=place):
            for tree, ((grown,),) in trees:
                (vector,) = player.vectors(tree, [grown.whole])
                wide = vector.astype(np.float64)
                total = total + wide if total.size else wide
                squares = squares + wide**2 if squares.size else wide**2
    v = minibatch_mean_square(total, squares, questions=ADAM_QUESTIONS, minibatch=ADAM_MINIBATCH)
    return np.asarray(1 / (np.sqrt(v) + ADAM_EPS))


def measure_group(job: Job) -> str:
    """Sample a group of questions and write its sums; returns a line about it.

    The file holds, for R rows: sums float32[R, P] and reference_sum float32[P]; products[2, 4, R] as in
    `join_groups`, for the Euclidean metric and Adam's; tokens[R]; questions; exact_match, the sum over
    questions; and of C turns q, v, their squared errors noise[C], and advantages[R, C].
    """
    started = time.perf_counter()
    player = Player.load(job.policy, job.task, seed=job.seed, threads=job.threads)
    with np.load(job.adam) as file:
        adam = file["weights"]
    tasks = player.order.options(job.first, job.questions)
    chains = {"expansion": "chains", "chains": REFERENCE_CHAINS, "forks": 0, "rounds": 0}
    place = run_seed(job.seed, RunPurpose.ROLLOUT, job.group, _REFERENCE)
    trees = player.grow(tasks, chains, seed=place)
    reference = [player.vectors(tree, [per_branch(tree, leave_one_out(tree))])[0] for tree in trees]
    scores = [[float((tree.outcomes[leaf] or {}).get("em", 0.0)) for leaf in tree.leaves()] for tree in trees]

    place = run_seed(job.seed, RunPurpose.ROLLOUT, job.group, _METHODS)
    turns = true_turns(player, job.rows, tasks[: job.credit_turns], seed=place)
    sums = np.zeros((len(job.rows), len(adam)))
    products, tokens = np.zeros((2, 4, len(job.rows))), np.zeros(len(job.rows))
    advantages = np.full((len(job.rows), len(turns)), np.nan)
    squares = np.array([[(g @ g), (g * adam) @ g] for g in reference])
    for numbers, found in grow_rows(player, job.rows, tasks, seed=place):
        for question, (tree, grown) in enumerate(found):
            g = reference[question]
            weighted = g * adam
            vectors = iter(player.vectors(tree, [part.whole for parts in grown for part in parts]))
            for number, parts in zip(numbers, grown, strict=True):
                samples = [next(vectors) for _ in parts]
                f = np.mean(samples, axis=0)
                sums[number] += f
                tokens[number] += sampled_tokens([part.tree for part in parts]) / len(parts)
                products[0, :3, number] += f @ f, np.mean([one @ one for one in samples]), f @ g
                second = np.mean([(one * adam) @ one for one in samples])
                products[1, :3, number] += (f * adam) @ f, second, f @ weighted
                if question < len(turns):
                    advantages[number, question] = advantage_of(parts[0], turns[question].turn)
    products[:, 3] = squares.sum(axis=0)[:, None]
    _write(
        Path(job.result),
        sums=sums.astype(np.float32),
        reference_sum=np.sum(reference, axis=0, dtype=np.float64).astype(np.float32),
        products=products,
        tokens=tokens,
        questions=job.questions,
        exact_match=sum(float(np.mean(row)) for row in scores),
        q=[turn.q for turn in turns],
        v=[turn.v for turn in turns],
        noise=[turn.noise for turn in turns],
        advantages=advantages,
    )
    return f"group {job.group}: {job.questions} questions in {time.perf_counter() - started:.0f} s"


def write_adam(job: Job, row: Row, *, first: int) -> None:
    """Sample Adam's metric of a job's policy and write it."""
    player = Player.load(job.policy, job.task, seed=job.seed, threads=job.threads)
    _write(Path(job.adam), weights=adam_weights(player, row, first=first, seed=job.seed))


def _write(path: Path, **arrays: Any) -> None:
    """Write a file whole or not at all."""
    partial = path.with_suffix(f".{os.getpid()}")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    partial.replace(path)


# True advantages of turns ----------------------------------------------------------------------------------


class TrueTurn(NamedTuple):
    """A turn of a question's first chain, and what it is worth by many forks.

    Attributes:
        turn: Number of the turn in its chain, from 0.
        q: Mean reward of forks that go on behind it; its own reward where it ended the episode.
        v: Mean reward of forks that sample it again.
        noise: Squared standard error of q - v.
    """

    turn: int
    q: float
    v: float
    noise: float


def true_turns(player: Player, rows: Sequence[Row], tasks: Sequence[Options], *, seed: int) -> list[TrueTurn]:
    """Estimate the advantage of one turn, drawn at random, of each question's first chain.

    The forks come after as many chains as the largest tree of a row has branches, so that none of them has
    the seeds, and so the tokens, of a branch from which a row makes its advantages.
    """
    if not tasks:
        return []
    chains = max(
        RolloutConfig(**{**player.config.rollout.model_dump(), **row.rollout}).leaves for row in rows
    )

    def rule(
        parent: IntArray,
        entropy: FloatArray,
        is_leaf: Any,
        *,
        k: int,
        alpha: float,
        generator: np.random.Generator,
    ) -> list[int]:
        """Go on behind a turn of the first chain and its parent; where it is last, behind that alone."""
        del entropy, alpha
        last = int(np.flatnonzero(is_leaf)[0])
        turn = int(generator.integers(1, last + 1))
        above = int(parent[turn])
        return [above] * k if turn == last else [turn] * (k // 2) + [above] * (k // 2)

    shape = {"expansion": "continue", "chains": chains, "forks": 2 * FORKS, "rounds": 1}
    config = RolloutConfig(**{**player.config.rollout.model_dump(), **shape})
    forks = Expansion("forks of a turn", rule, attach="child")
    trees = rollout(tasks, player.env, player.agent.policy, config, seed=seed, expansion=forks)
    return [read_turn(tree, chains) for tree in trees]


def read_turn(tree: Tree, chains: int) -> TrueTurn:
    """Read a tree of `true_turns`: its branches are the chains, then forks behind the turn and above."""
    leaves, rewards = tree.leaves(), tree.leaf_reward
    chain, forks = tree.path(leaves[0]), leaves[chains:]
    # A fork's first node comes right after the leaf of the branch before it.
    starts = [leaf + 1 for leaf in leaves[chains - 1 : -1]]
    above = int(tree.parent[starts[-1]])
    turn = chain[chain.index(above) + 1]
    again = [rewards[leaf] for start, leaf in zip(starts, forks, strict=True) if tree.parent[start] == above]
    behind = [rewards[leaf] for start, leaf in zip(starts, forks, strict=True) if tree.parent[start] == turn]
    if not behind:
        behind = [rewards[leaves[0]]]
    noise = sum(np.var(part, ddof=1) / len(part) for part in (again, behind) if len(part) > 1)
    return TrueTurn(chain.index(above), float(np.mean(behind)), float(np.mean(again)), float(noise))


def advantage_of(grown: Grown, turn: int) -> float:
    """The advantage of a turn of the first chain: the mean over the branches through it."""
    tree, leaves = grown.tree, grown.tree.leaves()
    node = tree.path(leaves[0])[1 + turn]
    through = [number for number, leaf in enumerate(leaves) if node in tree.path(leaf)]
    return float(grown.advantages[through, node].mean())


def check_rows(rows: Sequence[Row]) -> None:
    """Refuse credit rules that do not exist.

    Raises:
        ConfigError: A row names one.
    """
    for row in rows:
        if row.credit not in credit_rules():
            known = ", ".join(sorted(credit_rules()))
            raise ConfigError(f"--credit: no rule named {row.credit!r}; known: {known}")
