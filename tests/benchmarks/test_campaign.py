"""The campaign of damage: a minute of it finds nothing, and it finds faults that are planted."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="needs the extra 'serve'")

from helpers.benchmark import run_benchmark

from at2po_agent.runs import checkpoint, disk, folder
from at2po_env.contract.testing import PigEnv
from at2po_env.retrieval.client import HttpRetriever
from at2po_env.retrieval.server.batching import DynamicBatcher
from at2po_env.tools.calculator import CalculatorTool
from benchmarks.campaign import runs, snapshots
from benchmarks.campaign.__main__ import KINDS
from benchmarks.campaign.runner import Campaign, Kind, Try, generator

TRIES = {
    **{"kill": 13, "disk": 6, "data": 20, "server": 80},
    **{"client": 200, "actions": 1_500, "tools": 60, "snapshots": 3_000},
}


def tried(home: Path, name: str, count: int, **kinds: Kind) -> Campaign:
    campaign = Campaign(home, report=lambda _: None)
    campaign.run(kinds or {name: KINDS[name]}, goals={name: count})
    return campaign


def aimed(home: Path, file: str, places: range) -> list[str]:
    """What kills at some events of one file find."""
    with KINDS["kill"].open(home) as attempt:
        _, events = runs.prepare(home)
        numbers = [place * (len(events) + 1) + list(events).index(file) for place in places]
        return [attempt(generator("kill", 0, number), number) for number in numbers]


@pytest.mark.parametrize("name", TRIES)
def test_a_minute_of_the_campaign_finds_nothing(tmp_path: Path, name: str) -> None:
    campaign = tried(tmp_path, name, TRIES[name])
    assert campaign.failures == []
    assert campaign.tries == {name: TRIES[name]}


# Planted faults -------------------------------------------------------------------------------------------


def test_a_file_that_is_rewritten_in_place_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_place(path: Path, content: str | bytes) -> None:
        with path.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)

    for module in (disk, folder, checkpoint):
        monkeypatch.setattr(module, "replace_file", in_place)
    found = aimed(tmp_path, "config", range(3, 9))
    assert any("left behind: ConfigError" in what for what in found)


def test_a_resume_that_forgets_the_optimizer_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint.load_newest

    def forgetful(*values: object, **options: object) -> object:
        return real(*values, **{**options, "optimizer": None})  # type: ignore[arg-type]

    monkeypatch.setattr("at2po_agent.trainer.load_newest", forgetful)
    found = aimed(tmp_path, "state", range(18, 24))
    assert any("differs from a run in one piece: model, optimizer" in what for what in found)


def test_a_traceback_on_a_full_disk_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def trusting(path: Path) -> Iterator[None]:
        del path
        yield

    monkeypatch.setattr(folder, "disk_refusals", trusting)
    found = tried(tmp_path, "disk", 6).failures
    assert any("it ended with 5" in failure.what for failure in found)


def test_scores_that_are_no_numbers_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = HttpRetriever.search

    def search(self: HttpRetriever, queries: list[str], topk: int) -> object:
        found = real(self, queries, topk)
        return [[passage._replace(score=float("nan")) for passage in some] for some in found]

    monkeypatch.setattr(HttpRetriever, "search", search)
    assert any("a score is nan" in failure.what for failure in tried(tmp_path, "server", 60).failures)


def test_a_search_that_is_forgotten_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def forgets(self: DynamicBatcher, queries: list[str], topk: int) -> object:
        del self, queries, topk
        raise RuntimeError("lost")

    real = DynamicBatcher.search
    calls = 0

    async def search(self: DynamicBatcher, queries: list[str], topk: int) -> object:
        nonlocal calls
        calls += 1
        return await (forgets if calls == 3 else real)(self, queries, topk)

    monkeypatch.setattr(DynamicBatcher, "search", search)
    assert tried(tmp_path, "client", 100).failures


def test_a_page_that_answers_for_the_policy_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "at2po_env.episodes.tool_env.ToolEnv._response",
        lambda _, episode: "".join(link.action + link.observation for link in episode.turns),
    )
    monkeypatch.setattr(
        "at2po_env.episodes.actions._BlockProtocol.format_result",
        lambda _, text: f"\n<result>{text}</result>\n",
    )
    assert any("scored as right" in one.what for one in tried(tmp_path, "actions", 800).failures)


def test_a_slow_operation_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: CalculatorTool, arguments: object, context: object) -> str:
        del self, arguments, context
        return str(9 ** (10**6))[:9]

    monkeypatch.setattr("sys.set_int_max_str_digits", lambda _: None)
    monkeypatch.setattr(sys, "set_int_max_str_digits", lambda _: None)
    monkeypatch.setattr(CalculatorTool, "run", run)
    assert tried(tmp_path, "tools", 3).failures


def test_a_snapshot_that_is_believed_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Trusting(PigEnv):
        """Believes whatever it is given."""

        def load_state(self, data: object) -> object:
            return super().load_state([0, 0, False])._replace(points=data[0], over=False)  # type: ignore[index]

    monkeypatch.setattr(snapshots, "STACKS", {"planted": Trusting})
    found = tried(tmp_path, "snapshots", 300).failures
    assert any("TypeError" in failure.what for failure in found)


# The campaign itself --------------------------------------------------------------------------------------


@contextmanager
def odd(folder: Path) -> Iterator[Try]:
    """Fails at 3, ends its process at 5, hangs at 7, and notes its generator's first draw."""

    def attempt(rng: object, number: int) -> str:
        draw = rng.random()  # type: ignore[attr-defined]
        with (folder / "draws").open("a") as stream:
            stream.write(f"{number} {draw}\n")
        if number == 5:
            os._exit(9)
        if number == 7:
            time.sleep(60)
        return "three" if number == 3 else ""

    yield attempt


