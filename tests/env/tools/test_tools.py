"""Tools: validation, time-outs that fire, bounded retries, failures as data; search, calculator, python."""

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from at2po_env import deadlines
from at2po_env.data.tasks import Task
from at2po_env.deadlines import abandoned_calls
from at2po_env.errors import ConfigError, RetrievalError, ToolError
from at2po_env.forking.frozen import FrozenDict
from at2po_env.retrieval.base import Passage
from at2po_env.tools import (
    UNCHANGED,
    CalculatorTool,
    SearchTool,
    Tool,
    ToolContext,
    ToolResult,
    as_tool,
    call_tool,
    tool,
)
from at2po_env.tools.calculator import evaluate

TASK = Task("t", "q?", ("a",))


def context(state: Any = None, *, seed: int = 1, turn: int = 0) -> ToolContext:
    return ToolContext(TASK, state, seed=seed, turn=turn)


def test_a_typed_function_is_a_tool() -> None:
    def book(city: str, nights: int = 1, kind: Literal["single", "double"] = "single") -> str:
        """Book a room.

        More about it.

        Args:
            city: Where to
                stay.
            nights: How long.
            kind: Which room.
        """
        return f"{city} {nights} {kind}"

    made = as_tool(book)
    schema = made.Arguments.model_json_schema()
    assert (made.name, made.description) == ("book", "Book a room.")
    assert schema["required"] == ["city"]
    assert schema["properties"]["city"]["description"] == "Where to stay."
    assert schema["properties"]["kind"]["enum"] == ["single", "double"]
    assert call_tool(made, {"city": "Rome", "nights": "2"}, context()).text == "Rome 2 single"


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({}, "city: Field required"),
        ({"city": "Rome", "nights": "many"}, "nights: Input should be a valid integer"),
        ({"city": "Rome", "stars": 5}, "stars: Extra inputs are not permitted"),
        ({"city": ["Rome"]}, "city: Input should be a valid string"),
        ({"\ud800": 1, "city": "Rome"}, "valid string"),
    ],
)
def test_wrong_arguments_are_a_failed_call(arguments: dict[str, Any], fault: str) -> None:
    @tool
    def book(city: str, nights: int = 1) -> str:
        """Book a room."""
        raise AssertionError(f"called with wrong arguments {city} {nights}")

    result = call_tool(book, arguments, context())
    assert not result.ok
    assert result.text.startswith("wrong arguments for book: ")
    assert fault in result.text
    result.text.encode()


def test_arguments_may_have_names_that_pydantic_reserves() -> None:
    @tool
    def odd(json: str, model_config: int, _x: int = 0) -> str:
        """Odd names."""
        return f"{json} {model_config} {_x}"

    assert call_tool(odd, {"json": "j", "model_config": 1, "_x": 2}, context()).text == "j 1 2"


@pytest.mark.parametrize(
    ("value", "text"), [("é", "é"), (None, ""), (3, "3"), ({"a": [1]}, '{"a": [1]}'), ("a\ud800b", "a?b")]
)
def test_whatever_a_function_returns_is_shown(value: Any, text: str) -> None:
    @tool
    def give() -> Any:
        """Give."""
        return value

    assert call_tool(give, {}, context()) == ToolResult(text)


def test_state_is_explicit_and_frozen() -> None:
    @tool(state={"seen": []})
    def remember(word: str, context: ToolContext) -> ToolResult:
        """Remember."""
        seen = [*context.state["seen"], word]
        return ToolResult(", ".join(seen), {"seen": seen})

    start = remember.start(TASK)
    first = call_tool(remember, {"word": "a"}, context(start))
    second = call_tool(remember, {"word": "b"}, context(first.state))
    assert second.text == "a, b"
    assert start == {"seen": []}
    assert first.state == FrozenDict(seen=("a",))
    assert isinstance(first.state, FrozenDict)
    with pytest.raises(TypeError):
        first.state["seen"] = ()


def test_the_initial_state_may_depend_on_the_task() -> None:
    @tool(state=lambda task: {"id": task.id})
    def look(context: ToolContext) -> str:
        """Look."""
        return str(context.state["id"])

    assert call_tool(look, {}, context(look.start(TASK))) == ToolResult("t", UNCHANGED)


