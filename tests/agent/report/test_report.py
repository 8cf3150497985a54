import contextlib
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.report_samples import answer, flat_tree, metrics, outcome, small_tree, turn, write_run
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from rich.console import Console

from at2po_agent.report.curves import draw_run, read_curves, smooth, smoothing_window
from at2po_agent.report.live import LiveBars, PlainLines, duration, figures, make_listener
from at2po_agent.report.run_folder import (
    NothingYetError,
    TreeRecord,
    is_right,
    most_telling,
    pick,
    read_metrics,
    read_rollout_config,
    read_summary,
    read_trees,
)
from at2po_agent.report.run_report import node_credit, page_options, run_of, write_run_report
from at2po_agent.report.tables import evaluation_table, print_ending, shown_path, summary_table, tree_table
from at2po_agent.report.tree_page import (
    PageOptions,
    node_origins,
    script_json,
    tree_page,
    tree_stats,
    write_tree_page,
)
from at2po_agent.report.turn_text import LONGEST, shorten, token_pieces
from at2po_agent.tree import Tree
from at2po_env.errors import DataError

HOSTILE = (
    "</script><script>document.title='pwned'</script><!--<script> ]]> {{ 7*7 }} {% raw %} &lt;b&gt; "
    "\u2028\u2029\x00\x1b[31m\u202e \"'` <img src=x onerror=alert(1)> \\u003c"
)


