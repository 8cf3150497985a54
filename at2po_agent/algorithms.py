"""Algorithms as data: a preset chooses an expansion rule, a credit rule and a loss, with their options.

Any part goes with any other where that makes sense; `composition_problems` says where it does not. An own
part is one pure function: `register_expansion` (in `rollout`), `register_credit` here, `register_loss` (in
`losses`).
"""

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np

from at2po_agent.credit import (
    AdvantageMode,
    ValueMode,
    branch_advantages,
    node_advantages,
    node_values,
    normalize_leaf_rewards,
    shared_mean_advantages,
)
from at2po_agent.group_credit import Normalization, group_advantages
from at2po_agent.learner import Objective
from at2po_agent.losses import get_loss, loss_names, make_loss
from at2po_agent.rollout.expansions import expansion_rules
from at2po_agent.settings import AlgorithmSettings
from at2po_agent.tree import Tree
from at2po_agent.types import FloatArray, Turn
from at2po_env.errors import ConfigError

PartT = TypeVar("PartT")


class Credit(NamedTuple):
    """What a credit rule gives a tree.

    Attributes:
        advantages: float[N] per node, float[L] per branch (leaves in order), or float[L, N] per node and
            branch.
        values: float[N] node values for the viewer; None where the rule has none.
    """

    advantages: FloatArray
    values: FloatArray | None = None


CreditRule = Callable[..., Credit]
"""`rule(tree, **options) -> Credit`, pure."""

_CREDIT_RULES: dict[str, CreditRule] = {}


def register_credit(name: str, rule: CreditRule) -> CreditRule:
    """Make a credit rule known to configurations.

    Args:
        name: The name, new.
        rule: Pure function `rule(tree, **options) -> Credit`.

    Raises:
        ConfigError: The name is taken.
    """
    if name in _CREDIT_RULES:
        raise ConfigError(f"a credit rule named {name!r} is registered already; choose another name")
    _CREDIT_RULES[name] = rule
    return rule


def credit_rules() -> dict[str, CreditRule]:
    """All registered credit rules by name."""
    return dict(_CREDIT_RULES)


def tree_credit(
    tree: Tree,
    *,
    normalize: bool = True,
    value_mode: ValueMode = "child_softmax",
    advantage_mode: AdvantageMode = "node_value",
) -> Credit:
    """AT²PO's: normalised leaf rewards go up the tree; a turn's advantage comes from its value."""
    leaf_value = normalize_leaf_rewards(tree.leaf_reward) if normalize else tree.leaf_reward
    values = node_values(tree.parent, tree.entropy, leaf_value, mode=value_mode)
    if advantage_mode == "group":
        return Credit(branch_advantages(leaf_value), values)
    return Credit(node_advantages(tree.parent, values, mode=advantage_mode), values)


def group_credit(tree: Tree, *, normalization: Normalization = "mean_std") -> Credit:
    """GRPO's: every token of a branch takes the branch's reward, standardised over the question."""
    return Credit(group_advantages(tree.leaf_reward[tree.is_leaf], normalization=normalization))


def shared_group_credit(tree: Tree, *, normalization: Normalization = "mean_std") -> Credit:
    """ARPO's hard advantage: GRPO's, and a shared turn takes the mean of the branches through it."""
    leaf_value = np.full(len(tree), np.nan)
    leaf_value[tree.is_leaf] = group_advantages(tree.leaf_reward[tree.is_leaf], normalization=normalization)
    return Credit(shared_mean_advantages(tree.parent, leaf_value))


register_credit("tree", tree_credit)
register_credit("group", group_credit)
register_credit("group_shared", shared_group_credit)


@dataclass(frozen=True)
class Preset:
    """One algorithm as a composition.

    Attributes:
        reference: Where it is published.
        rollout: Expansion rule and published shape of the trees; a configuration's own shape goes before it.
        credit: Credit rule.
        loss: Loss.
        credit_options: Keywords of the credit rule, beyond its defaults.
        loss_options: Keywords of the loss, beyond its defaults.
        keep: Which questions are trained on.
    """

    reference: str
    rollout: Mapping[str, Any]
    credit: str
    loss: str
    credit_options: Mapping[str, Any] = field(default_factory=dict)
    loss_options: Mapping[str, Any] = field(default_factory=dict)
    keep: str = "all"

    def algorithm(self) -> dict[str, Any]:
        """The `algorithm` section that this preset stands for, its name left out."""
        return {
            "keep": self.keep,
            "credit": self.credit,
            "credit_options": dict(self.credit_options),
            "loss": self.loss,
            "loss_options": dict(self.loss_options),
        }


_CHAINS = {"expansion": "chains", "chains": 16, "forks": 0, "rounds": 0}

