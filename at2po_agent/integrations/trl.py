"""Environments, tree rollouts and AT²PO's loss for TRL's `GRPOTrainer`; tested with TRL 1.16.0.

Three parts, each of use by itself:

- `tool_environment` makes one of our environments TRL's `environment_factory`: TRL samples chains, and the
  model calls the environment's tools in the format of its chat template;
- `TreeRollout` is TRL's `rollout_func`: it grows one tree for each question instead, and gives TRL one
  completion for each leaf;
- `ATPOTrainer` trains on these trees: every turn has its own advantage, and a turn's tokens share one
  importance ratio. TRL's own `importance_sampling_level` knows tokens and sequences only.

Both `rollout_func` and `environment_factory` are experimental in TRL and may change with any release of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from torch import Tensor

from at2po_agent.credit.registry import credit_rules
from at2po_agent.losses import atpo_loss, kl_penalty
from at2po_agent.packing.branches import tree_branches
from at2po_agent.policies.base import Policy, as_trainable
from at2po_agent.policies.hf import HFPolicy
from at2po_agent.rollout import RolloutConfig, rollout
from at2po_agent.transcripts.tokenizer import HFTokenizer
from at2po_agent.tree import Tree
from at2po_env import fork
from at2po_env.episodes import CommandEnv, ToolCall, ToolEnv
from at2po_env.episodes.command_env import FORMAT
from at2po_env.errors import ConfigError, EnvError, require
from at2po_env.tools.base import Tool

require("trl", "trl")
require("datasets", "trl")

from datasets import Dataset  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

Env = gymnasium.Env[str, str]
PolicyFactory = Callable[[Any, HFTokenizer], Policy]
"""`(model, tokenizer) -> policy`: makes what samples with the trainer's model."""

_THINK = " "  # of turns whose thinking TRL does not pass on; format rules ask for a block
_TAKEN = ("answer", "reset", "get_reward")
_POSITIONAL, _KEYWORD = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY


def task_dataset(env: Env, indices: Iterable[int] | None = None) -> Dataset:
    """Make TRL's dataset of an environment's questions.

    TRL hands a `rollout_func` nothing but prompts. So a prompt is an empty message that also holds the
    question's index; the text comes from the environment.

    Args:
        env: An environment with a list of tasks.
        indices: Questions by index; None takes all.

    Returns:
        Rows with `prompt` and `index`, for `TreeRollout` as well as for `tool_environment`.

    Raises:
        ConfigError: The environment has no list of tasks.
    """
    tasks: Any = env.get_wrapper_attr("tasks") if env.has_wrapper_attr("tasks") else None
    if tasks is None:
        raise ConfigError(f"{env}: TRL needs a list of questions, and this environment has no `tasks`")
    chosen = list(range(len(tasks)) if indices is None else indices)
    prompts = [[{"role": "user", "content": "", "index": index}] for index in chosen]
    return Dataset.from_dict({"prompt": prompts, "index": chosen})