class Page(HTMLParser):
    """What a browser would see of a page: tags with attributes, and the text of each script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data

    def names(self) -> list[str]:
        return [name for name, _ in self.tags]


def utf8(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def hostile_tree() -> Tree:
    tree = Tree((1, 2), HOSTILE, HOSTILE)
    node = tree.add(0, turn(f"<search>{HOSTILE}</search>"))
    tree.close(tree.add(node, turn(HOSTILE, observation=HOSTILE)), 1.0, outcome(1.0, HOSTILE))
    return tree


# --- actions in one line ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "kind", "text"),
    [
        ("<think> a <search> b </think> <search> Oak  Marrow </search>", "search", "Oak Marrow"),
        ("<think> x </think> <answer> \\boxed{ {A} B } </answer>", "answer", "{A} B"),
        ("<answer> Ada </answer>", "answer", "Ada"),
        ('<tool_call>{"name": "add", "arguments": {"a": 1, "b": "x"}}</tool_call>', "add", "1, x"),
        ("<tool_call>{broken</tool_call>", "tool_call", "{broken"),
        ("<think> cut </think> <search> half a que", "search", "half a que"),
        ("no tags\n at all", "text", "no tags at all"),
        ("<think> only thought </think>", "text", "<think> only thought </think>"),
        ("", "text", ""),
    ],
)
def test_an_action_is_described_by_what_it_did(action: str, kind: str, text: str) -> None:
    assert shorten(action) == (kind, text)


@given(st.text(max_size=400))
def test_any_action_is_described_on_one_short_line(action: str) -> None:
    short = shorten(action)
    assert len(short.text) <= LONGEST
    assert "\n" not in short.text
    assert "\n" not in short.kind


def test_deeply_nested_tool_calls_do_not_exhaust_the_stack() -> None:
    assert shorten("<tool_call>" + "[" * 100_000).kind == "tool_call"


# --- token texts -----------------------------------------------------------------------------------------


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30))
def test_token_pieces_make_the_text_again(text: str) -> None:
    ids = list(text.encode())
    pieces = token_pieces(ids, text, utf8)
    assert pieces is not None
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


def test_a_character_goes_to_the_token_that_completes_it() -> None:
    # "aé!" is the bytes 61 | c3 a9 | 21: the first half of é shows nothing.
    assert token_pieces(list("aé!".encode()), "aé!", utf8) == ["a", "", "é", "!"]


def test_tokens_that_do_not_give_the_text_are_not_shown() -> None:
    assert token_pieces([97, 98], "ac", utf8) is None


# --- credit and origin of nodes --------------------------------------------------------------------------


def test_forks_are_marked_by_the_round_that_made_them() -> None:
    # Branches in order: (1, 2), (3, 4) are the chains; 5 is round 1; (6, 7) is round 2.
    origin = node_origins(TreeRecord(small_tree()), chains=2, forks=1)
    assert origin.rounds == [0, 0, 0, 0, 0, 1, 2, 2]
    assert origin.opens_fork == [False, False, False, False, False, True, True, False]


def test_rounds_in_the_record_win_over_those_that_were_inferred() -> None:
    record = TreeRecord(small_tree(), rounds=(0, 0, 0, 0, 0, 3, 3, 3))
    assert node_origins(record, chains=2, forks=1).rounds == [0, 0, 0, 0, 0, 3, 3, 3]


def test_without_the_shape_no_fork_is_claimed() -> None:
    assert not any(node_origins(TreeRecord(small_tree()), chains=None, forks=0).opens_fork)


def test_credit_defaults_to_the_values_of_at2po() -> None:
    # Rewards 1, 0, 1, 0 have mean 1/2 and std 1/2, so leaves are +-1 (up to the 1e-6 in the denominator).
    values, advantages = node_credit(TreeRecord(small_tree()))
    assert values is not None
    assert advantages is not None
    np.testing.assert_allclose(values[[2, 4, 5, 7]], [1, -1, 1, -1], atol=1e-5)
    np.testing.assert_array_equal(values, advantages)


def test_advantages_per_branch_are_shown_as_the_mean_over_the_branches_of_a_turn() -> None:
    record = TreeRecord(small_tree(), advantages=np.array([1.0, -1.0, 3.0, -3.0]))  # leaves 2, 4, 5, 7
    values, advantages = node_credit(record)
    assert values is None
    # Node 1 lies on the branches of leaves 2 and 5: (1 + 3) / 2. The root on all: 0.
    np.testing.assert_allclose(advantages, [0, 2, 1, -1, -1, 3, -3, -3])


def test_advantages_per_branch_and_node_are_averaged_where_they_differ() -> None:
    each = np.zeros((4, 8))
    each[0, 1], each[2, 1], each[3, 1] = 1.0, 2.0, 99.0  # leaf 7 does not pass node 1: its 99 must not count
    _, advantages = node_credit(TreeRecord(small_tree(), advantages=each))
    assert advantages is not None
    assert advantages[1] == pytest.approx(1.5)


def test_an_unfinished_tree_has_no_credit_but_a_page() -> None:
    tree = Tree((1,), "p", "q")
    tree.add(0, answer("Ada"))
    assert node_credit(TreeRecord(tree)) == (None, None)
    assert "Leaves" in tree_page(TreeRecord(tree))


# --- the page --------------------------------------------------------------------------------------------


def payload(html: str) -> dict[str, object]:
    value = json.loads(Page(html).scripts[0])
    assert isinstance(value, dict)
    return value


def test_the_page_tells_each_turn_with_its_figures() -> None:
    record = TreeRecord(small_tree(), "Who founded it?", ("Ada",), step=20)
    values, advantages = node_credit(record)
    html = tree_page(record, PageOptions(values, advantages, chains=2, forks=1, decode=utf8))
    nodes = payload(html)["nodes"]
    assert isinstance(nodes, list)
    assert len(nodes) == 8
    fork = nodes[5]
    assert {key: fork[key] for key in ("parent", "turn", "round", "forked", "kind", "summary", "reward")} == {
        "parent": 1,
        "turn": 2,
        "round": 1,
        "forked": True,
        "kind": "answer",
        "summary": "Ada",
        "reward": 1.0,
    }
    assert fork["advantage"] == pytest.approx(1.0, abs=1e-4)
    assert fork["entropy"] == 0.5
    assert "".join(fork["pieces"]) == small_tree().turns[5].action  # type: ignore[union-attr]
    assert set(fork["surprisal"]) == {0.5}
    assert "Who founded it?" in html
    assert "step 20" in html


def test_the_page_loads_nothing() -> None:
    html = tree_page(TreeRecord(small_tree()))
    page = Page(html)
    assert not {"link", "img", "iframe", "object", "base"} & set(page.names())
    assert all("src" not in attrs and "href" not in attrs for _, attrs in page.tags)
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html
    assert html.replace("http://www.w3.org/2000/svg", "").count("://") == 0


def test_any_text_stays_text() -> None:
    options = PageOptions(facts=(HOSTILE,))
    hostile = tree_page(TreeRecord(hostile_tree(), HOSTILE, (HOSTILE,)), options)
    plain = tree_page(TreeRecord(small_tree(), "q", ("a",)), PageOptions(facts=("f",)))
    assert Page(hostile).names() == Page(plain).names()  # not one element more, wherever the text went
    nodes = payload(hostile)["nodes"]
    assert isinstance(nodes, list)
    assert nodes[2]["observation"] == HOSTILE
    assert nodes[2]["outcome"]["answer"] == HOSTILE
    assert payload(hostile)["prompt"] == HOSTILE
    assert "49" not in hostile.split("<script")[0]


def test_unescaped_json_would_break_out_of_its_element() -> None:
    # Negative control: in the same page with plain JSON the text becomes the second script.
    html = tree_page(TreeRecord(hostile_tree()))
    data = Page(html).scripts[0]
    broken = html.replace(data, json.dumps(json.loads(data), ensure_ascii=False))
    assert data in html
    assert Page(broken).scripts[1] == "document.title='pwned'"


@given(st.recursive(st.text() | st.floats(allow_nan=False, allow_infinity=False), st.lists, max_leaves=5))
def test_script_json_means_the_same_and_holds_no_markup(value: object) -> None:
    text = script_json(value)
    assert json.loads(text) == value
    assert text.isascii()
    assert not set("<>&") & set(text)


def test_lone_surrogates_can_be_written(tmp_path: Path) -> None:
    tree = Tree((1,), "p", "q")
    tree.close(tree.add(0, turn("a\ud800b")), 0.0, outcome(0.0, "\udfff"))
    path = write_tree_page(tmp_path / "tree.html", TreeRecord(tree, "Why \ud800?"))
    assert "Why \\ud800?" in path.read_text(encoding="utf-8")


def test_forced_tokens_are_marked_as_untrained() -> None:
    tree = Tree((1,), "p", "q")
    forced = turn("ab")
    mask = np.array([True, False])
    node = tree.add(0, type(forced)(**{**vars(forced), "sampled": mask}))
    tree.close(node, 1.0, outcome(1.0))
    nodes = payload(tree_page(TreeRecord(tree), PageOptions(decode=utf8)))["nodes"]
    assert isinstance(nodes, list)
    assert nodes[1]["forced"] == [False, True]
    assert nodes[1]["sampled_tokens"] == 1


def test_the_head_counts_leaves_and_what_sharing_saves() -> None:
    tree = Tree((1, 2), "p", "q")  # 2 prompt tokens; "aaaa" shared by two leaves of 1 token each
    node = tree.add(0, turn("aaaa"))
    for reward in (1.0, 0.0):
        tree.close(tree.add(node, turn("b")), reward, outcome(reward))
    shown = {stat.name: stat.value for stat in tree_stats(tree)}
    assert shown["Leaves"] == "2"
    assert shown["Correct"] == "1 (50%)"
    assert shown["Sampled tokens"] == "6"
    assert shown["Saved by sharing"] == "43%"  # 8 unique tokens of 14 in rows: 1 - 8/14


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_draws_every_turn_and_runs_nothing_foreign(tmp_path: Path) -> None:
    tree = hostile_tree()
    page = write_tree_page(tmp_path / "tree.html", TreeRecord(tree, "Quiet"), PageOptions(decode=None))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--disable-sync"]
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [*command, *quiet, profile, page.as_uri()], capture_output=True, check=True, timeout=60
    )
    drawn = Page(done.stdout.decode())
    items = [attrs for _, attrs in drawn.tags if attrs.get("role") == "treeitem"]
    assert len(items) == len(tree)
    assert [item["aria-selected"] for item in items].count("true") == 1
    assert drawn.names().count("script") == 2
    assert "img" not in drawn.names()
    assert "<title>Quiet" in done.stdout.decode()


# --- a run's files ---------------------------------------------------------------------------------------


def test_the_newest_trees_are_read(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    records = read_trees(run)
    assert [record.step for record in records] == [20, 20]
    assert records[1].golden_answers == ("Ada",)
    assert read_trees(run / "trees")[1].question == "Who founded it?"
    assert len(read_trees(run / "trees" / "step_000001.jsonl")) == 1


def test_a_file_may_be_one_tree_or_a_list(tmp_path: Path) -> None:
    one, many = tmp_path / "one.json", tmp_path / "many.json"
    one.write_text(small_tree().to_json(), encoding="utf-8")
    many.write_text(f"[{small_tree().to_json()}, {flat_tree().to_json()}]", encoding="utf-8")
    assert len(read_trees(one)) == 1
    assert [len(record.tree) for record in read_trees(many)] == [8, 2]


def test_a_tree_cut_short_names_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "trees.jsonl"
    file.write_text(small_tree().to_json() + "\n" + small_tree().to_json()[:100] + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"trees\.jsonl, line 2: not JSON"):
        read_trees(file)


def test_json_that_is_no_tree_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "trees.json"
    file.write_text('{"version": 1, "prompt": "p"}', encoding="utf-8")
    with pytest.raises(DataError, match="not a tree"):
        read_trees(file)


def test_credit_of_another_tree_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "trees.json"
    file.write_text(json.dumps({"tree": small_tree().to_json(), "advantages": [1.0]}), encoding="utf-8")
    with pytest.raises(DataError, match="credit of shape"):
        read_trees(file)


def test_the_most_telling_tree_is_the_one_whose_leaves_disagree() -> None:
    records = [TreeRecord(flat_tree("a")), TreeRecord(small_tree("b")), TreeRecord(flat_tree("c"))]
    assert most_telling(records).tree.task_id == "b"
    assert pick(records, "c").tree.task_id == "c"
    assert pick(records, "0").tree.task_id == "a"
    with pytest.raises(DataError, match="no tree of question '7'"):
        pick(records, "7")


def test_only_a_last_line_without_its_end_is_tolerated(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n{"step": 2, "em')
    assert read_metrics(tmp_path) == [{"step": 1}]
    file.write_bytes(b'{"step": 1\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 1"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("line", [b'{"step": "\xff"}\n', b"[" * 100_000 + b"\n"])
def test_metrics_that_no_parser_takes_are_one_clear_error(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line)
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: not JSON"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("record", [{"em": 0.5}, {"em": "high", "step": 1}, {"em": [1], "step": 1}])
def test_metrics_of_another_shape_are_one_clear_error(tmp_path: Path, record: dict[str, object]) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "train", **record}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="no number as step, em or sampled_tokens"):
        read_curves(tmp_path)


def test_a_broken_summary_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(DataError, match=r"summary\.json: expected a JSON object, got list"):
        read_summary(tmp_path)


def test_a_run_is_found_from_anything_inside_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert run_of(run / "trees" / "step_000020.jsonl") == run
    assert run_of(tmp_path) is None


def test_a_run_knows_the_shape_of_its_trees(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    options = page_options(read_trees(run)[1], run)
    assert (options.chains, options.forks, options.facts) == (2, 1, ("run run",))


def test_the_report_of_a_run_is_a_picture_and_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert [path.name for path in write_run_report(run)] == ["learning_curve.png", "tree.html"]
    assert "Who founded it?" in (run / "tree.html").read_text(encoding="utf-8")


def test_a_run_that_has_just_started_has_no_report_yet(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}", encoding="utf-8")
    assert write_run_report(tmp_path) == []
    with pytest.raises(NothingYetError):
        read_curves(tmp_path)


@pytest.mark.parametrize(
    ("name", "read"),
    [("metrics.jsonl", read_metrics), ("summary.json", read_summary), ("config.yaml", read_rollout_config)],
)
def test_a_folder_in_place_of_a_file_is_one_clear_error(tmp_path: Path, name: str, read: Any) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=rf"{name}: cannot be read \(Is a directory\)"):
        read(tmp_path)


def test_damaged_metrics_are_not_mistaken_for_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("nonsense\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 1"):
        write_run_report(run)


# --- learning curves -------------------------------------------------------------------------------------


def test_smoothing_is_a_centred_mean_with_its_spread() -> None:
    mean, std = smooth(np.array([0.0, 3.0, 6.0, 0.0]), 3)
    # The windows hold 0 3, then 0 3 6, then 3 6 0, then 6 0.
    np.testing.assert_allclose(mean, [1.5, 3.0, 3.0, 3.0])
    np.testing.assert_allclose(std, [1.5, np.sqrt(6.0), np.sqrt(6.0), 3.0])


@given(st.integers(0, 10_000))
def test_the_window_is_odd_and_bounded(count: int) -> None:
    window = smoothing_window(count)
    assert window % 2 == 1
    assert 1 <= window <= 25


def test_curves_take_steps_tokens_and_values_from_the_metrics(tmp_path: Path) -> None:
    curves = read_curves(write_run(tmp_path / "run", steps=3))
    np.testing.assert_allclose(curves.training.value, [0.01, 0.02, 0.03])
    np.testing.assert_allclose(curves.training.tokens, [1000, 2000, 3000])
    np.testing.assert_allclose(curves.greedy.step, [0, 3])
    np.testing.assert_allclose(curves.greedy.tokens, [0, 3000])


def test_a_step_that_was_done_again_counts_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=2)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "step": 2, "em": 0.5, "sampled_tokens": 2100}\n')
    np.testing.assert_allclose(read_curves(run).training.value, [0.01, 0.5])


def has_colour(path: Path, colour: str) -> bool:
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    pixels = imread(path)[..., :3]
    return bool((np.abs(pixels - wanted).max(axis=-1) < 0.02).any())


def test_the_picture_shows_what_was_measured_and_nothing_else(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    picture = draw_run(run, tmp_path / "curve.png")
    assert imread(picture).shape[:2] == (864, 1280)
    assert has_colour(picture, "#D55E00")  # the greedy evaluations
    only_training = "".join(json.dumps(line) + "\n" for line in metrics(20) if line["kind"] == "train")
    (run / "metrics.jsonl").write_text(only_training, encoding="utf-8")
    assert not has_colour(draw_run(run, tmp_path / "without.png"), "#D55E00")


# --- what is printed -------------------------------------------------------------------------------------


class Clock:
    """Seconds that a test lets pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_stay_few_and_say_how_far_it_is() -> None:
    lines: list[str] = []
    clock = Clock()
    listener = PlainLines(lines.append, every_s=5.0, clock=clock)
    listener.start("train", 100)
    for step in range(100):
        listener.start("rollout", 8)
        clock.now = (step + 1) / 10
        listener.advance("rollout", 8)
        listener.finish("rollout")
        listener.step({"kind": "train", "step": step, "em": 0.5, "reward": -0.25})
        listener.advance("train")
    listener.finish("train")
    assert lines[0] == "train: 0/100"
    assert lines[-1] == "train: 100/100  EM 0.500  reward -0.250  in 10.0 s"
    assert lines[1] == "train: 50/100  EM 0.500  reward -0.250"  # the 50th step ends at 5.0 s
    assert len(lines) == 3  # start, 5 s, end