PRESETS: Mapping[str, Preset] = {
    "at2po": Preset(
        reference="https://arxiv.org/abs/2601.04767",
        rollout={"expansion": "entropy", "chains": 10, "forks": 6, "rounds": 2},
        credit="tree",
        loss="atpo",
        credit_options={"value_mode": "child_softmax", "advantage_mode": "node_value"},
        loss_options={"clip_low": 3e-3, "clip_high": 4e-3},
    ),
    "grpo": Preset(
        reference="https://arxiv.org/abs/2402.03300",
        rollout=_CHAINS,
        credit="group",
        loss="grpo",
        loss_options={"clip_low": 0.2, "clip_high": 0.2},
    ),
    "dapo": Preset(
        reference="https://arxiv.org/abs/2503.14476",
        rollout={**_CHAINS, "overlong_share": 2000 / 6192},
        credit="group",
        loss="dapo",
        loss_options={"clip_low": 0.2, "clip_high": 0.28},
        keep="informative",
    ),
    "gspo": Preset(
        reference="https://arxiv.org/abs/2507.18071",
        rollout=_CHAINS,
        credit="group",
        loss="gspo",
        loss_options={"clip_low": 3e-4, "clip_high": 4e-4},
    ),
}


def objective(settings: AlgorithmSettings) -> Objective:
    """The loss that a configuration names, with its options."""
    function = get_loss(settings.loss).function
    built_in = function.__module__.startswith("at2po_agent.losses.")
    return Objective(
        make_loss(settings.loss, settings.loss_options),
        divisible="totals" in inspect.signature(function).parameters,
        needs_advantage=built_in,
    )


def give_credit(tree: Tree, settings: AlgorithmSettings) -> Credit:
    """Advantages of one tree under the credit rule that a configuration names."""
    return _CREDIT_RULES[settings.credit](tree, **settings.credit_options)


def composition_problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong with the parts of a configuration, each as (key, text).

    Parts with their options are tried on a tree of three nodes, so whatever a part refuses is said here,
    before anything is sampled.

    Args:
        values: The configuration as nested mappings, perhaps with other faults (which are not repeated here).
    """
    algorithm, rollout = _mapping(values.get("algorithm")), _mapping(values.get("rollout"))
    train = _mapping(values.get("train"))
    yield from _unknown("rollout.expansion", rollout.get("expansion", "entropy"), expansion_rules())
    yield from _credit_problems(algorithm)
    yield from _loss_problems(algorithm)
    yield from _rollout_problems(rollout, train)


def _credit_problems(algorithm: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    name = algorithm.get("credit", "tree")
    unknown = list(_unknown("algorithm.credit", name, _CREDIT_RULES))
    if unknown:
        yield from unknown
        return
    rule, options = _CREDIT_RULES[name], _mapping(algorithm.get("credit_options"))
    keywords = [name for name, p in inspect.signature(rule).parameters.items() if p.kind is p.KEYWORD_ONLY]
    unknown_options = [option for option in options if option not in keywords]
    for option in unknown_options:
        yield f"algorithm.credit_options.{option}", f"unknown option{_near(option, keywords)}"
    if unknown_options:
        return
    try:
        rule(_example_tree(), **options)
    except (ValueError, TypeError) as error:
        yield "algorithm.credit_options", f"got {dict(options)!r}: {error}"


def _loss_problems(algorithm: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    name = algorithm.get("loss", "atpo")
    unknown = list(_unknown("algorithm.loss", name, loss_names()))
    if unknown:
        yield from unknown
        return
    spec, options = get_loss(name), _mapping(algorithm.get("loss_options"))
    if spec.requires:
        yield (
            "algorithm.loss",
            f"{name!r} needs {', '.join(spec.requires)} of every token, which is not computed yet",
        )
        return
    unknown_options = [option for option in options if option not in spec.options]
    for option in unknown_options:
        yield f"algorithm.loss_options.{option}", f"unknown option{_near(option, spec.options)}"
    if unknown_options:
        return
    try:
        make_loss(name, options)
    except ValueError as error:
        yield "algorithm.loss_options", str(error)


def _rollout_problems(rollout: Mapping[str, Any], train: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    steps, temperature = train.get("steps", 1), rollout.get("temperature", 1.0)
    shape = [rollout.get(key, default) for key, default in (("chains", 10), ("rounds", 2), ("forks", 6))]
    if steps == 0:
        return
    if all(isinstance(number, int) for number in shape) and shape[0] + shape[1] * shape[2] == 1:
        yield "rollout.chains", "one leaf per question has nothing to be compared with; use at least 2 leaves"
    if temperature == 0:
        yield (
            "rollout.temperature",
            "greedy sampling repeats one episode, so nothing is learnt; set it above 0",
        )


def _unknown(key: str, name: object, known: Iterable[str]) -> Iterator[tuple[str, str]]:
    if not isinstance(name, str) or name not in known:
        yield key, f"no part named {name!r}{_near(str(name), known)}"


def _near(word: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(names)}"


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _example_tree() -> Tree:
    tree = Tree([0])
    for reward in (1.0, 0.0):
        turn = Turn((), (1,), np.array([-0.5], dtype=np.float32), None, "", "", 0.5, "stop")
        tree.close(tree.add(0, turn), reward)
    return tree
