"""Checks that expansion, credit and loss of a configuration go together, before anything is sampled."""

import difflib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from at2po_agent.credit.registry import credit_rules
from at2po_agent.expansion.registry import Expansion, expansion_rules
from at2po_agent.losses import get_loss, loss_names, make_loss
from at2po_agent.rollout.config import RolloutConfig
from at2po_agent.tree import Tree
from at2po_agent.types import Turn


def composition_problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Find the problems of a configuration's parts, each as (key, text).

    Every part is tried with its options on a tree of three nodes, so that anything it refuses is found here.

    Args:
        values: The configuration as nested mappings; it may have other problems, which are not repeated.
    """
    algorithm, rollout = _mapping(values.get("algorithm")), _mapping(values.get("rollout"))
    train = _mapping(values.get("train"))
    rules = expansion_rules()
    name = rollout.get("expansion", "entropy")
    yield from _unknown("rollout.expansion", name, rules)
    rule = rules.get(name) if isinstance(name, str) else None
    yield from _credit_problems(algorithm)
    yield from _loss_problems(algorithm)
    yield from _rollout_problems(rollout, train)
    if rule is not None:
        yield from _expansion_problems(rollout, rule)
        yield from _match_problems(algorithm, rule)


def _expansion_problems(rollout: Mapping[str, Any], rule: Expansion) -> Iterator[tuple[str, str]]:
    """Find unknown options of the expansion rule, and shapes that it cannot grow."""
    for option in _mapping(rollout.get("expansion_options")):
        if option not in rule.options:
            yield f"rollout.expansion_options.{option}", f"unknown option{did_you_mean(option, rule.options)}"
    chains, rounds, forks = _shape(rollout)
    if not all(isinstance(number, int) for number in (chains, rounds, forks)):
        return
    if rule.scope == "chain" and (not chains or forks % chains):
        yield (
            "rollout.forks",
            f"expansion {rule.name!r} shares {forks} forks a round among {chains} trees; use a multiple of "
            f"rollout.chains",
        )
    if rule.adaptive and not rounds * forks:
        yield (
            "rollout.forks",
            f"expansion {rule.name!r} has no leaf left to branch for; set rounds and forks above 0, or "
            "expansion=chains",
        )


def _match_problems(algorithm: Mapping[str, Any], rule: Expansion) -> Iterator[tuple[str, str]]:
    """Find parts that are sound alone and make no sense together."""
    credit, options = algorithm.get("credit", "tree"), _mapping(algorithm.get("credit_options"))
    if credit == "tree_grpo" and rule.scope != "chain":
        yield (
            "algorithm.credit",
            f"tree_grpo compares branches within trees of their own, but expansion {rule.name!r} grows one "
            "tree a question; use rollout.expansion=tree_grpo",
        )
    mode = options.get("advantage_mode")
    if rule.rule is None and credit == "tree" and mode == "diff_parent":
        yield (
            "algorithm.credit_options",
            "advantage_mode=diff_parent is 0 on all turns but a chain's first, whose turns have one value; "
            "use node_value, or an expansion that forks",
        )


def _credit_problems(algorithm: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    name = algorithm.get("credit", "tree")
    unknown = list(_unknown("algorithm.credit", name, credit_rules()))
    if unknown:
        yield from unknown
        return
    rule, options = credit_rules()[name], _mapping(algorithm.get("credit_options"))
    keywords = [name for name, p in inspect.signature(rule).parameters.items() if p.kind is p.KEYWORD_ONLY]
    unknown_options = [option for option in options if option not in keywords]
    for option in unknown_options:
        yield f"algorithm.credit_options.{option}", f"unknown option{did_you_mean(option, keywords)}"
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
    unmet = [tensor for tensor in spec.requires if tensor != "entropies"]
    if unmet:
        yield "algorithm.loss", f"{name!r} needs {', '.join(unmet)} of every token; the trainer has entropies"
        return
    unknown_options = [option for option in options if option not in spec.options]
    for option in unknown_options:
        yield f"algorithm.loss_options.{option}", f"unknown option{did_you_mean(option, spec.options)}"
    if unknown_options:
        return
    try:
        make_loss(name, options)
    except ValueError as error:
        yield "algorithm.loss_options", str(error)


def _rollout_problems(rollout: Mapping[str, Any], train: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    steps, temperature = train.get("steps", 1), rollout.get("temperature", 1.0)
    shape = _shape(rollout)
    if steps == 0:
        return
    if all(isinstance(number, int) for number in shape) and shape[0] + shape[1] * shape[2] == 1:
        yield "rollout.chains", "one leaf per question has nothing to be compared with; use at least 2 leaves"
    if temperature == 0:
        yield (
            "rollout.temperature",
            "greedy sampling repeats one episode, so nothing is learnt; set it above 0",
        )


def _shape(rollout: Mapping[str, Any]) -> list[Any]:
    """Chains, rounds, forks."""
    return [
        rollout.get(key, RolloutConfig.model_fields[key].default) for key in ("chains", "rounds", "forks")
    ]


def _unknown(key: str, name: object, known: Iterable[str]) -> Iterator[tuple[str, str]]:
    if not isinstance(name, str) or name not in known:
        yield key, f"no part named {name!r}{did_you_mean(str(name), known)}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """End a message with the names that were likely meant, or with all of them; "" when there are none."""
    names = sorted(known)
    if close := difflib.get_close_matches(word, names, n=2):
        return f"; did you mean {' or '.join(close)}?"
    return f"; known: {', '.join(names)}" if names else ""


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _example_tree() -> Tree:
    tree = Tree([0])
    for reward in (1.0, 0.0):
        turn = Turn((), (1,), np.array([-0.5], dtype=np.float32), None, "", "", 0.5, "stop")
        tree.close(tree.add(0, turn), reward, {"chain": 0})
    return tree