def test_plain_lines_report_a_long_part_of_a_phase() -> None:
    lines: list[str] = []
    clock = Clock()
    listener = PlainLines(lines.append, every_s=5.0, clock=clock)
    listener.start("train", 2)
    listener.start("evaluate (greedy)", 10)
    clock.now = 7.0
    listener.finish("evaluate (greedy)")
    listener.message("a word [not markup]")
    assert lines[1:] == ["evaluate (greedy): 0/10  in 7.0 s", "a word [not markup]"]


def test_bars_are_for_terminals_only() -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True)
    assert isinstance(make_listener(terminal), LiveBars)
    plain = io.StringIO()
    listener = make_listener(Console(file=plain))
    assert isinstance(listener, PlainLines)
    listener.message("[bold] stays")
    assert plain.getvalue() == "[bold] stays\n"


def test_bars_show_phases_and_their_figures() -> None:
    screen = io.StringIO()
    with contextlib.closing(LiveBars(Console(file=screen, force_terminal=True, width=120))) as bars:
        bars.start("train", 4)
        bars.start("rollout", 8)
        bars.advance("rollout", 8)
        bars.finish("rollout")
        bars.advance("train", loss=0.125)
        bars.step({"em": 0.75})
        bars.advance("nothing of this name")
        bars.message("resumed [x]")
        bars.finish("train")
    shown = screen.getvalue()
    assert "1/4" in shown
    assert "EM 0.750" in shown
    assert "resumed [x]" in shown