def test_random_numbers_depend_on_seed_and_turn_alone() -> None:
    def draw(seed: int, turn: int) -> float:
        return float(context(seed=seed, turn=turn).rng.random())

    assert draw(1, 0) == draw(1, 0)
    assert len({draw(1, 0), draw(1, 1), draw(2, 0)}) == 3
    one = context()
    assert one.rng.random() != one.rng.random()


class Nothing(BaseModel):
    pass


class Broken(Tool):
    name = "broken"
    description = "Fails."
    Arguments = Nothing

    def __init__(self, error: BaseException, failing: int, retries: int = 0) -> None:
        self.error, self.failing, self.retries = error, failing, retries
        self.calls = 0
        self.draws: list[float] = []
        self.backoff_s = 0.001

    def run(self, arguments: Any, context: ToolContext) -> str:
        assert isinstance(arguments, Nothing)
        self.calls += 1
        self.draws.append(float(context.rng.random()))
        if self.calls <= self.failing:
            raise self.error
        return "fine"


@pytest.mark.parametrize(
    ("failing", "retries", "calls", "ok"), [(1, 0, 1, False), (2, 2, 3, True), (9, 2, 3, False)]
)
def test_retries_are_bounded(failing: int, retries: int, calls: int, ok: bool) -> None:
    broken = Broken(ValueError("why"), failing, retries)
    result = call_tool(broken, {}, context())
    assert (broken.calls, result.ok) == (calls, ok)
    assert len(set(broken.draws)) == 1  # every attempt starts with the same random numbers
    if not ok:
        attempts = f" ({retries + 1} attempts)" if retries else ""
        assert result.text == f"broken failed{attempts}: ValueError: why"


def test_the_pause_before_a_retry_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    broken = Broken(ValueError(), 9, retries=4)
    broken.backoff_s = 1.0
    assert not call_tool(broken, {}, context()).ok
    assert pauses == [1.0, 2.0, 4.0, 5.0]


def test_what_is_no_failure_of_the_tool_raises() -> None:
    class Ours(Broken):
        failures = (ToolError,)

    assert not call_tool(Ours(ToolError("known"), 1), {}, context()).ok
    with pytest.raises(ValueError, match="a bug"):
        call_tool(Ours(ValueError("a bug"), 1), {}, context())
    with pytest.raises(KeyboardInterrupt):
        call_tool(Broken(KeyboardInterrupt(), 1), {}, context())


@pytest.mark.parametrize("timeout_s", [None, 20.0])
def test_a_tool_that_exits_is_a_failed_call(timeout_s: float | None) -> None:
    leaving = Broken(SystemExit(0), 1)
    leaving.timeout_s = timeout_s
    assert call_tool(leaving, {}, context()) == ToolResult(
        "broken failed: SystemExit: 0", UNCHANGED, ok=False
    )
    narrow = SearchTool(Shelf(SystemExit(0)))  # type: ignore[arg-type]
    assert not call_tool(narrow, {"query": "q"}, context()).ok


def test_an_error_that_cannot_describe_itself_is_still_a_failure() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert call_tool(Broken(Mute(), 1), {}, context()).text == "broken failed: Mute"


def test_time_outs_fire() -> None:
    release = threading.Event()

    @tool(timeout_s=0.05, retries=1)
    def hang() -> str:
        """Hang."""
        release.wait(30)
        return "late"

    hang.backoff_s = 0.001
    start = time.monotonic()
    result = call_tool(hang, {}, context())
    assert time.monotonic() - start < 15
    assert result == ToolResult("hang failed (2 attempts): timed out after 0.05 s", UNCHANGED, ok=False)
    assert abandoned_calls(hang) == 2
    release.set()
    limit = time.monotonic() + 20
    while abandoned_calls(hang) and time.monotonic() < limit:
        time.sleep(0.01)
    assert not abandoned_calls(hang)


def test_a_tool_that_hangs_does_not_cost_the_others_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "MAX_ABANDONED", 1)
    release = threading.Event()

    @tool(timeout_s=0.05)
    def hang() -> str:
        """Hang."""
        release.wait(30)
        return "late"

    @tool(timeout_s=30)
    def work() -> str:
        """Work."""
        return "done"

    assert "timed out after 0.05 s" in call_tool(hang, {}, context()).text
    assert "earlier calls that timed out are still running" in call_tool(hang, {}, context()).text
    assert call_tool(work, {}, context()).text == "done"
    release.set()