class TreeRollout:
    """TRL's `rollout_func`: grows a tree for every question, and returns a completion for every leaf.

    TRL repeats each prompt of a dataset `num_generations` times; such a block becomes one tree, so
    `num_generations` must be `config.leaves`. Evaluations have a number of their own, and grow chains.

    Beside the keys that TRL asks for, a completion has `leaf_reward`, which `leaf_rewards` reads, and
    `turn_ids` and `turn_advantages`, one number per token, which `ATPOTrainer` reads.

    Args:
        env: Any forkable environment; TRL's datasets are made of its questions by `task_dataset`.
        config: Shape and limits of a tree; its temperature must be the trainer's.
        credit: Name of the credit rule that gives turns their advantages (`credit.registry`).
        credit_options: Keywords of the rule.
        policy: Makes the policy; HFPolicy reads an episode as one running text. Others may bring a chat
            transcript. A window transcript cannot be written as a prompt and a completion.

    Attributes:
        trees: Trees of the last call.
    """

    def __init__(
        self,
        env: Env,
        config: RolloutConfig,
        *,
        credit: str = "tree",
        credit_options: Mapping[str, Any] | None = None,
        policy: PolicyFactory = HFPolicy,
    ) -> None:
        if credit not in credit_rules():
            raise ConfigError(f"credit: no rule named {credit!r}; known: {', '.join(sorted(credit_rules()))}")
        self.env = env
        self.config = config
        self.trees: list[Tree] = []
        self._credit, self._credit_options = credit, dict(credit_options or {})
        self._make_policy = policy
        self._policy: tuple[Any, Policy] | None = None  # and the model with which it samples
        self._calls = 0

    def __call__(self, prompts: Sequence[Any], trainer: Any) -> dict[str, list[Any]]:
        """Grow the trees of one generation batch.

        Args:
            prompts: The prompts of this process, from `task_dataset`, each as often as the trainer has
                generations.
            trainer: TRL's trainer.

        Returns:
            prompt_ids, completion_ids, logprobs (nats, as sampled; 0 where not sampled), env_mask (1 where
            sampled), leaf_reward, turn_ids (-1 where not sampled) and turn_advantages; one entry per prompt.

        Raises:
            ConfigError: The trainer's settings do not go with the rollout's, or a prompt is of another
                dataset or too long.
        """
        training = bool(trainer.model.training)
        count = trainer.num_generations if training else trainer.num_generations_eval
        self._check(trainer, count if training else self.config.leaves)
        asked = prompts[::count]
        if list(prompts) != [prompt for prompt in asked for _ in range(count)]:
            raise ConfigError(
                f"the {len(prompts)} prompts of this process are not blocks of {count} equal ones, so they "
                "make no trees. Fix: per_device_train_batch_size * steps_per_generation must be a "
                "multiple of num_generations"
            )
        try:
            tasks = [{"index": prompt[-1]["index"]} for prompt in asked]
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"the prompt {asked[0]!r} names no question. Fix: TRL's dataset must come from `task_dataset`"
            ) from error
        config = self.config
        if not training:
            chains = {
                "chains": count,
                "forks": 0,
                "rounds": 0,
                "expansion": "chains",
                "expansion_options": {},
            }
            config = config.model_copy(update=chains)
        place = (trainer.accelerator.process_index, trainer.state.global_step, self._calls)
        seed = int(np.random.SeedSequence(trainer.args.seed, spawn_key=place).generate_state(1)[0])
        self._calls += 1
        trainer.model.eval()  # no dropout while sampling
        try:
            self.trees = rollout(tasks, self.env, self._policy_of(trainer), config, seed=seed)
        finally:
            trainer.model.train(training)
        completions = [completion for tree in self.trees for completion in self._completions(tree, count)]
        return {key: [completion[key] for completion in completions] for key in completions[0]}

    def _check(self, trainer: Any, leaves: int) -> None:
        """Refuse a trainer whose settings contradict the rollout's."""
        problems = []
        if leaves != self.config.leaves:
            problems.append(
                f"num_generations={leaves}, and a tree has {self.config.leaves} leaves (chains + rounds * "
                f"forks). Fix: num_generations={self.config.leaves}"
            )
        if trainer.temperature != self.config.temperature:
            problems.append(
                f"temperature={trainer.temperature} in the trainer and {self.config.temperature} in the "
                "rollout: log-probs would be those of another distribution"
            )
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            problems.append("weights sharded by FSDP or DeepSpeed: the tree rollout samples with whole ones")
        if problems:
            raise ConfigError("; ".join(problems))

    def _policy_of(self, trainer: Any) -> Policy:
        """The policy over the trainer's model, with its present weights."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        if self._policy is None or self._policy[0] is not model:
            self._policy = model, self._make_policy(model, HFTokenizer(trainer.processing_class))
        else:
            as_trainable(self._policy[1]).weights_changed()  # TRL's fused AdamW leaves no other trace
        return self._policy[1]

    def _completions(self, tree: Tree, count: int) -> list[dict[str, Any]]:
        """The branches of a tree as TRL reads completions."""
        leaves, start = tree.leaves(), len(tree.prompt_ids)
        if len(leaves) != count:
            reason = "" if leaves else "; a prompt longer than rollout.max_prompt_tokens has none"
            raise ConfigError(
                f"the tree of {tree.prompt[:80]!r} has {len(leaves)} leaves, not {count}{reason}"
            )
        credit = credit_rules()[self._credit](tree, **self._credit_options)
        completions = []
        for leaf, branch in zip(leaves, tree_branches([tree], [credit.advantages]), strict=True):
            if len(branch.starts) > 1:
                raise ConfigError("a window transcript gives each turn its own prompt, which TRL cannot read")
            empty = len(branch.ids) == start  # TRL wants at least one token
            written = {
                "completion_ids": [*branch.ids[start:].tolist(), *([tree.prompt_ids[-1]] if empty else [])],
                "logprobs": [*branch.log_probs[start:].tolist(), *([0.0] if empty else [])],
                "turn_ids": [*branch.turn_ids[start:].tolist(), *([-1] if empty else [])],
                "turn_advantages": [*branch.advantages[start:].tolist(), *([0.0] if empty else [])],
            }
            env_mask = [int(turn >= 0) for turn in written["turn_ids"]]
            reward = float(tree.leaf_reward[leaf])
            given = {"prompt_ids": list(tree.prompt_ids), "env_mask": env_mask, "leaf_reward": reward}
            completions.append(given | written)
        return completions


def leaf_rewards(completions: Sequence[Any], leaf_reward: Sequence[float], **_: Any) -> list[float]:
    """TRL's reward function for `TreeRollout`: the rewards that the environment gave."""
    del completions
    return list(leaf_reward)