def test_figures_and_durations_are_short() -> None:
    assert figures({"em": 0.5, "kind": "train", "loss": None, "entropy": 1}) == "EM 0.500  entropy 1.000"
    assert [duration(s) for s in (4.23, 196.4, 3725.0)] == ["4.2 s", "3 min 16 s", "1 h 02 min"]


def test_the_ending_says_what_came_out_where_it_is_and_what_to_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "runs" / "q")
    screen = io.StringIO()
    summary = {**read_summary(run), "steps": 20, "sampled_em_after": 0.65}
    commands = [("at2po view runs/q", "the trees")]
    print_ending(Console(file=screen, width=100), run, summary, [run / "tree.html"], commands)
    shown = screen.getvalue()
    for text in (
        "0.250",
        "0.750",
        "+0.500",
        "0.650",
        "20 steps · 20,000 sampled tokens · 3 min 16 s wall time",
    ):
        assert text in shown
    assert "Run folder  runs/q\n" in shown
    assert "Look at     runs/q/tree.html\n" in shown
    assert "Try next    at2po view runs/q  the trees\n" in shown


def test_paths_are_shown_as_they_can_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown_path(tmp_path / "runs" / "a") == "runs/a"
    assert shown_path(Path("/")) == "/"


def test_tables_of_evaluations_and_trees() -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=120)
    figures_of = {"questions": 200, "em": 0.5, "em_low": 0.431, "em_high": 0.569, "f1": 0.6, "reward": 0.4}
    broken = {"turns": 2.5, "tokens": 61.2, "failures": {"env_error": 12, "env_timeout": 0, "requests": 3}}
    console.print(evaluation_table({"greedy": {**figures_of, **broken}}))
    console.print(tree_table([TreeRecord(small_tree(), "Who [b]founded[/b] it?")], "trees"))
    shown = screen.getvalue()
    assert "0.431 – 0.569" in shown
    assert "failures: greedy env_error 12, requests 3" in shown
    assert "Who [b]founded[/b] it?" in shown