def test_a_tool_that_hangs_does_not_keep_the_process() -> None:
    code = (
        "import time; from at2po_env.tools import *; from at2po_env.data.tasks import Task\n"
        "@tool(timeout_s=0.05)\ndef hang() -> str:\n    'Hang.'\n    time.sleep(600)\n"
        "print(call_tool(hang, {}, ToolContext(Task('t', 'q'))).ok)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "False\n"


def test_long_results_are_cut() -> None:
    @tool
    def flood() -> str:
        """Flood."""
        return "x" * 50_000

    assert call_tool(flood, {}, context()).text == "x" * 20_000 + "\n[cut: 50,000 characters in all]"


async def _coroutine(a: int) -> int:
    """Wait."""
    return a


def _no_type(a) -> str:  # type: ignore[no-untyped-def]
    """Do."""
    return str(a)


def _variadic(*a: int) -> str:
    """Do."""
    return str(a)


def _no_doc(a: int) -> str:
    return str(a)


def _no_schema(a: threading.Event) -> str:
    """Do."""
    return str(a)


@pytest.mark.parametrize(
    ("function", "fault"),
    [
        (_coroutine, "is asynchronous"),
        (_no_type, "parameter 'a' needs a type"),
        (_variadic, "must be an ordinary, named one"),
        (_no_doc, "has no description"),
        (_no_schema, "has no JSON schema"),
        (3, "expected a Tool or a typed function"),
        (str, "expected a Tool or a typed function"),
    ],
)
def test_what_cannot_be_a_tool_says_why(function: Any, fault: str) -> None:
    with pytest.raises(ToolError, match=fault):
        as_tool(function)


class Shelf:
    """A retriever over two passages that notes what it was asked."""

    digest = "shelf"

    def __init__(
        self, error: Exception | None = None, texts: Sequence[str] = ("first text", "second é")
    ) -> None:
        self.error = error
        self.texts = texts
        self.queries: list[str] = []

    def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        self.queries.extend(queries)
        if self.error is not None:
            raise self.error
        return [[Passage(str(i), f"T{i}", text) for i, text in enumerate(self.texts)][:topk] for _ in queries]


def test_search_shows_the_passages_cut() -> None:
    result = call_tool(SearchTool(Shelf(), topk=2, max_chars=8), {"query": "  who? "}, context())
    assert result == ToolResult("Doc 1(Title: T0) first te\nDoc 2(Title: T1) second é")
    assert (
        call_tool(SearchTool(Shelf(), topk=1), {"query": "q"}, context()).text
        == "Doc 1(Title: T0) first text"
    )
    long = Shelf(texts=["x" * 5000] * 3)
    assert call_tool(SearchTool(long), {"query": "q"}, context()).text.count("x") == 3000
    assert call_tool(SearchTool(Shelf(texts=[])), {"query": "q"}, context()).text == "No passages found."


def test_the_query_is_stripped_and_made_encodable() -> None:
    shelf = Shelf()
    for query in ("  a ", "\ud800é", "\x00"):
        assert call_tool(SearchTool(shelf), {"query": query}, context()).ok
    assert shelf.queries == ["a", "?é", "\x00"]


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({"query": " \n"}, "search failed: empty query"),
        ({"query": "x" * 2001}, "search failed: query of 2,001 characters"),
        ({}, "query: Field required"),
        ({"query": 3}, "query: Input should be a valid string"),
        ({"query": "q", "topk": 9}, "topk: Extra inputs"),
    ],
)
def test_queries_that_cannot_be_searched_fail(arguments: dict[str, Any], fault: str) -> None:
    result = call_tool(SearchTool(Shelf()), arguments, context())
    assert not result.ok
    assert fault in result.text


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RetrievalError("the index is damaged"), "search failed: the index is damaged"),
        (ConnectionRefusedError("no server"), "search failed: ConnectionRefusedError: no server"),
        (TimeoutError("slow"), "search failed: slow"),
        (ValueError("a score of 400 digits"), "search failed: ValueError: a score of 400 digits"),
        (OverflowError("int too large"), "search failed: OverflowError: int too large"),
        (UnicodeError("no UTF-8"), "search failed: UnicodeError: no UTF-8"),
    ],
)
def test_a_failing_retriever_is_a_failed_call(error: Exception, text: str) -> None:
    assert call_tool(SearchTool(Shelf(error)), {"query": "q"}, context()) == ToolResult(
        text, UNCHANGED, ok=False
    )