def test_tries_that_fail_die_or_hang_are_failures_and_the_campaign_goes_on(tmp_path: Path) -> None:
    kinds = {"odd": Kind(12, odd, limit_s=1.5)}
    campaign = Campaign(tmp_path, report=lambda _: None)
    campaign.run(kinds, goals={"odd": 5})
    again = Campaign(tmp_path, report=lambda _: None)  # as another process would
    again.run(kinds)
    assert again.tries == {"odd": 12}
    assert [(one.number, one.what[:9]) for one in again.failures] == [
        (3, "three"),
        (5, "its proce"),
        (7, "it took m"),
    ]
    result = again.result(kinds)
    assert (result["kinds"]["odd"]["failures"], result["tries"]) == (3, 12)
    assert result["failures"][0]["again"].endswith("--only odd --seed 0 --try 3")
    draws = dict(line.split() for line in (tmp_path / "odd" / "draws").read_text().splitlines())
    assert len(draws) == 12  # every number once, with a draw of its own
    assert len(set(draws.values())) == 12
    assert again.once("odd", kinds["odd"], 3) == "three"


def test_the_command_prints_json_and_its_status(tmp_path: Path) -> None:
    result = run_benchmark("campaign", "--only", "snapshots,tools", "--tries", "40", "--out", str(tmp_path))
    assert {name: one["tries"] for name, one in result["kinds"].items()} == {"snapshots": 40, "tools": 40}
    assert result["failures"] == []


def test_every_file_of_a_run_is_aimed_at(tmp_path: Path) -> None:
    _, events = runs.prepare(tmp_path)
    assert {
        "config",
        "metrics",
        "weights",
        "optimizer",
        "state",
        "latest",
        "trees",
        "summary",
    } <= events.keys()
    assert {("replace", "before"), ("fsync", "after"), ("open", "before")} <= set(events["config"])
    assert {("serialize_file", "before"), ("fsync", "after")} <= set(events["weights"])
    assert {("rename", "after"), ("rmdir", "before")} <= set(events["checkpoint"])
