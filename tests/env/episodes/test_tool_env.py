"""ToolEnv: outcomes, limits, notices, rewards, seeds, forks; 10,000 malformed actions."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from at2po_env.contract.checker import check_env
from at2po_env.data.qa import as_tasks
from at2po_env.data.tasks import Task, TaskList
from at2po_env.episodes.tool_env import LIMIT_NOTICE, Ending, ToolEnv
from at2po_env.errors import ConfigError, DataError, EnvError, RetrievalError
from at2po_env.forking.base import fork, restore, snapshot
from at2po_env.forking.snapshots import Snapshot
from at2po_env.retrieval.base import Passage
from at2po_env.scoring import ScoredResponse, score_response
from at2po_env.tools import SearchTool, ToolContext, ToolResult, tool

GOLD = "XGOLDX"
TASKS = [
    {"id": f"t{i}", "question": f"Question {i}?", "golden_answers": [GOLD, f"gold {i}"]} for i in range(5)
]
SEARCH = "<think>t</think><search>q</search>"
BOXED = rf"<think>t</think><answer>\boxed{{{GOLD}}}</answer>"


class Shelf:
    """Returns one passage per query; a query that starts with ! fails."""

    digest = "shelf"

    def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        if any(query.startswith("!") for query in queries):
            raise RetrievalError("the server is gone")
        return [[Passage("0", "Title", f"about {query}")][:topk] for query in queries]


@tool(state={"words": []})
def note(word: str, context: ToolContext) -> ToolResult:
    """Write a word down.

    Args:
        word: What to write.
        context: The call's side of the episode.
    """
    words = [*context.state["words"], word]
    return ToolResult(f"{' '.join(words)} {context.rng.integers(1000)}", {"words": words})


@tool
def explode(fuse: int) -> str:
    """Explode."""
    raise ZeroDivisionError(f"after {fuse}")


@tool
def stop() -> ToolResult:
    """End the episode."""
    return ToolResult("The end.", ends=True)


def make(**options: Any) -> ToolEnv:
    tools = [SearchTool(Shelf()), note, explode, stop]
    env = ToolEnv(**{"tasks": TASKS, "tools": tools, "reward": "boxed", **options})
    env.reset(seed=0)
    return env


def test_an_episode_of_search_and_answer() -> None:
    env = make()
    prompt, info = env.reset(seed=0, options={"task_id": "t3"})
    assert "Question 3?" in prompt
    assert info == {
        "task_id": "t3",
        "question": "Question 3?",
        "stop": ("</search>", "</note>", "</explode>", "</stop>", "</answer>"),
        "max_turns": 7,
        "turn": 0,
    }
    assert env.step(SEARCH) == (
        "\n<result>\nDoc 1(Title: Title) about q\n</result>\n",
        0.0,
        False,
        False,
        {"turn": 1, "outcome": "tool", "reason": "", "tool": "search"},
    )
    end = {"em": 1.0, "f1": 1.0, "answer": GOLD, "score_reason": "correct", "task_id": "t3"}
    expected = {"turn": 2, "outcome": "answer", "reason": "correct", **end}
    assert env.step(BOXED) == ("", 1.0, True, False, expected)


def test_a_wrong_format_costs_one_and_says_why() -> None:
    _, reward, terminated, truncated, info = make().step(rf"<answer>\boxed{{{GOLD}}}</answer>")
    assert (reward, terminated, truncated) == (-1.0, True, False)
    assert (info["em"], info["f1"], info["answer"]) == (1.0, 1.0, GOLD)
    assert info["reason"].startswith("bad format: 0 <think>")


@pytest.mark.parametrize(
    ("action", "reason", "shown"),
    [
        (
            "<search>!</search>",
            "search failed: the server is gone",
            "Error: search failed: the server is gone",
        ),
        ("<search></search>", "search failed: empty query", "Error: search failed: empty query"),
        ("<explode>3</explode>", "explode failed: ZeroDivisionError: after 3", "ZeroDivisionError"),
        ("<explode>x</explode>", "wrong arguments for explode", "fuse"),
    ],
)
def test_a_failing_tool_is_shown_and_the_episode_goes_on(action: str, reason: str, shown: str) -> None:
    env = make()
    observation, reward, terminated, truncated, info = env.step(action)
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert info["outcome"] == "tool_error"
    assert reason in info["reason"]
    assert shown in observation
    assert env.step(SEARCH)[4]["outcome"] == "tool"


def test_a_tool_that_does_not_exist_is_an_error_of_the_turn() -> None:
    env = make(protocol="hermes")
    observation, _, terminated, _, info = env.step('<tool_call>{"name": "fly", "arguments": {}}</tool_call>')
    assert not terminated
    assert info["outcome"] == "tool_error"
    assert "there is no tool 'fly'; tools: search, note, explode, stop" in observation


def test_a_malformed_turn_ends_the_episode() -> None:
    env = make()
    observation, reward, terminated, truncated, info = env.step("<think>hm</think>")
    assert (observation, reward, terminated, truncated) == ("", -1.0, True, False)
    assert info["outcome"] == "malformed"
    assert info["reason"].startswith("neither a call nor an answer")
    assert (info["em"], info["f1"], info["answer"]) == (0.0, 0.0, None)


def test_a_malformed_turn_is_answered_with_a_notice() -> None:
    env = make(on_malformed="notice", reward="tag", max_turns=3)
    observation, reward, terminated, truncated, info = env.step("<search>never closed")
    assert "neither a tool call nor a final answer (search is never closed by /search)" in observation
    assert (reward, terminated, truncated, info["outcome"]) == (0.0, False, False, "malformed")
    observation, *_ = env.step("again")
    assert observation.endswith(LIMIT_NOTICE.strip() + "\n")
    *_, truncated, info = env.step("and again")
    assert truncated
    assert (info["outcome"], info["reason"], info["turn"]) == ("limit", "max_turns", 3)


def test_notices_do_not_spoil_the_format() -> None:
    env = make(on_malformed="notice", max_turns=3)
    env.step("<think>hm</think><answer>")
    env.step("<think>hm</think></answer>")
    # The policy wrote these tags itself, so the format is wrong; the notices added none to count. The close
    # of an earlier turn's <answer> does not count.
    assert "2 <answer> and 1 </answer>" in env.step(BOXED)[4]["reason"]
    env = make(on_malformed="notice", max_turns=4)
    for _ in range(3):
        env.step("<think>hm</think>")
    assert env.step(BOXED)[1] == 1.0


def test_the_last_but_one_result_carries_the_notice_and_the_last_turn_has_to_answer() -> None:
    env = make()
    for turn in range(1, 7):
        observation, reward, terminated, truncated, info = env.step(SEARCH)
        assert (reward, terminated, truncated, info["turn"]) == (0.0, False, False, turn)
        assert (LIMIT_NOTICE in observation) == (turn == 6)
    before = snapshot(env)
    observation, reward, terminated, truncated, info = env.step(SEARCH)
    assert (observation, reward, terminated, truncated) == ("", -1.0, False, True)
    assert (info["outcome"], info["reason"], info["turn"]) == ("limit", "max_turns", 7)
    assert info["answer"] is None
    restore(env, before)
    assert env.step(BOXED)[1:4] == (1.0, True, False)


def test_the_limit_belongs_to_the_episode_not_to_a_wrapper() -> None:
    env = make(max_turns=2)
    env.step(SEARCH)
    child = fork(env)
    assert child.step(SEARCH)[3]
    assert env.step(SEARCH)[3]


def test_one_turn_means_answer_at_once() -> None:
    assert make(max_turns=1).step(BOXED)[1:4] == (1.0, True, False)
    assert make(max_turns=1).step(SEARCH)[3]


def test_a_tool_may_end_the_episode() -> None:
    env = make()
    observation, _, terminated, truncated, info = env.step("<think>t</think><stop></stop>")
    assert observation == "\n<result>\nThe end.\n</result>\n"
    assert (terminated, truncated, info["outcome"]) == (True, False, "tool")
    assert info["answer"] is None
    with pytest.raises(EnvError, match=r"ended after turn 1 \(tool\)"):
        env.step(SEARCH)


def test_stepping_out_of_an_episode_is_an_error_of_the_caller() -> None:
    env = ToolEnv(tasks=TASKS, tools=[SearchTool(Shelf())])
    with pytest.raises(EnvError, match="before the first reset"):
        env.step(SEARCH)
    env.reset(seed=0)
    env.step(BOXED)
    with pytest.raises(EnvError, match=r"ended after turn 1 \(answer\)"):
        env.step(SEARCH)
    env.reset()
    with pytest.raises(EnvError, match="an action is the text of one turn"):
        env.step(3)  # type: ignore[arg-type]


def test_tasks_are_found_by_id_and_index_and_drawn_by_seed() -> None:
    env = make()
    assert env.reset(options={"index": 2})[1]["task_id"] == "t2"
    assert env.reset(options={"task_id": "t4"})[1]["task_id"] == "t4"
    drawn = {env.reset(seed=seed)[1]["task_id"] for seed in range(60)}
    assert drawn == {"t0", "t1", "t2", "t3", "t4"}
    one = [env.reset(seed=5)[1]["task_id"], *(env.reset()[1]["task_id"] for _ in range(20))]
    two = [env.reset(seed=5)[1]["task_id"], *(env.reset()[1]["task_id"] for _ in range(20))]
    assert one == two
    assert len(set(one)) > 1


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"index": 5}, "task index 5: expected 0 to 4"),
        ({"index": -1}, "task index -1"),
        ({"index": "1"}, "task index '1'"),
        ({"task_id": "nosuch"}, "no task 'nosuch'"),
        ({"id": "t1"}, "expected {'task_id': ...} or {'index': ...}"),
        ({"index": 1, "task_id": "t1"}, "expected {'task_id': ...} or {'index': ...}"),
    ],
)
def test_options_that_name_no_task_are_refused(options: dict[str, Any], fault: str) -> None:
    with pytest.raises(EnvError) as raised:
        make().reset(options=options)
    assert fault in str(raised.value)


def test_tool_state_and_random_numbers_belong_to_the_episode() -> None:
    env = make()
    env.step("<note>a</note>")
    child, other = fork(env), fork(env)
    ours = env.step("<note>b</note>")
    assert "a b " in ours[0]
    assert child.step("<note>b</note>") == ours
    assert "a c " in other.step("<note>c</note>")[0]
    assert "a b d " in env.step("<note>d</note>")[0]


def test_random_numbers_of_tools_follow_the_seed() -> None:
    def first(seed: int) -> str:
        env = make()
        env.reset(seed=seed)
        return env.step("<note>a</note>")[0]

    assert first(1) == first(1)
    assert len({first(seed) for seed in range(5)}) > 3


def test_a_new_episode_starts_with_the_tools_first_state() -> None:
    env = make()
    env.step("<note>a</note>")
    env.reset()
    assert "a" not in env.step("<note>b</note>")[0].split("\n")[2].split()


def test_snapshots_go_through_json_with_any_text() -> None:
    env = make(on_malformed="notice")
    env.step("lone \ud800 and nul \x00")
    env.step("<note>\udfff</note>")
    snap = snapshot(env)
    text = snap.to_json()
    text.encode()
    other = make(on_malformed="notice")
    restore(other, Snapshot.from_json(text))
    assert snapshot(other).digest == snap.digest
    assert other.step("<note>b</note>") == env.step("<note>b</note>")


@pytest.mark.parametrize("protocol", ["tagged", "search_r1", "hermes"])
@pytest.mark.parametrize("on_malformed", ["end", "notice"])
def test_the_contract_holds(protocol: str, on_malformed: str) -> None:
    check_env(make(protocol=protocol, on_malformed=on_malformed))


def test_the_contract_holds_under_wrappers() -> None:
    check_env(gymnasium.wrappers.OrderEnforcing(gymnasium.wrappers.TimeLimit(make(), 3)))


def leaves(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in leaves(item)]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, tuple) else [str(value)]


@pytest.mark.parametrize("protocol", ["tagged", "search_r1", "hermes"])
@pytest.mark.parametrize("answer_format", ["boxed", "tag", "structured"])
def test_golden_answers_are_never_shown(protocol: str, answer_format: str) -> None:
    env = make(protocol=protocol, reward=answer_format, on_malformed="notice")
    shown = [*leaves(env.reset(seed=1))]
    for action in ["hm", *env.example_actions()]:
        shown += leaves(env.step(action)) if not (state := env.get_state()) or not state.ended else []
    assert len(shown) > 20
    assert not [text for text in shown if GOLD in text or "gold " in text]


_PIECES = st.sampled_from(
    ["<search>", "</search>", "<answer>", "</answer>", "<think>", "</think>", "<note>", "</note>", "<result>",
     "</result>", "<tool_call>", "</tool_call>", '{"name": "note", "arguments": ', '{"word": "x"}', "}", "{",
     '"', "\\", "\x00", "\ud800", "\udfff", r"\boxed{", "<", "/", "\n", "é", "q" * 99, "<explode>",
     "</explode>",
     "!", "[" * 50]
)  # fmt: skip
_TEXT = st.text(st.characters(codec=None, categories=None), max_size=6)
_ACTION = st.lists(_PIECES | _TEXT, max_size=8).map("".join)
OUTCOMES = {"tool", "tool_error", "malformed", "answer", "limit"}
FUZZED = {
    (protocol, on_malformed): make(protocol=protocol, on_malformed=on_malformed, max_turns=3)
    for protocol in ("tagged", "hermes")
    for on_malformed in ("end", "notice")
}


@settings(max_examples=2_500, deadline=5000, database=None)
@given(action=_ACTION)
def test_ten_thousand_malformed_actions_are_recorded_outcomes(action: str) -> None:
    for (_, on_malformed), env in FUZZED.items():
        state = env.get_state()
        if state is None or state.ended:
            env.reset()
        observation, reward, terminated, truncated, info = env.step(action)
        assert info["outcome"] in OUTCOMES
        assert info["reason"] or info["outcome"] in ("tool", "answer")
        observation.encode()
        ended = terminated or truncated
        assert ended == ("em" in info)
        assert ended or reward == 0.0
        assert info["outcome"] != "malformed" or terminated == (on_malformed == "end")
        json.dumps(info)


@pytest.mark.parametrize("action", [b"<search>q</search>", b"\xff\xfe\x00", b""])
def test_bytes_are_read_as_text(action: bytes) -> None:
    info = make().step(action)[4]  # type: ignore[arg-type]
    assert info["outcome"] == ("tool" if action.startswith(b"<") else "malformed")


def test_a_megabyte_is_a_recorded_outcome() -> None:
    for unit in ("<search>", "</search>", "\ud800", "\x00", r"<answer>\boxed{", "x"):
        for protocol in ("tagged", "hermes"):
            info = make(protocol=protocol).step(unit * (1_000_000 // len(unit)))[4]
            assert info["outcome"] == "malformed"
    text = "<search>" + "x" * 1_000_000 + "</search>"
    assert make().step(text)[4]["reason"].startswith("search failed: query of 1,000,000 characters")


def test_a_reward_function_sees_the_ending() -> None:
    seen: list[Ending] = []

    def reward(ending: Ending) -> float:
        seen.append(ending)
        return len(ending.tool_states["note"]["words"])

    env = make(reward=reward)
    env.reset(options={"index": 1})
    env.step("<note>a</note>")
    env.step("<note>b</note>")
    _, value, _, _, info = env.step("<answer>gold 1</answer>")
    assert value == 2.0
    assert (info["em"], info["f1"], info["answer"], info["score_reason"]) == (
        1.0,
        1.0,
        "gold 1",
        "own reward",
    )
    ending = seen[0]
    assert (ending.task.id, ending.answer, ending.reason) == ("t1", "gold 1", "answer")
    assert ending.response.startswith("<note>a</note>\n<result>\na ")
    assert ending.response.endswith("<answer>gold 1</answer>")
    assert env.reset()
    env.step("hm")
    assert (seen[1].answer, seen[1].reason) == (None, "malformed")


def test_a_reward_function_may_give_the_whole_score() -> None:
    scored = ScoredResponse(0.5, 0.0, 0.25, "x", "half")
    info = make(reward=lambda _: scored).step("<answer>x</answer>")[4]
    assert (info["em"], info["f1"], info["answer"], info["reason"]) == (0.0, 0.25, "x", "half")


def test_a_reward_function_or_a_start_that_exits_raises_an_ordinary_error() -> None:
    def leave(_: object) -> float:
        raise SystemExit(0)

    with pytest.raises(EnvError, match=r"the reward function called sys.exit\(0\)"):
        make(reward=leave).step("<answer>x</answer>")

    @tool(state=leave)
    def walk() -> str:
        """Walk."""
        return ""

    with pytest.raises(EnvError, match=r"a tool's start called sys.exit\(0\)"):
        make(tools=[walk])


def test_prompts() -> None:
    boxed = make().reset(seed=0)[0]
    assert r"\boxed{answer here}" in boxed
    assert "\b" not in boxed
    assert "- <note> word </note>: Write a word down." in boxed
    assert "word (string): What to write." in boxed
    assert "At most 6 calls" in boxed
    tag = make(reward="tag", protocol="search_r1").reset(seed=0)[0]
    assert "boxed" not in tag
    assert "<information>" in tag
    assert '"name": "note"' in make(protocol="hermes").reset(seed=0)[0]
    own = make(prompt=r"{tools}|\b {x} {question}").reset(options={"index": 0})[0]
    assert own.endswith(r"|\b {x} Question 0?")
    assert make(prompt=lambda task: f"Hi {task.id}").reset(options={"index": 0})[0] == "Hi t0"
    assert make(prompt="short").reset(options={"index": 0})[0] == "Question: Question 0?\n"
    with pytest.raises(ConfigError, match=r"holds no \{question\}"):
        make(prompt="Answer!")


def test_a_question_cannot_reach_into_the_template() -> None:
    task = {"question": "{tools} {question} \\boxed{x}?"}
    assert (
        make(tasks=[task], prompt="Q: {question}\n{tools}")
        .reset(seed=0)[0]
        .startswith(f"Q: {task['question']}\n")
    )


def test_render_gives_the_transcript() -> None:
    env = make(render_mode="ansi")
    env.reset(options={"index": 0})
    env.step(SEARCH)
    env.step(BOXED)
    text = env.render()
    assert text is not None
    for part in ("[t0]", "Question 0?", "[turn 1: tool]", "about q", "[turn 2: answer]", "reward 1]"):
        assert part in text
    assert make().render() is None


@pytest.mark.parametrize(
    ("options", "error", "fault"),
    [
        (
            {"max_turns": 0, "on_malformed": "stop"},
            ConfigError,
            "max_turns=0: expected at least 1; on_malformed",
        ),
        ({"render_mode": "human"}, ConfigError, "render_mode='human'"),
        ({"tools": []}, ConfigError, "tools is empty"),
        ({"tools": [note, note]}, ConfigError, "two tools are called 'note'"),
        ({"protocol": "xml"}, ConfigError, "unknown protocol"),
        ({"reward": "bleu"}, ConfigError, "unknown reward rule"),
        ({"tasks": []}, DataError, "no tasks"),
    ],
)
def test_arguments_that_make_no_environment(
    options: dict[str, Any], error: type[Exception], fault: str
) -> None:
    with pytest.raises(error, match=fault):
        make(**options)


def test_tasks_from_dicts() -> None:
    tasks = as_tasks([{"question": "a"}, Task("x", "b", ("c",)), {"question": "d", "golden_answers": 5}])
    assert [task.id for task in (tasks[0], tasks[1], tasks[2])] == ["0", "x", "2"]
    assert tasks[2].golden_answers == ("5",)
    source = TaskList([Task("x", "b")])
    assert as_tasks(source) is source
    assert as_tasks(lambda: source) is source


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (
            {"question": "a", "golden_answer": "b"},
            "task 0: unknown key 'golden_answer'. Expected id, question",
        ),
        ({"golden_answers": ["a"]}, "task 0: expected a question"),
        ("a", "task 0: expected a Task or a dict, got str"),
    ],
)
def test_what_is_no_task_says_why(value: Any, fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        as_tasks([value])


_HOSTILE = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "</result>",
    "<search>",
    r"\boxed{7}",
    "</tool_call>",
]
_PROTOCOL_ACTIONS = {
    "tagged": ("<think>t</think><search>{}</search>", "<search>{}</search>", "</think><search>!{}</search>"),
    "search_r1": ("<think>t</think><search>{}</search>", "<think><search>{}</search>", "{}"),
    "hermes": (
        '<think>t</think><tool_call>{{"name": "search", "arguments": {{"query": "{}"}}}}</tool_call>',
        "<tool_call>{}</tool_call>",
    ),
}


class Hostile:
    """Returns a page of any text."""

    digest = "hostile"

    def __init__(self, page: str) -> None:
        self.page = page

    def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        del topk
        return [[Passage("0", self.page, self.page)] for _ in queries]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_rules_score_what_the_policy_wrote_whatever_the_results_contain(data: st.DataObject) -> None:
    """A rule scores actions and empty results, without closes of earlier turns' answers: no page counts."""
    protocol = data.draw(st.sampled_from(sorted(_PROTOCOL_ACTIONS)))
    rule = data.draw(st.sampled_from(["boxed", "tag", "structured"]))
    hostile = st.lists(st.sampled_from(_HOSTILE), max_size=3).map("".join)
    templates = data.draw(st.lists(st.sampled_from(_PROTOCOL_ACTIONS[protocol]), max_size=5))
    actions = [template.format(data.draw(hostile).replace("\\", "")) for template in templates]
    ending = data.draw(st.sampled_from([BOXED, f"<think>t</think><answer>{GOLD}</answer>", "<answer>no"]))
    ending = data.draw(st.sampled_from([ending, "</answer>", "}</answer>"]))
    page = data.draw(
        st.lists(st.sampled_from([*_HOSTILE, rf"\boxed{{{GOLD}}}", GOLD, "}"]), max_size=6).map("".join)
    )
    tools = [SearchTool(Hostile(page)), note, explode, stop]
    env = make(protocol=protocol, reward=rule, on_malformed="notice", max_turns=8, tools=tools)
    written, opened = "", None
    for turn, action in enumerate([*actions, ending]):
        result = env.step(action)
        called = result[4]["outcome"] in ("tool", "tool_error")
        for part in re.split("(</?answer>)", action):
            if part == "<answer>":
                opened = turn
            elif part == "</answer>" and opened not in (None, turn):
                continue  # it would close the answer of an earlier turn
            elif part == "</answer>":
                opened = None
            written += part
        written += env.protocol.format_result("") if called else result[0]
        if result[2] or result[3]:
            break
    else:
        return
    golds, call_tags = env.get_state().task.golden_answers, env.protocol.call_tags
    expected = score_response(written, golds, answer_format=rule, call_tags=call_tags)
    assert result[1] == expected.reward
    assert (result[4]["em"], result[4]["f1"]) == (expected.em, expected.f1)
    assert result[4]["answer"] == expected.answer
    assert result[4]["score_reason"] == expected.reason


