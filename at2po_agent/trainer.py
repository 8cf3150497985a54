"""The training loop: collect trees -> credit -> learn -> log; evaluate and save on the way.

Read `Trainer.train` and `Trainer.step`. Everything random comes from `run.seed` and the number of the step,
so a checkpoint needs no generator: a resumed run does bit for bit what an uninterrupted one does. Of several
learners each has a trainer that does all of this; they share the work, and the first writes the files. This
module knows no command line and draws no bars.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from at2po_agent.agents.agent import Agent
from at2po_agent.cluster.learners import Learners
from at2po_agent.cluster.sampling import shared_rollout
from at2po_agent.collect import Collected, collect_trees
from at2po_agent.config.sections import Config
from at2po_agent.credit.registry import Credit
from at2po_agent.environments import (
    Env,
    EnvCounters,
    TaskOrder,
    TaskSplit,
    make_eval_env,
    make_training_env,
    number_of_tasks,
    split_tasks,
)
from at2po_agent.evaluation.evaluate import Evaluation, evaluate_mode
from at2po_agent.evaluation.metrics import intervention_shares, staleness_metrics, tree_metrics
from at2po_agent.health import (
    PROBES,
    HealthWatch,
    Tally,
    add_failures,
    check_failures,
    failed_share,
    failures,
)
from at2po_agent.learning.step import TreeLearner, give_credit
from at2po_agent.rollout import GrownTrees
from at2po_agent.rollout.uncertainty import Thresholds, running_threshold
from at2po_agent.runs.checkpoint import CheckpointError, Restored, load_newest, save_checkpoint
from at2po_agent.runs.disk import disk_refusals
from at2po_agent.runs.folder import RunFolder, fixed_settings
from at2po_agent.runs.interrupts import StopRequested
from at2po_agent.runs.progress import Clock, Progress
from at2po_agent.runs.scalars import Scalars
from at2po_agent.runs.seeding import RunPurpose, run_seed
from at2po_agent.tree import Tree
from at2po_env.errors import ConfigError


@dataclass
class TrainerState:
    """The part of a checkpoint beside weights and optimizer; JSON values only.

    Attributes:
        step: Training steps done.
        cursor: Position in the order of questions.
        sampled_tokens: Tokens sampled in training so far.
        seconds: Time that the run has taken so far, over all its parts.
        cold_start: What the cold start reported.
        before: Evaluations before training, by mode.
        evaluated: The last step that was evaluated on the way.
        version: Version of the weights, as the sampler counts them; None in checkpoints of older releases.
        metrics_lines: Lines of metrics.jsonl when the checkpoint was saved; None in those of older releases.
        epsilon: Threshold of the thinking intervention, where `rollout.thinking.share` is set.
        eta: Threshold of dynamical sampling, where `rollout.resampling.share` is set.
        clip_scale: Factor of the loss's bounds, where `algorithm.clip_share` is set.
        health: Failed and all calls of each service in the newest samples (`HealthWatch.history`).
        trained_questions: How many questions are trained on; None where the environment draws them by seed,
            and in checkpoints of older releases.
        failures: Failed and all episodes and calls of the training so far (`health.failures`).
    """

    step: int = 0
    cursor: int = 0
    sampled_tokens: int = 0
    seconds: float = 0.0
    cold_start: dict[str, float] = field(default_factory=dict)
    before: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluated: int = 0
    version: int | None = None
    metrics_lines: int | None = None
    epsilon: float | None = None
    eta: float | None = None
    clip_scale: float = 1.0
    health: list[dict[str, tuple[int, int]]] = field(default_factory=list)
    trained_questions: int | None = None
    failures: dict[str, tuple[int, int]] = field(default_factory=dict)


class Trainer:
    """Trains an agent in a run's folder, a step at a time.

    Args:
        config: The run.
        agent: The model that learns, and the policy that samples with it.
        folder: The run's folder.
        progress: Listener; it may raise `StopRequested` from `advance`.
        env: The environment that is trained on; None makes the configured one.
        eval_env: The environment of evaluations; None makes the configured one.
        started: `time.monotonic()` when the run began; None means now.
        learners: The processes that train together; None for this process alone.
    """

    def __init__(
        self,
        config: Config,
        agent: Agent,
        folder: RunFolder,
        progress: Progress,
        *,
        env: Env | None = None,
        eval_env: Env | None = None,
        started: float | None = None,
        learners: Learners | None = None,
    ) -> None:
        self.config = config
        self.agent = agent
        self.folder = folder
        self.state = TrainerState()
        self._progress = progress
        self._env = env or make_training_env(config)
        self._eval_env = eval_env
        if eval_env is None and config.eval.questions:
            self._eval_env = make_eval_env(config)
        self.split = self._share_out()
        self._order = TaskOrder(self.split.training, run_seed(config.run.seed, RunPurpose.TASKS))
        self._learners = learners or Learners()
        self._grow = shared_rollout(self._learners)
        self._learner = TreeLearner(agent.model, config, folder.path, progress.message, self._learners)
        self._health = HealthWatch(
            config.health,
            progress.message,
            f"then go on with: {folder.resume_command}",
            self._keep_error,
            self._learners.together,
        )
        self._scalars: Scalars | None = None
        self._first_step = 0
        self._started = time.monotonic() if started is None else started
        self._saved_step: int | None = None
        self._warned: set[str] = set()

    @property
    def seconds(self) -> float:
        """Time that the run has taken so far, over all its parts."""
        return self.state.seconds + time.monotonic() - self._started

    def train(self) -> None:
        """Do the steps that are left, with checkpoints and evaluations on the way.

        Raises:
            StopRequested: After saving a checkpoint of the last whole step.
        """
        config = self.config.train
        self._progress.start("train", config.steps)
        self._progress.advance("train", self.state.step)
        try:
            self._evaluate_if_due()
            while self.state.step < config.steps:
                self._progress.step(self.step())
                self._evaluate_if_due()
                if config.save_every and self.state.step % config.save_every == 0:
                    self.save()
                self._learners.together(lambda: self._progress.advance("train"))
        except StopRequested:
            self.save()
            raise
        self._progress.finish("train")
        self.save()

    def step(self) -> dict[str, Any]:
        """One training step; returns the record that went to metrics.jsonl.

        A stop that is requested while trees grow takes effect there, and leaves everything as after the last
        step.
        """
        clock, counters, number = Clock(), EnvCounters(), self.state.step + 1
        # Collect: the policy grows the trees of the step's questions; again, if a service died meanwhile.
        collected, health = self._health.sound(
            lambda: self._collect(number, clock),
            lambda sample: sample.sampled,
            probe=self._probe,
            pausing=self.save,
            tick=lambda: self._progress.advance("train", 0),
        )
        self.agent.sampler.rest()
        # Credit: an advantage for every turn.
        trees = self._learner.with_kl(collected.trees, number)
        credits = [give_credit(tree, self.config.algorithm) for tree in trees]
        clock.lap("credit")
        # Learn: the updates of the step, and new weights for the policy.
        figures = staleness_metrics(trees, self.agent.sampler.version)
        figures |= self._learner.learn(trees, credits, step=number, clock=clock)
        self.agent.sampler.weights_changed()
        self.state.step, self.state.cursor = number, collected.cursor
        self.state.clip_scale = self._learner.clip_scale
        self.state.sampled_tokens += collected.tokens
        self._count_failures(failures(collected.sampled, self._health.history[-1]))
        figures |= self._follow_thresholds(collected)
        # Log: some trees with their credit, and one line of figures.
        config = self.config.train
        every, kept = config.save_trees_every, config.save_trees
        if every and (number % every == 0 or number in (1, config.steps)):
            pairs = zip(trees[:kept], credits[:kept], strict=True)
            self.folder.write_trees(number, [tree_record(self._env, *pair, number) for pair in pairs])
        clock.lap("rest")
        record = {
            "kind": "train",
            "step": number,
            "sampled_tokens": self.state.sampled_tokens,
            "step_tokens": collected.tokens,
            "step_tool_calls": collected.tool_calls,
            **tree_metrics(collected.sampled),
            "trained_questions": len(trees),
            **figures,
            **counters.figures(),
            **health,
            "seconds": sum(clock.phases.values()),
            **{f"seconds/{phase}": seconds for phase, seconds in clock.phases.items()},
        }
        self._record(record)
        return record

    def evaluate(self, mode: str) -> Evaluation:
        """Evaluate the current weights, `greedy` or `sampled`, and record the figures."""
        assert self._eval_env is not None, "evaluations have questions"
        result = evaluate_mode(
            self.config,
            mode,
            self._eval_env,
            self.agent.policy,
            self._progress,
            split=self.split,
            go_on=f"then go on with: {self.folder.resume_command}",
            on_error=self._keep_error,
            learners=self._learners,
        )
        share, config = result.failed_share, self.config.health
        if config.fail_at is not None and share > config.fail_at and self.state.step:
            self.save()  # before its line is written, so that a resume evaluates again
        self._record({"kind": "eval", "mode": mode, "step": self.state.step, **result.to_json()})
        check_failures(f"evaluation ({mode}) after step {self.state.step}", result.failures, share, config)
        return result

    def check(self) -> None:
        """Fail where too much failed in training.

        Raises:
            ServiceError: More than `health.fail_at` of its episodes or calls.
        """
        counted = {name: Tally(*one) for name, one in self.state.failures.items()}
        counts = {name: one.failed for name, one in counted.items()}
        check_failures("training", counts, failed_share(counted), self.config.health)

    def save(self) -> None:
        """Write a checkpoint of the current step, unless it was written or read before."""
        if self._saved_step == self.state.step:
            return
        self.state.version = self.agent.sampler.version
        self.state.metrics_lines = self.folder.metrics_lines()
        self.state.health = [
            {name: (*one,) for name, one in tallies.items()} for tallies in self._health.history
        ]
        self.state.trained_questions = self._trained_questions
        self.state.seconds = self.seconds
        self._started = time.monotonic()
        if self._learners.first:
            save_checkpoint(
                self.folder.checkpoints,
                step=self.state.step,
                model=self.agent.model,
                optimizer=self._learner.optimizer,
                tokenizer=getattr(self.agent.tokenizer, "hf", None),
                state=vars(self.state),
                keep=self.config.train.keep_checkpoints,
                config=fixed_settings(self.config),
            )
        else:
            self._learner.optimizer.state_dict()  # hands its part to the first
        self._saved_step = self.state.step

    def restore(self, *, rewind: bool = True) -> Restored:
        """Go back to the newest checkpoint that is whole.

        Args:
            rewind: Whether to set later lines of the metrics aside; a finished run keeps them.
        """
        restored = load_newest(
            self.folder.checkpoints,
            model=self.agent.model,
            optimizer=self._learner.optimizer,
            report=self._progress.message,
            config=fixed_settings(self.config),
        )
        try:
            self.state = TypeAdapter(TrainerState).validate_python(restored.state)
        except ValidationError as error:
            raise CheckpointError(
                f"{restored.path}: state.json holds no state of a training run ({error.errors()[0]['msg']}); "
                f"delete the folder {restored.path} or restore the file"
            ) from error
        trained, now = self.state.trained_questions, self._trained_questions
        if now != trained and (trained is not None or self.split.held_out):
            raise ConfigError(
                f"{self.folder.path}: the run trained on {trained or 'all'} questions, and would go on with "
                f"{now}: a change of eval or of the data has changed which are held out. Fix: undo it, or "
                "start a new run"
            )
        self._health.history = [
            {name: Tally(*one) for name, one in tallies.items()} for tallies in self.state.health
        ]
        self._learner.clip_scale = self.state.clip_scale
        self._saved_step = self.state.step
        self._first_step = self.state.step + 1
        if rewind:
            self.folder.rewind_metrics(self.state.step, self.state.metrics_lines)
        if self.state.version is not None:
            self.agent.sampler.count_from(self.state.version - 1)  # the checkpoint's weights come next
        self.weights_changed()
        return restored

    def weights_changed(self) -> None:
        """Let sampler and learner take over the model's weights, which something else changed."""
        self._learner.weights_changed()
        self.agent.sampler.weights_changed()

    def close(self) -> None:
        """Close the files that are open."""
        if self._scalars is not None:
            self._scalars.close()

    def _count_failures(self, found: Mapping[str, Tally]) -> None:
        before = {name: Tally(*one) for name, one in self.state.failures.items()}
        self.state.failures = {name: (*one,) for name, one in add_failures(before, found).items()}

    def _keep_error(self, traceback: str) -> None:
        """Keep and show the first traceback of an environment; later ones say the same again."""
        file = self.folder.keep_first_error(traceback)
        if file is not None:
            self._progress.message(f"the environment failed, first with this ({file}):\n{traceback.rstrip()}")

    @property
    def _trained_questions(self) -> int | None:
        return None if self.split.training is None else len(self.split.training)

    def _share_out(self) -> TaskSplit:
        """Decide which questions are trained on; all of them where nothing is evaluated."""
        if self._eval_env is None or not self.config.eval.questions:
            count = number_of_tasks(self._env)
            return TaskSplit(None if count is None else range(count), [], None)
        return split_tasks(self.config, self._env, self._eval_env)

    def _collect(self, number: int, clock: Clock) -> Collected:
        if "rollout" in clock.phases:  # this is another attempt, after a pause
            clock.lap("paused")
        phase = "rollout"
        self._progress.start(phase, self.config.train.questions * self.config.rollout.leaves)
        collected = collect_trees(
            self._order,
            self.state.cursor,
            self._env,
            self.agent.policy,
            self.config,
            step=number,
            thresholds=Thresholds(self.state.epsilon, self.state.eta),
            on_leaf=lambda: self._progress.advance(phase),
            grow=self._grow,
        )
        self._progress.finish(phase)
        clock.lap("rollout")
        clock.phases["rollout"] -= collected.policy_seconds
        clock.phases["sampling"] = clock.phases.get("sampling", 0.0) + collected.policy_seconds
        return collected

    def _follow_thresholds(self, collected: Collected) -> dict[str, float]:
        """Set the thresholds of T2PO's interventions for the next step, and watch how often they fire.

        Returns:
            The thresholds of this step, and the shares of turns that were ended while thinking and of
            attempts that were discarded.
        """
        thinking, resampling = self.config.rollout.thinking, self.config.rollout.resampling
        figures: dict[str, float] = {}
        fired = intervention_shares(collected.sampled)
        for name, on, threshold in (
            ("thinking", thinking.enabled, thinking.in_force(self.state.epsilon)),
            ("resampling", resampling.enabled, resampling.in_force(self.state.eta)),
        ):
            if not on:
                continue
            figures[f"{name}/share"] = fired[name]
            if threshold is None:  # the first step of a share: nothing could fire yet
                continue
            figures[f"{name}/threshold"] = threshold
            # Of the turns that could be resampled (not the first of a branch), the share that was.
            closer = [difference < threshold for difference in collected.differences]
            rate = sum(closer) / len(closer) if name == "resampling" and closer else fired[name]
            if not 0.0 < rate < 0.8 and name not in self._warned:
                self._warned.add(name)
                often = "never" if rate == 0 else f"in {rate:.0%} of the turns"
                self._progress.message(
                    f"rollout.{name} fires {often} in step {self.state.step}, at a threshold of "
                    f"{threshold:g}. Fix: rollout.{name}.share=0.15 lets the threshold follow the policy"
                )
        if thinking.enabled and thinking.share is not None:
            self.state.epsilon = running_threshold(self.state.epsilon, collected.changes, thinking.share)
        if resampling.enabled and resampling.share is not None:
            self.state.eta = running_threshold(self.state.eta, collected.differences, resampling.share)
        return figures

    def _probe(self) -> GrownTrees:
        """Play one episode of some questions of the next step: it calls what the step would call."""
        config = self.config
        chain = {"chains": 1, "forks": 0, "rounds": 0, "expansion": "chains", "expansion_options": {}}
        tasks = self._order.options(self.state.cursor, min(PROBES, config.train.questions))
        seed = run_seed(config.run.seed, RunPurpose.ROLLOUT, self.state.step + 1)
        return self._grow(
            tasks, self._env, self.agent.policy, config.rollout.model_copy(update=chain), seed=seed
        )

    def _evaluate_if_due(self) -> None:
        step, every = self.state.step, self.config.eval.every
        due = every and step % every == 0 and 0 < step < self.config.train.steps
        if due and self.config.eval.questions and self.state.evaluated < step:
            self.evaluate("greedy")
            self.state.evaluated = step

    def _record(self, record: Mapping[str, Any]) -> None:
        if not self._learners.first:
            return
        self.folder.append_metrics(record)
        with disk_refusals(self.folder.tensorboard):
            if self._scalars is None:
                self._scalars = Scalars(self.folder.tensorboard, purge_step=self._first_step)
            self._scalars.add(record)


def tree_record(env: Env, tree: Tree, credit: Credit, step: int) -> dict[str, Any]:
    """A tree with its question, golden answers, values and advantages, for the tree pages."""
    tasks: Any = env.get_wrapper_attr("tasks") if env.has_wrapper_attr("tasks") else None
    try:
        task = tasks.by_id(tree.task_id) if tree.task_id and hasattr(tasks, "by_id") else None
    except KeyError:
        task = None
    return {
        "step": step,
        "question": getattr(task, "question", ""),
        "golden_answers": list(getattr(task, "golden_answers", ())),
        "values": None if credit.values is None else credit.values.tolist(),
        "advantages": credit.advantages.tolist(),
        "tree": tree.to_json(),
    }