@dataclass
class ATPOConfig(GRPOConfig):  # type: ignore[misc]  # of TRL, untyped here
    """Settings of `ATPOTrainer`: those of TRL's `GRPOConfig`, with AT²PO's clip bounds.

    Attributes:
        epsilon: The ratio of a turn is clipped below 1 - epsilon.
        epsilon_high: And above 1 + epsilon_high.

    Raises:
        ConfigError: A setting was changed that has no effect on this trainer.
    """

    epsilon: float = 3e-3
    epsilon_high: float | None = 4e-3

    # What GRPOTrainer's own loss, advantages and sampling read; here `atpo_loss`, the credit rule and the
    # rollout take their places.
    without_effect: ClassVar[tuple[str, ...]] = (
        *("loss_type", "importance_sampling_level", "delta", "top_entropy_quantile", "entropy_coef"),
        *("use_adaptive_entropy", "off_policy_mask_threshold", "use_bias_correction_kl"),
        *("scale_rewards", "multi_objective_aggregation", "reward_weights"),
        *("use_vllm", "use_transformers_continuous_batching", "max_completion_length", "top_p", "top_k"),
        *("min_p", "repetition_penalty", "generation_kwargs", "cache_implementation"),
    )

    def __post_init__(self) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        changed = [name for name in self.without_effect if getattr(self, name) != defaults[name]]
        if changed:
            raise ConfigError(
                f"{', '.join(changed)}: without effect on ATPOTrainer. Fix: leave them out; sampling and its "
                "limits are set in RolloutConfig, advantages by the credit rule"
            )
        super().__post_init__()