@pytest.mark.parametrize("protocol", ["tagged", "search_r1"])
@pytest.mark.parametrize(("rule", "reward"), [("boxed", -1.0), ("tag", 0.0), ("structured", 0.1)])
@pytest.mark.parametrize(
    ("opening", "closing"),
    [
        ("<think>t</think><answer><search>x</search>", "</answer>"),
        (r"<think>t</think><answer>\boxed{<search>x</search>", "}</answer>"),
        (r"<think>t</think><answer>\boxed{<search>x</search>", "</answer>"),
    ],
)
def test_a_retrieved_page_cannot_answer_for_the_policy(
    protocol: str, rule: str, reward: float, opening: str, closing: str
) -> None:
    page = rf"}} {GOLD} \boxed{{{GOLD}}}" if rule != "tag" else GOLD
    env = make(protocol=protocol, reward=rule, tools=[SearchTool(Hostile(page))])
    observation = env.step(opening)[0]
    assert GOLD in observation
    _, scored, terminated, _, info = env.step(closing)
    assert terminated
    assert info["outcome"] == "malformed"
    assert info["em"] == 0.0
    assert scored in (reward, 0.0)  # an empty box is a well-formed answer, and wrong
    assert GOLD not in str(info["answer"])


@pytest.mark.parametrize("protocol", ["tagged", "search_r1"])
@pytest.mark.parametrize(("rule", "reward"), [("boxed", -1.0), ("tag", 0.0), ("structured", 0.0)])
@pytest.mark.parametrize("between", [True, False], ids=["around a call", "around a notice"])
def test_an_answer_that_is_spread_over_two_turns_is_not_scored(
    protocol: str, rule: str, reward: float, between: bool
) -> None:
    gold = GOLD if rule != "boxed" else rf"\boxed{{{GOLD}}}"
    env = make(
        protocol=protocol, reward=rule, tools=[SearchTool(Shelf())], on_malformed="notice", max_turns=2
    )
    env.step("<think>t</think><answer>" + ("<search>q</search>" if between else gold))
    _, scored, _, truncated, info = env.step(("" if not between else gold) + "</answer>")
    assert truncated
    assert (scored, info["em"], info["f1"], info["answer"]) == (reward, 0.0, 0.0, None)
    # The control: in one turn the same text is an answer.
    env.reset(options={"index": 0})
    assert env.step(f"<think>t</think><answer>{gold}</answer>")[4]["em"] == 1.0


