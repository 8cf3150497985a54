"""Checks that expansion, credit and loss of a configuration go together, before anything is sampled."""

import difflib
import inspect
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from at2po_agent.config.sections import TrainConfig
from at2po_agent.credit.registry import credit_rules
from at2po_agent.expansion.registry import expansion_rules
from at2po_agent.losses import get_loss, loss_names, make_loss
from at2po_agent.rollout.config import RolloutConfig
from at2po_agent.tree import Tree
from at2po_agent.types import Turn


class Problem(NamedTuple):
    """A problem: the key, and a text with what was got, expected and likely meant."""

    key: str
    text: str


def composition_problems(values: Mapping[str, Any]) -> list[Problem]:
    """Find the problems of a configuration's parts.

    Every part is tried with its options on a tree of three nodes, so that anything it refuses is found here.

    Args:
        values: The configuration as nested mappings; it may have other problems, which are not repeated.
    """
    algorithm, rollout = section(values, "algorithm"), section(values, "rollout")
    name, rules = rollout.get("expansion", "entropy"), expansion_rules()
    problems = _unknown_name("rollout.expansion", name, rules)
    known = not problems
    problems += _credit_problems(algorithm) + _loss_problems(algorithm) + _cluster_problems(values)

    def add(key: str, text: str) -> None:
        problems.append(Problem(key, text))

    # The shape of the trees.
    shape = [
        rollout.get(key, RolloutConfig.model_fields[key].default) for key in ("chains", "rounds", "forks")
    ]
    countable = all(isinstance(number, int) for number in shape)
    chains, rounds, forks = shape
    if section(values, "train").get("steps", 1) != 0:
        if countable and chains + rounds * forks == 1:
            add(
                "rollout.chains",
                "one leaf per question has nothing to be compared with; use at least 2 leaves",
            )
        if rollout.get("temperature", 1.0) == 0:
            add(
                "rollout.temperature",
                "greedy sampling repeats one episode, so nothing is learnt; set it above 0",
            )
    if not known:
        return problems
    # What the expansion rule cannot grow, and parts that are sound alone and make no sense together.
    rule = rules[name]
    problems += _unknown_options(
        "rollout.expansion_options", section(rollout, "expansion_options"), rule.options
    )
    if countable and rule.scope == "chain" and (not chains or forks % chains):
        add(
            "rollout.forks",
            f"expansion {rule.name!r} shares {forks} forks a round among {chains} trees; use a multiple of "
            f"rollout.chains",
        )
    if countable and rule.adaptive and not rounds * forks:
        add(
            "rollout.forks",
            f"expansion {rule.name!r} has no leaf left to branch for; set rounds and forks above 0, or "
            "expansion=chains",
        )
    credit = algorithm.get("credit", "tree")
    if credit == "tree_grpo" and rule.scope != "chain":
        add(
            "algorithm.credit",
            f"tree_grpo compares branches within trees of their own, but expansion {rule.name!r} grows one "
            "tree a question; use rollout.expansion=tree_grpo",
        )
    mode = section(algorithm, "credit_options").get("advantage_mode")
    if rule.rule is None and credit == "tree" and mode == "diff_parent":
        add(
            "algorithm.credit_options",
            "advantage_mode=diff_parent is 0 on all turns but a chain's first, whose turns have one value; "
            "use node_value, or an expansion that forks",
        )
    return problems


def _credit_problems(algorithm: Mapping[str, Any]) -> list[Problem]:
    name, options, rules = (
        algorithm.get("credit", "tree"),
        section(algorithm, "credit_options"),
        credit_rules(),
    )
    if problems := _unknown_name("algorithm.credit", name, rules):
        return problems
    parameters = inspect.signature(rules[name]).parameters
    keywords = [key for key, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]
    if problems := _unknown_options("algorithm.credit_options", options, keywords):
        return problems
    tree = Tree([0])
    for reward in (1.0, 0.0):
        turn = Turn((), (1,), np.array([-0.5], dtype=np.float32), None, "", "", 0.5, "stop")
        tree.close(tree.add(0, turn), reward, {"chain": 0})
    try:
        rules[name](tree, **options)
    except (ValueError, TypeError) as error:
        return [Problem("algorithm.credit_options", f"got {dict(options)!r}: {error}")]
    return []


def _loss_problems(algorithm: Mapping[str, Any]) -> list[Problem]:
    name, options = algorithm.get("loss", "atpo"), section(algorithm, "loss_options")
    if problems := _unknown_name("algorithm.loss", name, loss_names()):
        return problems
    spec = get_loss(name)
    if unmet := [tensor for tensor in spec.requires if tensor != "entropies"]:
        needs = f"{name!r} needs {', '.join(unmet)} of every token; the trainer has entropies"
        return [Problem("algorithm.loss", needs)]
    if problems := _unknown_options("algorithm.loss_options", options, spec.options):
        return problems
    try:
        make_loss(name, options)
    except ValueError as error:
        return [Problem("algorithm.loss_options", str(error))]
    if algorithm.get("clip_share") is not None and not {"clip_low", "clip_high"} <= set(spec.options):
        return [Problem("algorithm.clip_share", f"loss {name!r} has no clip_low and clip_high to follow it")]
    return []


def _cluster_problems(values: Mapping[str, Any]) -> list[Problem]:
    learners = section(values, "cluster").get("learners", 1)
    questions = section(values, "train").get(
        "minibatch_questions", TrainConfig.model_fields["minibatch_questions"].default
    )
    if not isinstance(learners, int) or not isinstance(questions, int) or learners <= 1:
        return []
    problems = []
    if learners > questions:
        problems.append(
            Problem(
                "cluster.learners",
                f"{learners} learners share a minibatch of {questions} questions, so some would have none; "
                f"use at most {questions}, or raise train.minibatch_questions",
            )
        )
    loss = section(values, "algorithm").get("loss", "atpo")
    if loss in loss_names() and "totals" not in inspect.signature(get_loss(loss).function).parameters:
        text = f"{loss!r} takes no totals, so it needs a whole minibatch, and several learners share each one"
        problems.append(Problem("algorithm.loss", f"{text}; set cluster.learners=1"))
    return problems


def _unknown_name(key: str, name: object, known: Collection[str]) -> list[Problem]:
    if isinstance(name, str) and name in known:
        return []
    return [Problem(key, f"no part named {name!r}{did_you_mean(str(name), known)}")]


def _unknown_options(key: str, options: Iterable[str], known: Collection[str]) -> list[Problem]:
    return [
        Problem(f"{key}.{option}", f"unknown option{did_you_mean(option, known)}")
        for option in options
        if option not in known
    ]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """End a message with the names that were likely meant, or with all of them; "" when there are none."""
    names = sorted(known)
    if close := difflib.get_close_matches(word, names, n=2):
        return f"; did you mean {' or '.join(close)}?"
    return f"; known: {', '.join(names)}" if names else ""


def section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a mapping within a mapping; an empty one where there is none."""
    found = values.get(name)
    return found if isinstance(found, Mapping) else {}
