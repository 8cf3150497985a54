"""The eight search-QA ids: data resolution, real questions, protocols, failures, MiniWiki."""

import json
import socket
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from at2po_envs.search_qa import making
from at2po_envs.search_qa.making import normalize_question
from helpers.paths import REAL_DATA

import at2po_env
from at2po_env import SearchTool, Task, ToolEnv
from at2po_env.data import At2poSampleWarning
from at2po_env.errors import ConfigError, DataError, RetrievalError
from at2po_env.retrieval import Bm25Retriever, Passage
from benchmarks.retrieval_hits import measure, supporting_titles

REAL = REAL_DATA
HOTPOTQA = REAL / "qa/hotpotqa/train.jsonl"
CORPUS = REAL / "corpus/wiki_hotpotqa_musique.jsonl"
needs_real_data = pytest.mark.skipif(not CORPUS.is_file(), reason=f"{CORPUS} is not there")
QA = ["HotpotQA", "2WikiMultihopQA", "MuSiQue", "Bamboogle", "NaturalQuestions", "TriviaQA", "PopQA"]
GOLD = "XGOLDX"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("gymnasium.make reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("AT2PO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Three questions whose golden answer stands nowhere else, and a corpus."""
    rows = [
        {"id": f"q{i}", "question": f" who wrote book {i} ", "golden_answers": [GOLD], "metadata": {"n": i}}
        for i in range(3)
    ]
    passages = [
        {"id": str(i), "contents": f'"Book {i}"\nBook {i} was written by author {i}.'} for i in range(9)
    ]
    paths = {"dataset": tmp_path / "qa.jsonl", "corpus": tmp_path / "corpus.jsonl"}
    for path, lines in zip(paths.values(), (rows, passages), strict=True):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return {name: str(path) for name, path in paths.items()}


def think(action: str) -> str:
    return f"<think>t</think>{action}"


def boxed(answer: str) -> str:
    return think(rf"<answer>\boxed{{{answer}}}</answer>")


def base(env: gymnasium.Env[Any, Any]) -> ToolEnv:
    assert isinstance(env.unwrapped, ToolEnv)
    return env.unwrapped


@pytest.mark.parametrize("name", QA)
def test_without_data_the_shipped_sample_is_used_and_says_so(name: str) -> None:
    with pytest.warns(At2poSampleWarning) as caught:
        env = gymnasium.make(f"at2po/{name}-v0")
    said = " ".join(str(warning.message) for warning in caught)
    assert "at2po data get" in said
    assert "dataset=PATH" in said
    assert "corpus=PATH" in said
    assert len(base(env).tasks) == 12
    for index in range(12):
        task = base(env).tasks[index]
        prompt, info = env.reset(seed=0, options={"index": index})
        assert prompt.endswith(f"Question: {task.question}\n")
        assert info["question"].endswith("?")
        observation, *_ = env.step(think(f"<search>{task.question}</search>"))
        assert 1 <= observation.count("(Title: ") <= 3
        assert env.step(boxed(task.golden_answers[0]))[1] == 1.0


def test_the_cache_is_preferred_to_the_sample(cache: Path, files: dict[str, str]) -> None:
    target = cache / "datasets/hotpotqa/train.jsonl"
    target.parent.mkdir(parents=True)
    target.write_bytes(Path(files["dataset"]).read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make("at2po/HotpotQA-v0", corpus=files["corpus"])
    assert base(env).tasks[0].id == "q0"


def test_questions_are_normalised(files: dict[str, str]) -> None:
    env = gymnasium.make("at2po/PopQA-v0", **files)
    assert env.reset(options={"task_id": "q1"})[1]["question"] == "who wrote book 1?"
    assert base(env).tasks[1].metadata["n"] == 1


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("who", "who?"),
        (" who? ", "who?"),
        ("who ?", "who ?"),
        ("who.", "who.?"),
        ("", "?"),
        ("who?!", "who?!?"),
    ],
)
def test_a_question_mark_is_appended_if_it_is_missing(question: str, expected: str) -> None:
    assert normalize_question(question) == expected


@pytest.mark.parametrize(
    ("protocol", "answer_format"),
    [("tagged", "boxed"), ("search_r1", "tag"), ("search_r1", "structured"), ("hermes", "boxed")],
)
@pytest.mark.parametrize("on_malformed", ["end", "notice"])
def test_the_contract_holds_and_nothing_golden_is_shown(
    files: dict[str, str], protocol: str, answer_format: str, on_malformed: str
) -> None:
    options = {"protocol": protocol, "answer_format": answer_format, "on_malformed": on_malformed}
    env = gymnasium.make("at2po/HotpotQA-v0", render_mode="ansi", **files, **options)
    spec = env.spec
    assert spec is not None
    assert gymnasium.envs.registration.EnvSpec.from_json(spec.to_json()) == spec
    at2po_env.check_env(env, process=protocol == "hermes")
    shown = [str(env.reset(seed=0))]
    for action in base(env).example_actions():
        shown.append(str(env.step(action)))
    assert not [text for text in shown if GOLD in text]
    assert GOLD not in str(env.render())


def test_search_r1_style(files: dict[str, str]) -> None:
    env = gymnasium.make("at2po/HotpotQA-v0", protocol="search_r1", answer_format="tag", topk=1, **files)
    prompt, _ = env.reset(seed=0, options={"index": 0})
    assert "between <information> and </information>" in prompt
    assert "boxed" not in prompt
    observation, *_ = env.step("<search>book 4</search>")
    assert (
        observation
        == "\n<information>\nDoc 1(Title: Book 4) Book 4 was written by author 4.\n</information>\n"
    )
    assert env.step(f"<answer> {GOLD} </answer>")[1] == 1.0


def test_hermes_style(files: dict[str, str]) -> None:
    env = gymnasium.make("at2po/HotpotQA-v0", protocol="hermes", **files)
    assert '"required": ["query"]' in env.reset(seed=0)[0]
    call = '<tool_call>\n{"name": "search", "arguments": {"query": "book 4"}}\n</tool_call>'
    assert "<tool_response>\nDoc 1(Title: Book 4)" in env.step(think(call))[0]
    assert env.step(boxed(GOLD))[1] == 1.0


class Failing:
    """A retriever that fails, or hangs until it is released, whenever it is asked."""

    digest = "failing"

    def __init__(self, error: Exception | None, release: threading.Event | None = None) -> None:
        self.error, self.release, self.calls = error, release, 0

    def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        self.calls += 1
        if self.release is not None:
            self.release.wait(60)
        if self.error is not None:
            raise self.error
        return [[] for _ in queries[:topk]]


@pytest.mark.parametrize("error", [RetrievalError("the server is gone"), ConnectionResetError("reset")])
def test_a_dead_retriever_is_recorded_and_the_episode_goes_on(
    files: dict[str, str], error: Exception
) -> None:
    retriever = Failing(error)
    env = gymnasium.make(
        "at2po/NaturalQuestions-v0", dataset=files["dataset"], retriever=retriever, tool_retries=1
    )
    env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step(think("<search>q</search>"))
    assert (reward, terminated, truncated, info["outcome"]) == (0.0, False, False, "tool_error")
    assert str(error) in info["reason"]
    assert f"Error: {info['reason']}" in observation
    assert retriever.calls == 2
    assert env.step(boxed(GOLD))[1] == 1.0


def test_a_hanging_retriever_times_out(files: dict[str, str]) -> None:
    release = threading.Event()
    env = gymnasium.make(
        "at2po/NaturalQuestions-v0",
        dataset=files["dataset"],
        retriever=Failing(None, release),
        tool_timeout_s=0.05,
    )
    env.reset(seed=0)
    start = time.monotonic()
    info = env.step(think("<search>q</search>"))[4]
    assert time.monotonic() - start < 30
    assert (info["outcome"], info["reason"]) == ("tool_error", "search failed: timed out after 0.05 s")
    release.set()


def test_environments_of_a_process_share_data_and_index(files: dict[str, str]) -> None:
    envs = gymnasium.make_vec("at2po/HotpotQA-v0", num_envs=3, max_turns=2, **files)
    assert isinstance(envs, at2po_env.TextVectorEnv)
    one, two, _ = (base(env) for env in envs.envs)
    assert one.tools["search"].retriever is two.tools["search"].retriever  # type: ignore[attr-defined]
    assert one.tasks.source is two.tasks.source  # type: ignore[attr-defined]
    observations, _ = envs.reset(seed=0)
    assert len(set(observations)) > 1
    observations, rewards, terminated, _, infos = envs.step(
        [think("<search>book 2</search>"), boxed(GOLD), "\ud800"]
    )
    assert "Title: Book 2" in observations[0]
    assert rewards.tolist() == [0.0, 1.0, -1.0]
    assert terminated.tolist() == [False, True, True]
    assert infos["outcome"].tolist() == ["tool", "answer", "malformed"]
    envs.close()


@pytest.mark.parametrize(
    ("options", "error", "fault"),
    [
        ({"dataset": "nosuch.jsonl"}, DataError, "nosuch.jsonl"),
        ({"corpus": "nosuch.jsonl"}, DataError, "nosuch.jsonl"),
        ({"retriever": "nosuch"}, RetrievalError, "nosuch"),
        ({"retriever_options": {"k9": 1}}, RetrievalError, "k9"),
        ({"topk": 0}, ConfigError, "at least 1"),
        ({"answer_format": "xml"}, ConfigError, "xml"),
        ({"nosuch": 1}, TypeError, "nosuch"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(
    files: dict[str, str], options: dict[str, Any], error: type[Exception], fault: str
) -> None:
    with pytest.raises(error, match=fault):
        gymnasium.make("at2po/HotpotQA-v0", **{**files, **options})


@needs_real_data
def test_gold_answers_after_searching_the_supporting_titles_are_right_on_all_real_questions(
    record_property: Any,
) -> None:
    env = gymnasium.make(
        "at2po/HotpotQA-v0", dataset=str(HOTPOTQA), corpus=str(CORPUS), split="train", topk=3
    )
    assert len(base(env).tasks) == 100
    for index in range(100):
        task = base(env).tasks[index]
        _, info = env.reset(options={"task_id": task.id})
        assert info["question"].endswith("?")
        for title in supporting_titles(task):
            observation, reward, terminated, truncated, info = env.step(think(f"<search>{title}</search>"))
            assert (reward, terminated, truncated, info["outcome"]) == (0.0, False, False, "tool")
            assert 1 <= observation.count("\nDoc ") <= 3
        _, reward, terminated, _, info = env.step(boxed(task.golden_answers[0]))
        assert (reward, terminated, info["em"], info["f1"], info["reason"]) == (
            1.0,
            True,
            1.0,
            1.0,
            "correct",
        )
    # A negative control: the answer of another question is wrong wherever the two differ.
    wrong = []
    for index in range(100):
        env.reset(options={"index": index})
        wrong.append(env.step(boxed("no answer of any question"))[1])
    assert wrong == [0.0] * 100
    found = measure(str(HOTPOTQA), str(CORPUS), topk=3)
    for key, value in found.items():
        record_property(key, value)
    assert found["mean_reward"] == 1.0
    # 198 of 200 titles when this was written.
    assert found["hit_rate"] >= 0.95


@needs_real_data
@pytest.mark.parametrize(
    ("name", "path", "count"),
    [
        ("MuSiQue", "musique/train", 100),
        ("NaturalQuestions", "nq/test", 1000),
        ("Bamboogle", "bamboogle/test", 125),
    ],
)
def test_every_real_question_is_playable(name: str, path: str, count: int) -> None:
    env = gymnasium.make(f"at2po/{name}-v0", dataset=str(REAL / f"qa/{path}.jsonl"), corpus=str(CORPUS))
    assert len(base(env).tasks) == count
    for index in range(count):
        _, info = env.reset(seed=index, options={"index": index})
        assert info["question"] == info["question"].strip()
        assert info["question"].endswith("?")
        for gold in base(env).tasks[index].golden_answers:
            snap = at2po_env.snapshot(env)
            assert env.step(boxed(gold))[4]["em"] == 1.0
            at2po_env.restore(env, snap)


def miniwiki(**options: Any) -> gymnasium.Env[Any, Any]:
    return gymnasium.make("at2po/MiniWiki-v0", **options)


def walk(env: gymnasium.Env[Any, Any], task: Task) -> Iterator[str]:
    """Search every entity on the way to the answer; yields the observations."""
    env.reset(options={"task_id": task.id})
    path = list(task.metadata["path"])
    for title in path if task.metadata["hops"] == "comparison" else path[:-1]:
        yield env.step(think(f"<search>{title}</search>"))[0]


@pytest.mark.parametrize("split", ["train", "test"])
def test_miniwiki_questions_are_answered_by_searching_the_way(split: str) -> None:
    env = miniwiki(split=split, hops=(1, 2, 3, "comparison"), worlds=3)
    for index in range(48):
        task = base(env).tasks[index]
        pages = list(walk(env, task))
        for page, title in zip(pages, task.metadata["path"], strict=False):
            assert f"Doc 1(Title: {title})" in page
        gold = task.golden_answers[0]
        assert gold in pages[-1] or task.metadata["hops"] == "comparison"
        assert env.step(boxed(gold))[1] == 1.0


def test_miniwiki_searches_the_world_of_the_question() -> None:
    env = miniwiki(worlds=2, topk=3)
    first, second = base(env).tasks[0], base(env).tasks[1]
    assert first.metadata["world"] != second.metadata["world"]
    env.reset(options={"index": 1})
    start = first.metadata["path"][0]
    assert f"(Title: {start})" not in env.step(think(f"<search>{start}</search>"))[0]
    env.reset(options={"index": 0})
    assert f"(Title: {start})" in env.step(think(f"<search>{start}</search>"))[0]


def test_miniwiki_keeps_the_contract() -> None:
    at2po_env.check_env(miniwiki(worlds=2, render_mode="ansi"), process=True)


def test_miniwiki_makes_its_own_data() -> None:
    with pytest.raises(ConfigError, match="leave dataset and corpus out"):
        miniwiki(dataset="x.jsonl")
    assert miniwiki(prompt="tag").reset(seed=0)[0].count("<search>") == 1


def test_two_environments_of_a_process_share_the_worlds() -> None:
    one, two = base(miniwiki(worlds=2)), base(miniwiki(worlds=2))
    assert one.tasks is two.tasks
    assert isinstance(one.tools["search"].retriever, Bm25Retriever)  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore::at2po_env.data.At2poSampleWarning")
def test_a_server_needs_no_corpus_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, corpus: object = None) -> Path:
        raise AssertionError(f"looked for a corpus of {name}: {corpus}")

    monkeypatch.setattr("at2po_envs.search_qa.making.resolve_corpus", refuse)
    env = making.make_qa("HotpotQA", retriever="http://127.0.0.1:9", retriever_options={"timeout_s": 0.2})
    search = env.tools["search"]
    assert isinstance(search, SearchTool)
    assert "http://127.0.0.1:9" in repr(search.retriever)