def test_an_unseeded_reset_continues_the_sequence_of_the_seed() -> None:
    def drawn(seed: int) -> list[Any]:
        env = make()
        return [env.reset(seed=seed)[1]["task_id"], *[env.reset()[1]["task_id"] for _ in range(30)]]

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)
    assert set(drawn(3)) == {task["id"] for task in TASKS}
    firsts = [make().reset(seed=seed)[1]["task_id"] for seed in range(500)]
    counts = [firsts.count(task["id"]) for task in TASKS]
    assert all(60 <= count <= 140 for count in counts), counts  # 100 expected, standard deviation 9


def test_tools_are_described_as_chat_endpoints_take_them() -> None:
    env = ToolEnv(tasks=TASKS, tools=[SearchTool(Shelf()), note], protocol="hermes")
    search, noted = env.tool_schemas
    assert noted == {
        "type": "function",
        "function": {
            "name": "note",
            "description": "Write a word down.",
            "parameters": {
                "type": "object",
                "properties": {"word": {"type": "string", "description": "What to write."}},
                "required": ["word"],
                "additionalProperties": False,
            },
        },
    }
    prompt, _ = env.reset(seed=0)
    assert json.dumps(search, ensure_ascii=False) in prompt  # what the prompt says is the same text


def test_without_golden_answers_there_is_no_exact_match():
    @tool()
    def look(word: str) -> str:
        """Look a word up.

        Args:
            word: Anything.
        """
        return word

    env = ToolEnv(tasks=[{"question": "?"}], tools=[look], reward=lambda _: 0.5)
    env.reset(seed=0)
    _, reward, _, _, info = env.step("<answer> x </answer>")
    assert reward == 0.5
    assert not {"em", "f1"} & set(info)


@pytest.mark.parametrize("reward", ["boxed", "at2po", "tag", "structured"])
def test_an_answer_is_written_as_the_reward_reads_it(reward: str) -> None:
    env = ToolEnv(tasks=TASKS, tools=[SearchTool(Shelf(), topk=1)], reward=reward)
    env.reset(options={"index": 0})
    _, earned, terminated, _, info = env.step(env.format_answer(GOLD, think="I know."))
    assert (earned, terminated, info["em"], info["answer"]) == (1.0, True, 1.0, GOLD)