def test_a_world_is_scored_by_its_own_numbers() -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=120)
    figures = {"questions": 40, "em": None, "em_low": None, "em_high": None, "f1": None, "reward": 0.7}
    reported = {"success": 0.625, "score": 0.71}
    row = {**figures, "turns": 6.0, "tokens": 80.0, "metrics": reported}
    console.print(evaluation_table({"greedy": row}))
    summary = {"sampled_success_before": 0.25, "sampled_success_after": 0.5, "seen_questions": 0}
    console.print(summary_table({**summary, "sampled_em_after": None}))
    shown = screen.getvalue()
    assert "exact match" not in shown
    assert "Exact match" not in shown
    assert "Success on held-out questions" in shown
    for cell in ("0.625", "0.710", "0.700", "0.250", "0.500", "+0.250"):
        assert cell in shown
    assert is_right({"metrics": {"success": 1.0}})
    assert not is_right({"metrics": {"success": 0.0}, "em": 1.0})
    assert is_right({"em": 1.0})


def test_own_rewards_and_numbers_stand_in_the_summary_beside_exact_match() -> None:
    def shown(**summary: Any) -> str:
        screen = io.StringIO()
        Console(file=screen, width=120).print(summary_table({"seen_questions": 0, **summary}))
        return screen.getvalue()

    rewards = {"reward_before": -0.25, "reward_after": 1.5, "sampled_reward_after": 0.125}
    own = shown(**rewards, em_before=None, em_after=None)
    assert "Reward on held-out questions" in own
    assert "xact match" not in own
    assert re.search(r"greedy +│ -0.250 │ 1.500 │ +– │ \+1.750", own)
    both = shown(**rewards, em_before=0.5, em_after=0.75, metrics=["steps"], steps_after=4.5)
    assert "Exact match on held-out questions" in both
    assert re.search(r"reward, sampled +│ +– │ 0.125", both)
    assert re.search(r"steps, greedy +│ +– │ 4.500", both)


def test_a_run_that_scores_rewards_alone_is_drawn_by_them(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    own = [{**one, "em": None, "reward": 3.0} for one in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in own))
    curves = read_curves(run)
    assert curves.score == "Reward"
    assert set(curves.greedy.value) == set(curves.training.value) == {3.0}
    assert draw_run(run, tmp_path / "curve.png").is_file()


@settings(max_examples=20)
@given(st.text(max_size=40), st.text(max_size=40))
def test_any_pair_of_texts_makes_a_page(question: str, action: str) -> None:
    tree = Tree((1,), action, question)
    tree.close(tree.add(0, turn(action)), 0.0, outcome(0.0, action))
    html = tree_page(TreeRecord(tree, question), PageOptions(decode=utf8))
    assert Page(html).names().count("script") == 2
