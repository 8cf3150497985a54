"""The published rules and sentences of the household: what game files carry, and how a game's own differ.

A game file brings its own domain (PDDL) and grammar (twl2). This interpreter plays the published rules only,
so it compares: the actions must be the ones below, up to layout, costs and comments, and the sentences too.
Games of version 2.1.1 write `put X in/on Y`, call places by number and have no `help`; those of 2.1.2 write
`move X to Y`.

Source: Shridhar et al., ALFWorld (arXiv 2010.03768); `alfred.pddl` and `alfred.twl2` of the distribution
`alfworld` 0.4.2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from at2po_env.errors import DataError
from at2po_envs.household.pddl import PREDICATES, Expression, read_expressions

HELP = "\n".join(
    [
        "",
        "Available commands:",
        "  look:                             look around your current location",
        "  inventory:                        check your current inventory",
        "  go to (receptacle):               move to a receptacle",
        "  open (receptacle):                open a receptacle",
        "  close (receptacle):               close a receptacle",
        "  take (object) from (receptacle):  take an object from a receptacle",
        "  move (object) to (receptacle):  place an object in or on a receptacle",
        "  examine (something):              examine a receptacle or an object",
        "  use (object):                     use an object",
        "  heat (object) with (receptacle):  heat an object using a receptacle",
        "  clean (object) with (receptacle): clean an object using a receptacle",
        "  cool (object) with (receptacle):  cool an object using a receptacle",
        "  slice (object) with (object):     slice an object using a sharp object",
        "",
    ]
)


class Words(NamedTuple):
    """How the sentences of one game differ from those of another.

    Attributes:
        puts: It says `put X in/on Y`; else `move X to Y`.
        arrives_at_place: "You arrive at loc 3."; else the receptacle is named.
        helps: There is a command `help`.
    """

    puts: bool = False
    arrives_at_place: bool = False
    helps: bool = True


_HERE = "(atLocation ?a ?l) (receptacleAtLocation ?r ?l)"
_OPEN = "(or (not (openable ?r)) (opened ?r))"

# Action: parameters, precondition, effect.
ACTIONS: Mapping[str, tuple[str, str, str]] = {
    "look": ("?a - agent ?l - location", "(and (atLocation ?a ?l))", "(and (checked ?l))"),
    "inventory": ("?a - agent", "()", "(and (checked ?a))"),
    "examineReceptacle": (
        "?a - agent ?r - receptacle",
        f"(and (exists (?l - location) (and {_HERE})))",
        "(and (checked ?r))",
    ),
    "examineObject": (
        "?a - agent ?o - object",
        # The comma is the original's. It makes "location," a type without entities, so only what is held
        # can be examined.
        "(or (exists (?l - location, ?r - receptacle)"
        f" (and {_HERE} (inReceptacle ?o ?r) {_OPEN})) (holds ?a ?o))",
        "(and (checked ?o))",
    ),
    "GotoLocation": (
        "?a - agent ?lStart - location ?lEnd - location ?r - receptacle",
        "(and (atLocation ?a ?lStart) (receptacleAtLocation ?r ?lEnd))",
        "(and (not (atLocation ?a ?lStart)) (atLocation ?a ?lEnd))",
    ),
    "OpenObject": (
        "?a - agent ?l - location ?r - receptacle",
        f"(and (openable ?r) {_HERE} (not (opened ?r)))",
        "(and (opened ?r) (checked ?r))",
    ),
    "CloseObject": (
        "?a - agent ?l - location ?r - receptacle",
        f"(and (openable ?r) {_HERE} (opened ?r))",
        "(and (not (opened ?r)))",
    ),
    "PickupObject": (
        "?a - agent ?l - location ?o - object ?r - receptacle",
        f"(and (pickupable ?o) {_HERE} (inReceptacle ?o ?r) (not (holdsAny ?a)) {_OPEN})",
        "(and (not (inReceptacle ?o ?r)) (holds ?a ?o) (holdsAny ?a) (not (objectAtLocation ?o ?l)))",
    ),
    "PutObject": (
        "?a - agent ?l - location ?o - object ?r - receptacle ?ot - otype ?rt - rtype",
        f"(and (holds ?a ?o) {_HERE} {_OPEN}"
        " (objectType ?o ?ot) (receptacleType ?r ?rt) (canContain ?rt ?ot))",
        "(and (inReceptacle ?o ?r) (objectAtLocation ?o ?l) (not (holds ?a ?o)) (not (holdsAny ?a)))",
    ),
    "CleanObject": (
        "?a - agent ?l - location ?r - receptacle ?o - object",
        f"(and (cleanable ?o) (or (receptacleType ?r SinkBasinType)) {_HERE} (holds ?a ?o))",
        "(and (isClean ?o))",
    ),
    "HeatObject": (
        "?a - agent ?l - location ?r - receptacle ?o - object",
        f"(and (heatable ?o) (or (receptacleType ?r MicrowaveType)) {_HERE} (holds ?a ?o))",
        "(and (isHot ?o) (not (isCool ?o)))",
    ),
    "CoolObject": (
        "?a - agent ?l - location ?r - receptacle ?o - object",
        f"(and (coolable ?o) (or (receptacleType ?r FridgeType)) {_HERE} (holds ?a ?o))",
        "(and (isCool ?o) (not (isHot ?o)))",
    ),
    "ToggleObject": (
        "?a - agent ?l - location ?o - object ?r - receptacle",
        f"(and (toggleable ?o) {_HERE} (inReceptacle ?o ?r))",
        "(and (when (isOn ?o) (not (isOn ?o))) (when (not (isOn ?o)) (isOn ?o)) (isToggled ?o))",
    ),
    "SliceObject": (
        "?a - agent ?l - location ?co - object ?ko - object",
        "(and (sliceable ?co) (or (objectType ?ko KnifeType) (objectType ?ko ButterKnifeType))"
        " (atLocation ?a ?l) (objectAtLocation ?co ?l) (holds ?a ?ko))",
        "(and (isSliced ?co))",
    ),
    "help": ("?a - agent", "()", "(and (checked ?a))"),
}

PUT = ("move {o} to {r}", "put {o} in/on {r}")
PUT_SAID = ("You move the {o.name} to the {r.name}.", "You put the {o.name} in/on the {r.name}.")
ARRIVED = tuple(f"You arrive at {{{x}.name}}. #examineReceptacle.feedback#" for x in ("r", "lend"))

# Action: the command's template, and the rule of what is said afterwards.
TEMPLATES: Mapping[str, tuple[str, str]] = {
    "GotoLocation": (
        "go to [{r.name | receptacleatlocation(r:receptacle, lend:location)}]",
        "#GotoLocation.feedback#",
    ),
    "OpenObject": ("open {r}", "#OpenObject.feedback#"),
    "CloseObject": ("close {r}", "#CloseObject.feedback#"),
    "PickupObject": ("take {o} from {r}", "#PickupObject.feedback#"),
    "PutObject": (PUT[0], "#PutObject.feedback#"),
    "inventory": ("inventory", "#inventory.feedback#"),
    "examineReceptacle": ("examine {r}", "#examineReceptacle.feedback#"),
    "examineObject": ("examine {o}", "#examineObject.feedback#"),
    "ToggleObject": ("use {o}", "#toggleObject.feedback#"),
    "HeatObject": ("heat {o} with {r}", "#heatObject.feedback#"),
    "CleanObject": ("clean {o} with {r}", "#cleanObject.feedback#"),
    "CoolObject": ("cool {o} with {r}", "#coolObject.feedback#"),
    "SliceObject": ("slice {co} with {ko}", "#sliceObject.feedback#"),
    "look": ("look", "#look.feedback#"),
    "help": ("help", "#help.feedback#"),
}

_NAMED = "o.indefinite + ' ' + o.name"
_FACING = "atlocation(a:agent, l:location) & receptacleatlocation(r:receptacle, l:location)"
_FLOOR = (
    "atlocation(a:agent, l:location) & objectatlocation(o:object, l:location) & "
    "receptacleatlocation(r:receptacle, l:location) & not_inreceptacle(o:object, r:receptacle)"
)
_LOOKS = [
    ("isclean ishot issliced", "hot and clean sliced"),
    ("isclean iscool issliced", "cool and clean sliced"),
    ("isclean issliced", "clean sliced"),
    ("ishot issliced", "hot sliced"),
    ("iscool issliced", "cool sliced"),
    ("isclean ishot", "hot and clean"),
    ("isclean iscool", "cool and clean"),
    ("ishot", "hot"),
    ("isclean", "clean"),
    ("iscool", "cold"),
]

# Rule: alternatives of (condition, text), of which the first with a true condition is said.
SENTENCES: Mapping[str, list[tuple[str, str]]] = {
    "intro": [("", "-= Welcome to TextWorld, ALFRED! =-\n\n#look.feedback#\n\n#task#")],
    "GotoLocation.feedback": [("", ARRIVED[0])],
    "OpenObject.feedback": [("", "You open the {r.name}. #examineReceptacle.feedback#")],
    "CloseObject.feedback": [("", "You close the {r.name}.")],
    "PickupObject.feedback": [("", "You pick up the {o.name} from the {r.name}.")],
    "PutObject.feedback": [("", PUT_SAID[0])],
    "inventory.feedback": [
        ("holdsany(a:agent)", f"You are carrying: [{{{_NAMED} | holds(a:agent, o:object)}}]."),
        ("", "You are not carrying anything."),
    ],
    "examineReceptacle.feedback": [
        (
            "openable(r:receptacle) & opened(r:receptacle)",
            f"The {{r.name}} is open. In it, you see [{{{_NAMED} | inreceptacle(o:object, r:receptacle)}}].",
        ),
        ("openable(r:receptacle)", "The {r.name} is closed."),
        ("", f"On the {{r.name}}, you see [{{{_NAMED} | inreceptacle(o:object, r:receptacle)}}]."),
    ],
    "examineObject.feedback": [
        (
            "isreceptacleobject(o:object)",
            "This is a normal {o.name}. In it, you see "
            "[{o2.indefinite + ' ' + o2.name | inreceptacleobject(o2:object, o:object)}].",
        ),
        *[
            (" & ".join(f"{flag}(o:object)" for flag in flags.split()), f"This is a {look} {{o.name}}.")
            for flags, look in _LOOKS
        ],
        ("toggleable(o:object) & istoggled(o:object)", "This {o.name} is on."),
        ("toggleable(o:object) & not_istoggled(o:object)", "This {o.name} is off."),
        ("sliceable(o:object) & issliced(o:object)", "This is a sliced {o.name}."),
        ("", "There's nothing special about {o.name}."),
    ],
    "toggleObject.feedback": [
        ("toggleable(o:object) & istoggled(o:object)", "You turn on the {o.name}."),
        ("toggleable(o:object)", "You turn off the {o.name}."),
        ("", "You don't see any switch on the {o.name}."),
    ],
    "heatObject.feedback": [("", "You heat the {o.name} using the {r.name}.")],
    "cleanObject.feedback": [("", "You clean the {o.name} using the {r.name}.")],
    "coolObject.feedback": [("", "You cool the {o.name} using the {r.name}.")],
    "sliceObject.feedback": [("", "You sliced the {co.name} with the {ko.name}.")],
    "look.feedback": [
        (_FACING, "#look-variations#. Next to it, you see #list_objects_on_the_floor#."),
        (
            "",
            "You are in the middle of a room. Looking quickly around you, you see #list_appliances#.",
        ),
    ],
    "look-variations": [("", f"You are facing the [{{r.name | {_FACING}}}]")],
    "list_objects_on_the_floor": [(_FLOOR, f"[{{#overview(o)# | {_FLOOR}}}]"), ("", "nothing")],
    "list_appliances": [
        (
            "receptacleatlocation(r:receptacle, l:location)",
            "[{#overview(r)# | receptacleatlocation(r:receptacle, l:location)}]",
        ),
        ("", "nothing"),
    ],
    "overview(o)": [("", "{o.indefinite} {o.name}")],
    "overview(r)": [("", "{r.indefinite} {r.name or r.id}")],
    "list_empty": [("", "nothing")],
    "list_separator": [("", ", ")],
    "list_last_separator": [("", ", and ")],
    "help.feedback": [("", HELP)],
}
_TASK = re.compile(r"Your task is to: (.*)\.", re.DOTALL)
_ACTION = re.compile(r"^action\s+(\w+)\s*\{(.*?)^\}", re.DOTALL | re.MULTILINE)


def write_domain(words: Words) -> str:
    """Write the published domain as PDDL."""
    predicates = []
    for predicate, kinds in PREDICATES.items():
        predicates.append(f"({predicate} {' '.join(f'?x{n} - {kind}' for n, kind in enumerate(kinds))})")
    actions = [
        f"(:action {name}\n  :parameters ({parameters})\n  :precondition {before}\n  :effect {after})"
        for name, (parameters, before, after) in ACTIONS.items()
        if words.helps or name != "help"
    ]
    return "\n".join(
        [
            "(define (domain alfred)",
            "(:requirements :adl :action-costs :typing)",
            "(:types agent location receptacle object rtype otype)",
            f"(:predicates {' '.join(predicates)})",
            "(:functions (total-cost) - number)",
            *actions,
            ")\n",
        ]
    )


def write_grammar(task: str, words: Words) -> str:
    """Write the published grammar as twl2, for a game about `task`."""
    rules = {**SENTENCES, "task": [("", f"Your task is to: {task}.")]}
    if words.arrives_at_place:
        rules["GotoLocation.feedback"] = [("", ARRIVED[1])]
    if words.puts:
        rules["PutObject.feedback"] = [("", PUT_SAID[1])]
    listed = {
        name: [
            {"condition": condition, "rhs": text} if condition else {"rhs": text} for condition, text in rule
        ]
        for name, rule in rules.items()
    }
    parts = [f'grammar :: """\n{json.dumps(listed, indent=1)}\n""";']
    for name, (template, said) in TEMPLATES.items():
        if name == "help" and not words.helps:
            continue
        template = PUT[1] if name == "PutObject" and words.puts else template
        parts.append(f'action {name} {{\n    template :: "{template}";\n    feedback :: "{said}";\n}}')
    return "\n\n".join(parts) + "\n"


def read_domain(text: str, name: str) -> bool:
    """Check that the actions of a domain are the published ones; return whether `help` is among them.

    Raises:
        DataError: Another one is there, one is missing, or one differs.
    """
    actions = _actions(text, name)
    for action in actions:
        if action not in _OURS:
            raise DataError(f"{name}: its domain has an action {action!r}, which is not a published one")
    for action, rule in _OURS.items():
        if actions.get(action, rule if action == "help" else None) != rule:
            how = "differs from" if action in actions else "is missing beside"
            raise DataError(f"{name}: the action {action!r} of its domain {how} the published ones")
    return "help" in actions


def _actions(text: str, name: str) -> dict[str, Expression]:
    """Return the actions of a domain without costs."""
    found = read_expressions(text, name)
    if len(found) != 1 or not isinstance(found[0], list):
        raise DataError(f"{name}: expected one PDDL domain, (define (domain ...) ...)")
    actions: dict[str, Expression] = {}
    for part in found[0]:
        if isinstance(part, list) and part[0] == ":action" and isinstance(part[1], str):
            actions[part[1]] = [_without_costs(inner) for inner in part[2:]]
    return actions


def _without_costs(part: Expression) -> Expression:
    if isinstance(part, str):
        return part
    return [_without_costs(inner) for inner in part if inner[:1] != ["increase"]]


def read_grammar(text: str, name: str, *, helps: bool) -> tuple[str, Words]:
    """Check that a grammar's sentences are published ones.

    Args:
        text: The grammar of a game.
        name: What to call it in errors.
        helps: Whether its domain has `help`.

    Returns:
        The task, such as "put a hot potato in sinkbasin", and the words of this game.

    Raises:
        DataError: A template or a rule is missing or differs.
    """
    rules, templates = _read_rules(text, name)
    task = _TASK.fullmatch(rules.get("task", [("", "")])[0][1])
    if task is None:
        raise DataError(f"{name}: the grammar names no task. Expected a rule 'Your task is to: ... .'")
    puts = templates.get("PutObject", ("", ""))[0] == PUT[1]
    arrives = rules.get("GotoLocation.feedback") == [("", ARRIVED[1])]
    wanted = dict(SENTENCES)
    wanted["PutObject.feedback"] = [("", PUT_SAID[puts])]
    wanted["GotoLocation.feedback"] = [("", ARRIVED[arrives])]
    asked = {**TEMPLATES, "PutObject": (PUT[puts], TEMPLATES["PutObject"][1])}
    if templates.get("help", ("", ""))[1].strip() == HELP.strip():  # said without a rule, as 2.1.2 does
        rules["help.feedback"] = [("", HELP)]
        templates["help"] = asked["help"]
    if not helps:
        del wanted["help.feedback"], asked["help"]
    for what, ours, theirs in (("rule", wanted, rules), ("command", asked, templates)):
        for key, expected in ours.items():
            if theirs.get(key) != expected:
                raise DataError(
                    f"{name}: the {what} {key!r} of its grammar is {theirs.get(key)!r:.120}. Expected the "
                    f"published {expected!r:.120}"
                )
    return task[1], Words(puts, arrives, helps)


def _read_rules(text: str, name: str) -> tuple[dict[str, list[tuple[str, str]]], dict[str, tuple[str, str]]]:
    """Return the rules of a grammar by name, and templates and answers by action."""
    rules: dict[str, list[tuple[str, str]]] = {}
    templates: dict[str, tuple[str, str]] = {}
    try:
        for block in re.findall(r'grammar\s*::\s*"""(.*?)"""', text, re.DOTALL):
            kept = "\n".join(line for line in block.split("\n") if not line.lstrip().startswith("#"))
            found: Any = json.loads(kept)
            for key, rule in found.items():
                rules[key] = [(one.get("condition", ""), one["rhs"]) for one in rule]
        for action, body in _ACTION.findall(text):
            template = re.search(r'template\s*::\s*"([^"]*)"', body)
            said = re.search(r'feedback\s*::\s*"([^"]*)"', body)
            if template is not None and said is not None:
                templates[action] = (template[1], said[1])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{name}: its grammar cannot be read ({type(error).__name__}: {error})") from error
    return rules, templates


_OURS = _actions(write_domain(Words()), "the published domain")
