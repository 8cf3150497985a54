"""Scripted experts of deliberately limited quality, for the demonstrations of a cold start.

`follow` plays worlds of commands by the world's own expert, and wanders now and then.

`demonstrate` answers questions. It knows the way to the answer from a task's metadata (MiniWiki's `path` and
`chain`; the supporting titles of the multi-hop data sets) and writes tagged actions. Its planted faults
decide what reinforcement learning is left to find: it stops after the first page, searches for half a name,
answers the title of the page, or reads the wrong name on it and goes on from there.

The environments know nothing of these experts, and no policy ever sees metadata.
"""

import re
from collections.abc import Generator, Mapping
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from at2po_env import CommandEnv
from at2po_env.data.tasks import Task
from at2po_env.errors import DataError


class ExpertConfig(BaseModel):
    """How often the expert makes which mistake; one is drawn per demonstration and kind."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    early_stop: float = Field(
        0.6, ge=0, le=1, description="Answer with what the first page says, where more hops are needed."
    )
    half_query: float = Field(
        0.3,
        ge=0,
        le=1,
        description="Search only for the first word of a name, and answer from the page it gives.",
    )
    page_title: float = Field(0.15, ge=0, le=1, description="Answer the title of the last page instead.")
    wrong_hop: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Go on with another name of the page than the one asked for, at each uncertain hop, and "
        "then with the first name of every page.",
    )
    uncertain_hops: Literal["all", "middle"] = Field(
        "all", description="Hops at which wrong_hop may happen: all of them, or the one in the middle."
    )
    think_aloud: bool = Field(
        False, description="Repeat the question in every thought, where a thought has one word otherwise."
    )


class CommandExpertConfig(BaseModel):
    """The expert of worlds that are played by commands (`at2po_env.CommandEnv`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    wander: float = Field(
        0.2, ge=0, le=1, description="Share of the turns with any possible command instead."
    )


def follow(
    task: Task, *, env: CommandEnv, config: CommandExpertConfig, rng: np.random.Generator
) -> Generator[str, str, None]:
    """Play one episode of a world: yields actions, is sent observations.

    Before each turn the world's expert plans anew, so that the episode goes on sensibly after a detour. The
    thought of a turn is the command that is planned after it.

    Args:
        task: What the episode is about; the environment knows it.
        env: The environment that is played, reset to the task.
        config: The faults.
        rng: Draws the detours.

    Raises:
        DataError: The world has no expert.
    """
    del task
    while True:
        state = env.get_state()
        assert state is not None, "the environment was reset"
        possible = [command for command in env.commands(state.world) if not command.endswith("[...]")]
        planned = env.expert_commands()
        if planned is None and not possible:
            raise DataError(f"{type(env).__name__} has no expert to demonstrate; set cold_start.steps=0")
        if not planned or (possible and rng.random() < config.wander):
            thought, command = "maybe", possible[int(rng.integers(len(possible)))]
        else:
            thought, command = ["then", *planned[1:2]][-1], planned[0]
        yield f"<think> {thought} </think><action> {command} </action>"


class ExpertPlan(NamedTuple):
    """The way to an answer.

    Attributes:
        queries: K search queries.
        notes: K notes, the thought before each query.
        findings: K strings, each read from the page of its query; the last is the answer.
    """

    queries: tuple[str, ...]
    notes: tuple[str, ...]
    findings: tuple[str, ...]


def plan(task: Task) -> ExpertPlan:
    """Read the way to a task's answer from its metadata.

    Raises:
        DataError: The metadata does not tell it.
    """
    metadata = task.metadata
    if metadata.get("path") and metadata.get("chain"):
        path, chain = metadata["path"], metadata["chain"]
        return ExpertPlan(tuple(path[:-1]), tuple(chain), tuple(path[1:]))
    # The data sets give the supporting titles in one of two forms, both in reading order.
    facts = metadata.get("supporting_facts")
    named = facts.get("title", ()) if isinstance(facts, Mapping) else metadata.get("supporting_titles", ())
    titles = tuple(dict.fromkeys(named))
    if not titles:
        raise DataError(
            f"task {task.id!r}: its metadata names no path and no supporting titles to demonstrate"
        )
    findings = (*titles[1:], task.golden_answers[0])
    return ExpertPlan(titles, ("look",) * len(titles), findings)


def demonstrate(task: Task, *, config: ExpertConfig, rng: np.random.Generator) -> Generator[str, str, None]:
    """Play one episode: yields actions, is sent observations.

    Args:
        task: The question.
        config: The faults.
        rng: Draws the faults of this demonstration.
    """
    way = plan(task)
    stops_early, halves, answers_title = (
        bool(rng.random() < chance) for chance in (config.early_stop, config.half_query, config.page_title)
    )
    hops = len(way.queries)
    last = 0 if stops_early else hops - 1
    halved = int(rng.integers(last + 1)) if halves else None
    aloud = f" {task.question}" if config.think_aloud else ""
    query, found, strayed = way.queries[0], "", False
    for hop in range(last + 1):
        note = way.notes[hop] + aloud
        if hop == halved:
            page = yield _search(note, query.split()[0])
            names = _names(page)  # each as likely
            yield _answer(names[int(rng.integers(len(names)))] if names else query, aloud)
            return
        page = yield _search(note, query)
        found, title = way.findings[hop], query
        uncertain = config.wrong_hop > 0 and (config.uncertain_hops == "all" or hop == hops // 2)
        if strayed or (uncertain and rng.random() < config.wrong_hop):
            others = [name for name in _names(page) if name != title and (strayed or name != found)]
            if others or strayed:
                found, strayed = (others or [title])[0], True
        query = found if strayed else way.queries[min(hop + 1, hops - 1)]
    yield _answer(title if answers_title else found, aloud)


def _names(page: str) -> list[str]:
    """Names of two words on a page, in their order."""
    return re.findall(r"\b[A-Z]\w+ [A-Z]\w+", page)


def _search(note: str, query: str) -> str:
    return f"<think> {note}</think><search> {query}</search>"


def _answer(text: str, aloud: str = "") -> str:
    return f"<think> answer{aloud}</think><answer>\\boxed{{ {text}}}</answer>"
