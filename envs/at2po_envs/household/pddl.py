"""Reads and writes PDDL problems of the household: objects with types, initial facts, and the goal.

Everything is read in lower case, as Fast Downward reads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from at2po_env.errors import DataError

Expression = str | list["Expression"]
Fact = tuple[str, ...]
"""A predicate and its arguments."""

PREDICATES: Mapping[str, tuple[str, ...]] = {
    "atlocation": ("agent", "location"),
    "receptacleatlocation": ("receptacle", "location"),
    "objectatlocation": ("object", "location"),
    "openable": ("receptacle",),
    "opened": ("receptacle",),
    "inreceptacle": ("object", "receptacle"),
    "isreceptacleobject": ("object",),
    "inreceptacleobject": ("object", "object"),
    "isreceptacleobjectfull": ("object",),
    "wasinreceptacle": ("object", "receptacle"),
    "checked": ("receptacle",),
    "examined": ("location",),
    "receptacletype": ("receptacle", "rtype"),
    "cancontain": ("rtype", "otype"),
    "objecttype": ("object", "otype"),
    "holds": ("agent", "object"),
    "holdsany": ("agent",),
    "holdsanyreceptacleobject": ("agent",),
    "full": ("receptacle",),
    "isclean": ("object",),
    "cleanable": ("object",),
    "ishot": ("object",),
    "heatable": ("object",),
    "iscool": ("object",),
    "coolable": ("object",),
    "pickupable": ("object",),
    "moveable": ("object",),
    "toggleable": ("object",),
    "ison": ("object",),
    "istoggled": ("object",),
    "sliceable": ("object",),
    "issliced": ("object",),
}
"""The predicates of the published domain, with the types of their arguments."""

TYPES = ("agent", "location", "receptacle", "object", "rtype", "otype")
DEEPEST = 50
_TOKEN = re.compile(r"[()]|[^\s()]+")


class Goal(NamedTuple):
    """What a game asks for.

    Attributes:
        family: One of `FAMILIES`.
        object_type: The type of the object, such as "appletype".
        target_type: The type of the receptacle; of the lamp in "look_at_obj_in_light".
    """

    family: str
    object_type: str
    target_type: str


class Problem(NamedTuple):
    """A problem, in lower case: the type of each entity, the facts at the beginning, and the goal."""

    types: Mapping[str, str]
    facts: tuple[Fact, ...]
    goal: Goal


_PLACED: set[Fact] = {("objecttype", "o", "?T"), ("receptacletype", "r", "?R"), ("inreceptacle", "o", "r")}
_GOALS: Mapping[str, set[Fact]] = {
    "pick_and_place_simple": _PLACED,
    "look_at_obj_in_light": {
        ("objecttype", "lamp", "?R"),
        ("toggleable", "lamp"),
        ("istoggled", "lamp"),
        ("receptacleatlocation", "r", "l"),
        ("atlocation", "a", "l"),
        ("inreceptacle", "lamp", "r"),
        ("objecttype", "o", "?T"),
        ("holds", "a", "o"),
    },
    "pick_clean_then_place_in_recep": {*_PLACED, ("cleanable", "o"), ("isclean", "o")},
    "pick_heat_then_place_in_recep": {*_PLACED, ("heatable", "o"), ("ishot", "o")},
    "pick_cool_then_place_in_recep": {*_PLACED, ("coolable", "o"), ("iscool", "o")},
    "pick_two_obj_and_place": {
        *_PLACED,
        ("objecttype", "o2", "?T"),
        ("inreceptacle", "o2", "r"),
        ("differ", "o", "o2"),
    },
}
"""The goal of each family: `?T` is the type of the object, `?R` that of the receptacle or the lamp."""

FAMILIES = tuple(_GOALS)


def read_expressions(text: str, name: str) -> list[Expression]:
    """Read text as nested lists of lower-case words, comments left out.

    Raises:
        DataError: Brackets do not fit.
    """
    stack: list[list[Expression]] = [[]]
    for token in _TOKEN.findall(re.sub(r";[^\n]*", "", text).lower()):
        if token == "(":
            stack.append([])
        elif token != ")":
            stack[-1].append(token)
        elif len(stack) > 1:
            done = stack.pop()
            stack[-1].append(done)
        if len(stack) > DEEPEST or (token == ")" and not stack[-1]):
            raise DataError(f"{name}: the brackets of its PDDL do not fit: it is cut, or no PDDL")
    if len(stack) != 1:
        raise DataError(f"{name}: the PDDL ends within {len(stack) - 1} open brackets: it is cut")
    return stack[0]


def read_problem(text: str, name: str) -> Problem:
    """Read a problem of the published domain.

    Args:
        text: PDDL.
        name: What to call it in errors, usually the path of its file.

    Raises:
        DataError: It is cut, has an unknown type, predicate or object, or its goal is of no family.
    """
    found = read_expressions(text, name)
    if len(found) != 1 or not isinstance(found[0], list) or found[0][:1] != ["define"]:
        raise DataError(f"{name}: expected one PDDL problem, (define (problem ...) ...)")
    parts = {part[0]: part[1:] for part in found[0] if isinstance(part, list) and isinstance(part[0], str)}
    for needed in (":objects", ":init", ":goal"):
        if not parts.get(needed):
            raise DataError(f"{name}: the PDDL problem has no {needed}. Expected objects, init and goal")
    types = dict(_typed(parts[":objects"], name))
    for kind in types.values():
        if kind not in TYPES:
            raise DataError(f"{name}: an object has the type {kind!r}. Expected one of {', '.join(TYPES)}")
    facts = []
    for part in parts[":init"]:
        words = _words(part)
        if words is None or words[0] == "=":
            if isinstance(part, list) and part[:1] == ["="]:
                continue  # costs and distances, of which neither commands nor goals take notice
            raise DataError(f"{name}: {part!r:.80} is no fact. Expected a predicate and its arguments")
        _check_fact(words, types, name)
        facts.append(words)
    return Problem(types, tuple(dict.fromkeys(facts)), _read_goal(parts[":goal"], name))


def write_problem(problem: Problem) -> str:
    """Write a problem as PDDL."""
    objects = "\n  ".join(f"{entity} - {kind}" for entity, kind in problem.types.items())
    facts = "\n  ".join(f"({' '.join(fact)})" for fact in problem.facts)
    goal = _write_goal(problem.goal)
    head = "(define (problem household)\n(:domain alfred)"
    return f"{head}\n(:objects\n  {objects})\n(:init\n  {facts})\n{goal})\n"


def _write_goal(goal: Goal) -> str:
    names = {"?T": goal.object_type, "?R": goal.target_type}
    kinds = {
        "o": "object",
        "o2": "object",
        "lamp": "object",
        "r": "receptacle",
        "a": "agent",
        "l": "location",
    }
    atoms = []
    used: set[str] = set()
    for predicate, *arguments in sorted(_GOALS[goal.family]):
        used.update(argument for argument in arguments if argument in kinds)
        words = " ".join(names.get(argument, f"?{argument}") for argument in arguments)
        atoms.append(f"(not (= {words}))" if predicate == "differ" else f"({predicate} {words})")
    variables = " ".join(f"?{name} - {kinds[name]}" for name in sorted(used))
    return f"(:goal (exists ({variables}) (and {' '.join(atoms)})))"


def _typed(words: Iterable[Expression], name: str) -> Iterator[tuple[str, str]]:
    """Read `a b - t c - t`."""
    waiting: list[str] = []
    rest = iter([word for word in words if isinstance(word, str)])
    for word in rest:
        if word != "-":
            waiting.append(word)
            continue
        kind = next(rest, "")
        for entity in waiting:
            yield entity, kind
        waiting = []
    if waiting:
        raise DataError(f"{name}: {waiting[0]!r} has no type. Expected NAME - TYPE")


def _words(part: Expression) -> Fact | None:
    if isinstance(part, list) and part and all(isinstance(word, str) for word in part):
        return tuple(word for word in part if isinstance(word, str))
    return None


def _check_fact(fact: Fact, types: Mapping[str, str], name: str) -> None:
    predicate, *arguments = fact
    expected = PREDICATES.get(predicate)
    if expected is None:
        raise DataError(f"{name}: unknown predicate {predicate!r}. Expected those of the published domain")
    actual = tuple(types.get(argument, "undeclared") for argument in arguments)
    if actual != expected:
        raise DataError(
            f"{name}: ({' '.join(fact)}) has arguments of the types {actual}. Expected {expected}"
        )


def _read_goal(parts: list[Expression], name: str) -> Goal:
    """Find the family whose goal this is, up to the names of variables and the nesting of quantifiers."""
    wrong = DataError(f"{name}: the goal is of no family that is played here. Expected {', '.join(FAMILIES)}")
    kinds: dict[str, str] = {}
    try:
        atoms = list(_flatten(parts, {}, kinds, name))
    except (ValueError, IndexError) as error:
        raise wrong from error
    facts = set(atoms)
    lamps = {fact[1] for fact in facts if fact[0] == "istoggled"}
    objects = sorted({variable for variable, kind in kinds.items() if kind == "object"} - lamps)
    if len(lamps) > 1 or not 1 <= len(objects) <= 2:
        raise wrong
    # Two quantified agents or locations are one: there is one agent, which is at one place.
    roles = {variable: kind[0] for variable, kind in kinds.items()}
    roles.update(dict.fromkeys(lamps, "lamp"))
    roles.update(zip(objects, ("o", "o2"), strict=False))
    for family, expected in _GOALS.items():
        for order in (roles, {**roles, **dict(zip(reversed(objects), ("o", "o2"), strict=False))}):
            renamed = {(fact[0], *[order.get(word, word) for word in fact[1:]]) for fact in facts}
            goal = _match(renamed, expected, family)
            if goal is not None:
                return goal
    raise wrong


def _match(facts: set[Fact], expected: set[Fact], family: str) -> Goal | None:
    constants = {
        mark: {fact[2] for fact in facts if fact[:2] == (predicate, role)}
        for predicate, role, mark in [fact for fact in expected if fact[-1] in ("?T", "?R")]
    }
    if set(constants) != {"?T", "?R"} or any(len(found) != 1 for found in constants.values()):
        return None
    chosen = {mark: found.pop() for mark, found in constants.items()}
    filled = {(fact[0], *[chosen.get(word, word) for word in fact[1:]]) for fact in expected}
    return Goal(family, chosen["?T"], chosen["?R"]) if facts == filled else None


def _flatten(
    parts: list[Expression], names: Mapping[str, str], kinds: dict[str, str], name: str
) -> Iterator[Fact]:
    """Yield the atoms of nested conjunctions and existential quantifiers; each variable gets its own name."""
    for part in parts:
        if not isinstance(part, list):
            raise ValueError("a word alone")
        head = part[0]
        if head == "and":
            yield from _flatten(part[1:], names, kinds, name)
        elif head == "exists" and isinstance(part[1], list):
            inner = dict(names)
            for variable, kind in _typed(part[1], name):
                inner[variable] = f"{variable}.{len(kinds)}"
                kinds[inner[variable]] = kind
            yield from _flatten(part[2:], inner, kinds, name)
        elif head == "not":
            words = _words(part[1])
            if words is None or words[0] != "=" or len(words) != 3:
                raise ValueError("a negation of something else than equality")
            yield ("differ", *sorted(names.get(word, word) for word in words[1:]))
        else:
            words = _words(part)
            if words is None or words[0] not in PREDICATES:
                raise ValueError("no atom of the domain")
            yield (words[0], *[names.get(word, word) for word in words[1:]])
