"""Plays the published rules: what a command does, what is said, and which commands are possible."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from at2po_envs.household.game import NOWHERE, SERVERS, Game, Household
from at2po_envs.household.published import HELP, Words

NOTHING = "Nothing happens."


def is_won(state: Household) -> bool:
    """Return whether the goal of the game is reached."""
    game = state.game
    family, targets = game.goal.family, game.goal_targets
    if family == "look_at_obj_in_light":
        if state.holding not in game.goal_objects:
            return False
        near = {thing for receptacle in game.here[state.at] for thing in state.contents[receptacle]}
        lit = state.toggled & game.toggleable
        return any(lamp in near and lit >> lamp & 1 for lamp in targets)
    wanted: Iterable[int] = game.goal_objects
    if family == "pick_clean_then_place_in_recep":
        wanted = [o for o in wanted if state.clean & game.fit_for["clean"] & 1 << o]
    elif family == "pick_heat_then_place_in_recep":
        wanted = [o for o in wanted if state.hot & game.fit_for["heat"] & 1 << o]
    elif family == "pick_cool_then_place_in_recep":
        wanted = [o for o in wanted if state.cool & game.fit_for["cool"] & 1 << o]
    needed = 2 if family == "pick_two_obj_and_place" else 1
    return any(sum(o in state.contents[receptacle] for o in wanted) >= needed for receptacle in targets)


def first_words(state: Household) -> str:
    """Return what is said at the beginning."""
    room = _look(state, first=True)
    return f"-= Welcome to TextWorld, ALFRED! =-\n\n{room}\n\nYour task is to: {state.game.task}."


def reachable(state: Household, receptacle: int) -> bool:
    """Return whether what is in a receptacle can be seen and taken: it is open, or cannot be closed."""
    return not state.game.openable >> receptacle & 1 or bool(state.opened >> receptacle & 1)


def possible_commands(state: Household) -> tuple[str, ...]:
    """Return the commands that are possible, sorted."""
    game, holding = state.game, state.holding
    names, receptacle_names = game.object_names, game.receptacle_names
    found = list(game.routine[state.at])
    for receptacle in game.here[state.at]:
        there = receptacle_names[receptacle]
        if game.openable >> receptacle & 1:
            found.append(f"{'close' if state.opened >> receptacle & 1 else 'open'} {there}")
        inside = state.contents[receptacle]
        if reachable(state, receptacle):
            if holding == NOWHERE:
                found += [
                    f"take {names[thing]} from {there}" for thing in inside if game.pickupable >> thing & 1
                ]
            elif game.accepts[receptacle] >> holding & 1:
                found.append(put_command(game.words, names[holding], there))
        found += [f"use {names[thing]}" for thing in inside if game.toggleable >> thing & 1]
        if holding != NOWHERE:
            found += [
                f"{verb} {names[holding]} with {there}"
                for verb, serves in game.serves.items()
                if serves[receptacle] and game.fit_for[verb] >> holding & 1
            ]
    if holding != NOWHERE:
        found.append(f"examine {names[holding]}")
        if game.slices[holding]:
            found += [
                f"slice {names[thing]} with {names[holding]}"
                for thing, place in state.lying
                if place == state.at and game.sliceable >> thing & 1
            ]
    return tuple(sorted(set(found)))


def conceivable_commands(game: Game) -> tuple[str, ...]:
    """Return every command that may be possible at some moment of a game, sorted."""
    found = {"inventory", "look", *(["help"] if game.words.helps else [])}
    carried = [n for n in range(len(game.objects)) if game.pickupable >> n & 1]
    for receptacle, there in enumerate(game.receptacle_names):
        if game.place_of[receptacle] == NOWHERE:
            continue
        found |= {f"go to {there}", f"examine {there}"}
        if game.openable >> receptacle & 1:
            found |= {f"open {there}", f"close {there}"}
        for thing in carried:
            name, starts_here = game.object_names[thing], thing in game.start.contents[receptacle]
            if starts_here or game.accepts[receptacle] >> thing & 1:
                found.add(f"take {name} from {there}")
            if game.accepts[receptacle] >> thing & 1:
                found.add(put_command(game.words, name, there))
            found |= {
                f"{verb} {name} with {there}"
                for verb, serves in game.serves.items()
                if serves[receptacle] and game.fit_for[verb] >> thing & 1
            }
    found |= {f"use {name}" for n, name in enumerate(game.object_names) if game.toggleable >> n & 1}
    for thing in carried:
        found.add(f"examine {game.object_names[thing]}")
        if game.slices[thing]:
            cut = [name for n, name in enumerate(game.object_names) if game.sliceable >> n & 1]
            found |= {f"slice {name} with {game.object_names[thing]}" for name in cut}
    return tuple(sorted(found))


def put_command(words: Words, thing: str, there: str) -> str:
    """Return the command that puts an object into or onto a receptacle, in the words of a game."""
    return f"put {thing} in/on {there}" if words.puts else f"move {thing} to {there}"


class Step(NamedTuple):
    """What a command did: the moment after it, what is said, and whether it was possible."""

    state: Household
    said: str
    possible: bool = True


def obey(state: Household, command: str) -> Step:
    """Return what a command does; one that is not possible now changes nothing.

    Args:
        state: The moment before.
        command: Any text; white space around it does not count.
    """
    verb, _, rest = command.strip().partition(" ")
    act = _VERBS.get(verb)
    done = None if act is None else act(state, rest)
    return Step(state, NOTHING, possible=False) if done is None else done


def _look_around(state: Household, rest: str) -> Step | None:
    return None if rest else Step(state, _look(state))


def _inventory(state: Household, rest: str) -> Step | None:
    if rest:
        return None
    if state.holding == NOWHERE:
        return Step(state, "You are not carrying anything.")
    return Step(state, f"You are carrying: a {state.game.object_names[state.holding]}.")


def _help(state: Household, rest: str) -> Step | None:
    # The original's parser drops the blank line at the beginning.
    return None if rest or not state.game.words.helps else Step(state, HELP.lstrip())


def _receptacle_here(state: Household, name: str) -> int | None:
    number = state.game.receptacle_at.get(name)
    return number if number is not None and state.game.place_of[number] == state.at else None


def _go(state: Household, rest: str) -> Step | None:
    """Go to a receptacle at another place; one at the same place changes nothing, so it is not possible."""
    game, name = state.game, rest.removeprefix("to ")
    number = game.receptacle_at.get(name) if name != rest else None
    if number is None or game.place_of[number] in (NOWHERE, state.at):
        return None
    place = game.place_of[number]
    after = state._replace(at=place)
    arrived = game.place_names[place] if game.words.arrives_at_place else name
    return Step(after, f"You arrive at {arrived}. {_examine_receptacle(after, number)}")


def _open_or_close(verb: str, state: Household, name: str) -> Step | None:
    number = _receptacle_here(state, name)
    if number is None or not state.game.openable >> number & 1:
        return None
    if bool(state.opened >> number & 1) == (verb == "open"):
        return None
    after = state._replace(opened=state.opened ^ 1 << number)
    if verb == "close":
        return Step(after, f"You close the {name}.")
    return Step(after, f"You open the {name}. {_examine_receptacle(after, number)}")


def _take(state: Household, rest: str) -> Step | None:
    name, _, receptacle_name = rest.partition(" from ")
    game, number = state.game, _receptacle_here(state, receptacle_name)
    thing = game.object_at.get(name)
    if number is None or thing is None or state.holding != NOWHERE or thing not in state.contents[number]:
        return None
    if not game.pickupable >> thing & 1 or not reachable(state, number):
        return None
    contents = list(state.contents)
    contents[number] = tuple(other for other in contents[number] if other != thing)
    after = state._replace(
        holding=thing,
        contents=tuple(contents),
        lying=state.lying - {(thing, state.at)},
        taken=state.taken | {(thing, number)},
    )
    return Step(after, f"You pick up the {name} from the {receptacle_name}.")


def _put(puts: bool, state: Household, rest: str) -> Step | None:
    name, _, receptacle_name = rest.partition(" in/on " if puts else " to ")
    game, number = state.game, _receptacle_here(state, receptacle_name)
    thing = state.holding
    if puts != game.words.puts or number is None or thing == NOWHERE or game.object_names[thing] != name:
        return None
    if not game.accepts[number] >> thing & 1 or not reachable(state, number):
        return None
    contents = list(state.contents)
    contents[number] = tuple(sorted({*contents[number], thing}))
    after = state._replace(
        holding=NOWHERE,
        contents=tuple(contents),
        lying=state.lying | {(thing, state.at)},
        taken=state.taken - {(thing, number)},
    )
    said = "You put the {} in/on the {}." if puts else "You move the {} to the {}."
    return Step(after, said.format(name, receptacle_name))


def _serve(verb: str, state: Household, rest: str) -> Step | None:
    """Clean, heat or cool what is held; the original asks for no open door."""
    name, _, receptacle_name = rest.partition(" with ")
    game, number = state.game, _receptacle_here(state, receptacle_name)
    thing = state.holding
    if number is None or thing == NOWHERE or game.object_names[thing] != name:
        return None
    if not game.serves[verb][number] or not game.fit_for[verb] >> thing & 1:
        return None
    bit = 1 << thing
    if verb == "clean":
        after = state._replace(clean=state.clean | bit)
    elif verb == "heat":
        after = state._replace(hot=state.hot | bit, cool=state.cool & ~bit)
    else:
        after = state._replace(cool=state.cool | bit, hot=state.hot & ~bit)
    return Step(after, f"You {verb} the {name} using the {receptacle_name}.")


def _use(state: Household, name: str) -> Step | None:
    """Switch a lamp; the original never says that one goes off, and it stays "toggled"."""
    thing = state.game.object_at.get(name)
    if thing is None or not state.game.toggleable >> thing & 1:
        return None
    if not any(thing in state.contents[receptacle] for receptacle in state.game.here[state.at]):
        return None
    return Step(state._replace(toggled=state.toggled | 1 << thing), f"You turn on the {name}.")


def _slice(state: Household, rest: str) -> Step | None:
    name, _, knife = rest.partition(" with ")
    game = state.game
    thing = game.object_at.get(name)
    if thing is None or state.holding == NOWHERE or game.object_names[state.holding] != knife:
        return None
    if not game.slices[state.holding] or not game.sliceable >> thing & 1:
        return None
    if (thing, state.at) not in state.lying:
        return None
    return Step(state._replace(sliced=state.sliced | 1 << thing), f"You sliced the {name} with the {knife}.")


def _examine(state: Household, name: str) -> Step | None:
    """Examine a receptacle that is here or the object in the hand; the original allows no other object."""
    number = _receptacle_here(state, name)
    if number is not None:
        return Step(state, _examine_receptacle(state, number))
    if state.holding == NOWHERE or state.game.object_names[state.holding] != name:
        return None
    return Step(state, _examine_object(state, state.holding))


def _examine_receptacle(state: Household, number: int) -> str:
    name = state.game.receptacle_names[number]
    if not reachable(state, number):
        return f"The {name} is closed."
    seen = _listed(f"a {state.game.object_names[thing]}" for thing in state.contents[number])
    if state.game.openable >> number & 1:
        return f"The {name} is open. In it, you see {seen}."
    return f"On the {name}, you see {seen}."


def _examine_object(state: Household, thing: int) -> str:
    game, name = state.game, state.game.object_names[thing]
    if game.receptive >> thing & 1:
        inner = _listed(f"a {game.object_names[inner]}" for inner in game.inner.get(thing, ()))
        return f"This is a normal {name}. In it, you see {inner}."
    clean, sliced = state.clean >> thing & 1, state.sliced >> thing & 1
    heat = "hot" if state.hot >> thing & 1 else "cool" if state.cool >> thing & 1 else ""
    words = [heat, "and" if heat and clean else "", "clean" if clean else "", "sliced" if sliced else ""]
    if clean or heat:
        look = " ".join(word for word in words if word)
        return f"This is a {'cold' if look == 'cool' else look} {name}."
    if game.toggleable & state.toggled & 1 << thing:
        return f"This {name} is on."
    if game.sliceable >> thing & 1 and sliced:
        return f"This is a sliced {name}."
    return f"There's nothing special about {name}."


def _look(state: Household, *, first: bool = False) -> str:
    """Say where the agent is.

    Only the `first` look shows the whole room; from the same spot, the command `look` sees nothing. Next to
    the agent "lies" only what was taken from a receptacle at this place and put into another one there: that
    is what the original's rule comes to.
    """
    game = state.game
    near = game.here[state.at]
    if not near:
        placed = zip(game.receptacle_names, game.place_of, strict=True)
        seen = _listed(f"a {name}" for name, place in placed if first and place != NOWHERE)
        return f"You are in the middle of a room. Looking quickly around you, you see {seen}."
    lying = _listed(_floor(state, near))
    return (
        f"You are facing the {_listed(game.receptacle_names[n] for n in near)}. Next to it, you see {lying}."
    )


def _floor(state: Household, near: Sequence[int]) -> Iterator[str]:
    for thing in sorted(thing for thing, place in state.lying if place == state.at):
        for receptacle in near:
            if (thing, receptacle) in state.taken:
                yield f"a {state.game.object_names[thing]}"


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    if len(found) < 2:
        return found[0] if found else "nothing"
    return f"{', '.join(found[:-1])}, and {found[-1]}"


_VERBS: Mapping[str, Callable[[Household, str], Step | None]] = {
    "look": _look_around,
    "inventory": _inventory,
    "help": _help,
    "go": _go,
    "open": partial(_open_or_close, "open"),
    "close": partial(_open_or_close, "close"),
    "take": _take,
    "move": partial(_put, False),
    "put": partial(_put, True),
    **{verb: partial(_serve, verb) for verb in SERVERS},
    "use": _use,
    "slice": _slice,
    "examine": _examine,
}