def test_a_bug_in_a_retriever_raises() -> None:
    with pytest.raises(KeyError):
        call_tool(SearchTool(Shelf(KeyError("bug"))), {"query": "q"}, context())


def test_search_refuses_settings_that_show_nothing() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        SearchTool(Shelf(), topk=0)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", "7"),
        ("(1987 - 1912) / 2", "37.5"),
        ("-7 // 2", "-4"),
        ("7 % 4", "3"),
        ("2 ** 10", "1024"),
        ("sqrt(16) + max(1, 2, 3)", "7.0"),
        ("round(pi, 2)", "3.14"),
        ("2 ** -1", "0.5"),
        (" 1e3 ", "1000.0"),
    ],
)
def test_the_calculator_calculates(expression: str, value: str) -> None:
    assert call_tool(CalculatorTool(), {"expression": expression}, context()) == ToolResult(value)


@pytest.mark.parametrize(
    "expression",
    ["", "1 +", "1 / 0", "sqrt(-1)", "(-8) ** 0.5", "9 ** 9 ** 9", "2 ** 99999", "10 ** 999 * 10 ** 999", "a",
     "True", "'a' * 9", "[1][0]", "__import__('os')", "max.__class__", "(" * 300, "1" * 501, "lambda: 1",
     "\x00", "\ud800", "max()", "round(1.5, ndigits=1)", "1j", "10.0 ** 400"],
)  # fmt: skip
def test_the_calculator_fails_on_anything_else(expression: str) -> None:
    assert not call_tool(CalculatorTool(), {"expression": expression}, context()).ok


@settings(max_examples=300, deadline=None, database=None)
@given(st.text("0123456789.+-*/%() esqrtmax,", max_size=30) | st.text(max_size=20))
def test_the_calculator_never_raises_anything_else(expression: str) -> None:
    with contextlib.suppress(ToolError):
        assert isinstance(evaluate(expression), int | float)


@pytest.mark.parametrize(
    "expression",
    [
        "round(1, -10**8)",
        "round(7, -9**9)",
        "round(10**999, -10**999)",
        "round(1.5, 10**8)",
        "(-2) ** (10**999)",
        "(10**600) ** (10**600)",
        "1 ** 10**9",
        "2.0 ** 10**600",
        "10**999 * 10**999 // 3",
        "0x" + "f" * 498 + " ** 3",
        "-" * 400 + "1",
        "+".join("1" * 200),
        "max(" * 60 + "1" + ")" * 60,
        "abs(" * 124 + "1" + ")" * 124,
        "1e400 - 1e400",
    ],
)
def test_no_expression_takes_long(expression: str) -> None:
    start = time.process_time()
    call_tool(CalculatorTool(), {"expression": expression}, context())
    assert time.process_time() - start < 0.5


_NUMBERS = st.sampled_from(["0", "1", "-1", "7", "2.5", "1e308", "1e999", "9" * 60, "10**8", "10**999", "pi"])
_EXPRESSIONS = st.recursive(
    _NUMBERS,
    lambda inner: st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from(["+", "-", "*", "/", "//", "%", "**"]), inner),
        st.builds("{}({}, {})".format, st.sampled_from(["round", "max", "log", "min"]), inner, inner),
        st.builds("{}({})".format, st.sampled_from(["round", "floor", "exp", "sqrt", "abs", "-"]), inner),
    ),
    max_leaves=12,
)


@settings(max_examples=1000, deadline=None, database=None)
@given(_EXPRESSIONS)
def test_arithmetic_of_any_size_is_bounded(expression: str) -> None:
    start = time.process_time()
    with contextlib.suppress(ToolError):
        value = evaluate(expression)
        assert abs(value) < float("inf") if isinstance(value, float) else value.bit_length() <= 4096
    assert time.process_time() - start < 0.5