class ATPOTrainer(GRPOTrainer):  # type: ignore[misc]  # of TRL, untyped here
    """TRL's trainer with AT²PO's advantages and loss: `L = atpo_loss + beta KL`, mean over branches.

    Old log-probs are TRL's: recomputed where a batch is trained on more than once, else those of the update
    itself. TRL's tables of completions show its own group advantages, which are not trained on.

    Args:
        model: As in `GRPOTrainer`.
        rollout_func: The tree rollout.
        args: Settings.
        reward_funcs: As in `GRPOTrainer`, for its logs; turns are credited from the leaves' rewards.
        **options: All else that `GRPOTrainer` takes.

    Raises:
        ConfigError: The arguments do not make an AT²PO trainer.
    """

    _name = "ATPO"

    def __init__(
        self,
        model: Any,
        rollout_func: TreeRollout,
        args: ATPOConfig,
        *,
        reward_funcs: Any = leaf_rewards,
        **options: Any,
    ) -> None:
        if not isinstance(rollout_func, TreeRollout) or not isinstance(args, ATPOConfig):
            raise ConfigError(
                "ATPOTrainer takes a TreeRollout as rollout_func and an ATPOConfig as args, got "
                f"{type(rollout_func).__name__} and {type(args).__name__}"
            )
        super().__init__(model, reward_funcs, args, rollout_func=rollout_func, **options)
        if self.aux_loss_enabled:
            raise ConfigError(
                "output_router_logits: ATPOTrainer adds no auxiliary loss of experts; set it to False"
            )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch, with turn ids, and with advantages per token instead of per completion."""
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        trained = output["completion_mask"] * output["tool_mask"] > 0
        turn_ids = torch.full(trained.shape, -1, dtype=torch.int64)
        advantages = torch.zeros(trained.shape)
        for row, given in enumerate(inputs):
            turn_ids[row, : len(given["turn_ids"])] = torch.tensor(given["turn_ids"])
            advantages[row, : len(given["turn_advantages"])] = torch.tensor(given["turn_advantages"])
        output["turn_ids"] = turn_ids.to(trained.device).masked_fill(~trained, -1)
        output["advantages"] = advantages.to(trained.device)
        return output

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """AT²PO's loss of some completions, divided by the number of such pieces in an update."""
        completion_ids, turn_ids = inputs["completion_ids"], inputs["turn_ids"]
        log_probs, entropies, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], completion_ids], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            completion_ids.size(1),
            compute_entropy=True,
        )
        old = inputs.get("old_per_token_logps")
        loss, figures = atpo_loss(
            log_probs,
            log_probs.detach() if old is None else old,
            inputs["advantages"],
            turn_ids,
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
        )
        if self.beta:
            kl, about_kl = kl_penalty(
                log_probs, inputs["ref_per_token_logps"], turn_ids, aggregation="branch"
            )
            loss, figures = loss + self.beta * kl, {**figures, "kl": about_kl["ref_kl"]}
        sampled = turn_ids >= 0
        figures = {**figures, "entropy": entropies[sampled].mean() if sampled.any() else entropies.sum() * 0}
        training = bool(self.model.training)
        for name, value in figures.items():
            mean = self.accelerator.gather(value.detach()).mean().item()
            self._metrics["train" if training else "eval"][name].append(mean)
        return loss / (self.current_gradient_accumulation_steps if training else 1)


def tool_environment(env: Env) -> Callable[[], Any]:
    """Make an environment TRL's `environment_factory`.

    TRL shows the model an environment's methods as functions. They are the tools of a `ToolEnv`, and
    `answer`, which ends the episode; a `CommandEnv` has the one function `act`. Each instance is a fork, so
    nothing is loaded twice. TRL passes on the arguments of calls only, so the format of what the model writes
    around them is not scored. An episode that the model leaves without an answer keeps its rewards so far.

    Args:
        env: The environment; forks of it are played. Rows of the dataset must name their question in a
            column `index` (`task_dataset`) or `task_id`, since all completions of a row are asked the same.

    Returns:
        A factory of instances with `reset`, `get_reward` and a method for each function.

    Raises:
        ConfigError: Another kind of environment, or a tool whose name cannot be that of a function.
    """
    inner = env.unwrapped
    name = env.spec.name if env.spec is not None else type(inner).__name__
    if isinstance(inner, CommandEnv):
        commands = type(name, (_Commands,), {})
        return lambda: commands(fork(env))
    if not isinstance(inner, ToolEnv):
        raise ConfigError(
            f"{type(inner).__name__} cannot be played by functions: expected a ToolEnv or a CommandEnv"
        )
    unfit = [tool for tool in inner.tools if not tool.isidentifier() or tool[0] == "_" or tool in _TAKEN]
    if unfit:
        raise ConfigError(
            f"tools {', '.join(unfit)}: a function of TRL needs another name: an identifier that does not "
            f"begin with '_' and is none of {', '.join(_TAKEN)}"
        )
    tools = type(name, (_Tools,), {tool.name: _tool_method(tool) for tool in inner.tools.values()})
    return lambda: tools(fork(env))


class _Played:
    """An episode as TRL plays it; every public method of a subclass is a function of the model."""

    def __init__(self, env: Env) -> None:
        self._env = env
        self._reward = 0.0
        self._ended = True

    def reset(self, **row: Any) -> str:
        """Begin the episode of a dataset's row, and return what TRL adds to its prompt."""
        options = {key: row[key] for key in ("task_id", "index") if row.get(key) is not None}
        if not options:
            raise EnvError(
                f"the dataset's rows name no question: they have {', '.join(sorted(row))}. Fix: add a column "
                "index or task_id"
            )
        prompt, info = self._env.reset(options=options)
        self._reward, self._ended = 0.0, False
        return self._opening(prompt, info)

    def get_reward(self) -> float:
        """Return the sum of the rewards so far."""
        return self._reward

    def _opening(self, prompt: str, info: Mapping[str, Any]) -> str:
        raise NotImplementedError

    def _step(self, action: str) -> str:
        if self._ended:
            raise EnvError("the episode has ended")  # TRL shows the model this text
        observation, reward, terminated, truncated, _ = self._env.step(action)
        self._reward += float(reward)
        self._ended = terminated or truncated
        return observation.strip()


class _Tools(_Played):
    """An episode of a `ToolEnv`; `tool_environment` adds a method for each tool."""

    def answer(self, answer: str) -> str:
        """Give the final answer, as short as possible. This ends the episode.

        Args:
            answer: The answer.
        """
        inner = self._env.unwrapped
        assert isinstance(inner, ToolEnv)
        return self._step(inner.format_answer(answer, think=_THINK))

    def _opening(self, prompt: str, info: Mapping[str, Any]) -> str:
        del prompt  # it says how calls are written as text; here the chat template shows the functions
        return str(info["question"])

    def _call(self, call: ToolCall) -> str:
        inner = self._env.unwrapped
        assert isinstance(inner, ToolEnv)
        return self._step(inner.protocol.format_call(call))


class _Commands(_Played):
    """An episode of a `CommandEnv`."""

    def act(self, command: str) -> str:
        """Give one command, and get what happens.

        Args:
            command: The command.
        """
        return self._step(f"<action>{command}</action>")

    def _opening(self, prompt: str, info: Mapping[str, Any]) -> str:
        del info
        return prompt.replace(FORMAT, "Give one command at a time, by calling `act`.")


def _tool_method(tool: Tool) -> Callable[..., str]:
    """Make the method that calls a tool; its signature and docstring are what TRL shows the model."""

    def method(self: Any, **arguments: Any) -> str:
        return str(self._call(ToolCall(tool.name, arguments, _THINK)))

    described, parameters, annotations = [], [inspect.Parameter("self", _POSITIONAL)], {}
    for name, field in tool.Arguments.model_fields.items():
        shown = field.alias or name
        default = inspect.Parameter.empty if field.is_required() else field.get_default()
        annotations[shown] = field.annotation
        parameters.append(inspect.Parameter(shown, _KEYWORD, default=default, annotation=field.annotation))
        described.append(f"    {shown}: {_one_line(field.description or shown)}")
    method.__name__ = tool.name
    method.__annotations__ = annotations
    method.__signature__ = inspect.Signature(parameters, return_annotation=str)  # type: ignore[attr-defined]
    method.__doc__ = "\n".join(
        [_one_line(tool.description), "", *(["Args:", *described] if described else [])]
    )
    return method


def _one_line(text: str) -> str:
    return " ".join(text.split())
