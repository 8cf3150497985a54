"""Scoring: literals derived by hand, with the derivation, and for each rule what must not pass."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from at2po_env.errors import ConfigError
from at2po_env.scoring import (
    exact_match,
    extract_answer,
    extract_boxed,
    format_fault,
    normalize_answer,
    reward_rule,
    score_response,
    score_structured,
    structure_fault,
    token_f1,
)

THINK = "<think>t</think>"
CALL = "<search>q</search><result>r</result>"
GOOD = THINK + CALL + THINK + r"<answer>It is \boxed{The Eiffel Tower}.</answer>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Eiffel Tower", "eiffel tower"),
        ("  A  man,\ta PLAN\n", "man plan"),
        ("U.S.A.", "usa"),
        ("O'Brien & Sons", "obrien sons"),
        ("the", ""),
        ("", ""),
        ("theatre analysis an-atomy", "theatre analysis anatomy"),
        # Punctuation goes first: "the-end" becomes one word, whose "the" is no word of its own any more.
        ("the-end", "theend"),
        # Lower case goes first too, or "The" and "AN" would stay.
        ("AN Apple", "apple"),
        ("A.", ""),
        # Only ASCII punctuation is dropped; what is no letter still bounds a word: articles leave a space.
        ("«the» café", "« » café"),
        ("l’a b", "l’ b"),
        ("ÉCOLE Straße İ", "école straße i̇"),
        ("東京 の a", "東京 の"),
        ("1,000", "1000"),
    ],
)
def test_normalisation(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


def test_normalisation_of_a_long_text_is_the_same_rule() -> None:
    assert normalize_answer("The x! " * 100) == " ".join(["x"] * 100)


@pytest.mark.parametrize(
    ("prediction", "golds", "em"),
    [
        ("the Eiffel tower!", ["Eiffel Tower"], 1.0),
        ("Paris", ["London", "paris."], 1.0),
        ("Paris, France", ["Paris"], 0.0),
        ("Paris", [], 0.0),
        ("", ["Paris"], 0.0),
        ("Paris", "Paris", 1.0),
        ("P", "Paris", 0.0),
        ("东京", ["東京"], 0.0),
        ("café", ["cafe"], 0.0),
    ],
)
def test_exact_match(prediction: str, golds: list[str] | str, em: float) -> None:
    assert exact_match(prediction, golds) == em


@pytest.mark.parametrize(
    ("prediction", "golds", "f1"),
    [
        # 1 shared of 2 and of 1: 2 * 1 / 3
        ("Paris France", ["Paris"], 2 / 3),
        # multisets: "a b b" shares b once with "b c": 2 * 1 / (2 + 2) after "a" is dropped
        ("a b b", ["b c"], 0.5),
        # as sets it would be 2 * 1 / 2 = 1
        ("new york new york", ["New York"], 2 * 2 / 6),
        ("Paris", ["London", "Paris Texas"], 2 / 3),
        ("Paris", [], 0.0),
        ("Paris", ["London"], 0.0),
        # yes, no and noanswer count only when both sides are equal; the plain F1 would be 2 / 3
        ("yes it", ["yes"], 0.0),
        ("yes", ["yes it"], 0.0),
        ("no", ["no", "x"], 1.0),
        ("yes", ["no"], 0.0),
        ("noanswer at", ["noanswer"], 0.0),
        # the rule is about the whole answer, not about a token of it
        ("yes minister", ["yes prime minister"], 2 * 2 / 5),
        # nothing left on both sides: no token is shared
        ("the", ["a"], 0.0),
        ("", ["Paris"], 0.0),
    ],
)
def test_token_f1(prediction: str, golds: list[str], f1: float) -> None:
    assert token_f1(prediction, golds) == pytest.approx(f1, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{x}", "x"),
        (r"\boxed{ x y }", "x y"),
        (r"\boxed{a} then \boxed{b}", "b"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{{a}{b{c}}} }", "{a}{b{c}}"),
        (r"\boxed{}", ""),
        (r"\boxed{a\boxed{b}}", "b"),
        (r"\boxed{a", None),
        (r"\boxed{a} \boxed{b", None),
        (r"\boxed a", None),
        ("boxed{a}", None),
        # what a prompt that is no raw string makes of it: a backspace
        ("\boxed{a}", None),
    ],
)
def test_the_last_box_with_balanced_braces_counts(text: str, expected: str | None) -> None:
    assert extract_boxed(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer> x </answer>", "x"),
        ("<answer>x</answer><answer>y</answer>", "x"),
        ("<answer>a<answer>b</answer>", "b"),
        ("</answer><answer>x</answer>", "x"),
        ("<answer>x", None),
        ("x</answer>", None),
        ("", None),
        ("<answer></answer>", ""),
    ],
)
def test_the_first_completed_answer_counts(text: str, expected: str | None) -> None:
    assert extract_answer(text) == expected


def test_a_good_response_gets_its_exact_match() -> None:
    assert score_response(GOOD, ["Eiffel tower"]) == (1.0, 1.0, 1.0, "The Eiffel Tower", "correct")
    # "eiffel tower" and "big tower" share 1 of 2 and 2 tokens
    assert score_response(GOOD, ["Big Tower"]) == (0.0, 0.0, 0.5, "The Eiffel Tower", "wrong answer")
    assert score_response(GOOD, []) == (0.0, 0.0, 0.0, "The Eiffel Tower", "wrong answer")


ANSWER = r"<answer>\boxed{x}</answer>"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "0 <think> and 0 </think>"),
        (ANSWER, "0 <think> and 0 </think>"),
        ("<think>t" + ANSWER, "1 <think> and 0 </think>"),
        (THINK + "</think>" + ANSWER, "1 <think> and 2 </think>"),
        (THINK, "0 <answer> and 0 </answer>"),
        (THINK + r"<answer>\boxed{x}", "1 <answer> and 0 </answer>"),
        (THINK + ANSWER + ANSWER, "2 <answer> and 2 </answer>"),
        (THINK + "<answer>" + ANSWER, "2 <answer> and 1 </answer>"),
        (THINK + r"</answer>\boxed{x}<answer>", "</answer> before <answer>"),
        (THINK + "<search>q" + ANSWER, "<search> number 1 is not followed by </search>"),
        (THINK + "<search>q</search>" + ANSWER, "<search> number 1 is not followed by <result>"),
        (THINK + "<search>q</search><result>r" + ANSWER, "<search> number 1 is not followed by </result>"),
        (THINK + "<search><result>q</search>r</result>" + ANSWER, "<search> number 1: <result> comes before"),
        (THINK + CALL + "<search>p</search>" + ANSWER, "<search> number 2 is not followed by <result>"),
        (THINK + CALL + "<search>p<search>q</search>" + ANSWER, "<search> number 2 is not followed by"),
        (THINK + "<python>1</python>" + ANSWER, "<python> number 1 is not followed by <result>"),
        (THINK + "<answer>x</answer>", "no \\boxed{...}"),
        (THINK + r"\boxed{x}<answer>x</answer>", "no \\boxed{...}"),
        (THINK + r"<answer>\boxed{x</answer>}", "no \\boxed{...}"),
        (THINK + r"<answer>\boxed{{x}</answer>", "braces"),
    ],
)
def test_a_wrong_format_costs_one_and_is_named(text: str, reason: str) -> None:
    scored = score_response(text, ["x"])
    assert scored.reward == -1.0
    assert scored.reason.startswith("bad format: ")
    assert reason in scored.reason


@pytest.mark.parametrize(
    "text",
    [
        THINK + ANSWER,
        ANSWER + THINK,
        "</think><think>" + ANSWER,
        THINK * 3 + CALL * 2 + THINK + "words" + ANSWER + "more words",
        "<think><search>q</search><result>r</result></think>" + ANSWER,
        THINK + "<result>a result nobody asked for</result>" + ANSWER,
        THINK + "<search>p<search>q</search><result>r</result>" + ANSWER,
        THINK + "<python>1</python><result>1</result>" + ANSWER,
        THINK + "<lookup>a tag of no tool</lookup>" + ANSWER,
        THINK + r"<answer>so \boxed{\text{x}} }</answer>",
    ],
)
def test_formats_that_the_rule_allows(text: str) -> None:
    assert format_fault(text) is None
    assert score_response(text, ["x", r"\text{x}"]).reward == 1.0


def test_em_and_f1_are_those_of_the_answer_whatever_the_format() -> None:
    scored = score_response(r"<answer>\boxed{x}</answer>", ["x"])
    assert scored[:4] == (-1.0, 1.0, 1.0, "x")
    assert score_response("no answer at all", ["x"])[:4] == (-1.0, 0.0, 0.0, None)
    assert score_response(THINK + r"<answer>\boxed{}</answer>", ["x"])[:4] == (0.0, 0.0, 0.0, "")


def test_the_format_rule_follows_the_tools_of_the_protocol() -> None:
    text = THINK + "<shop>tea</shop><information>ok</information>" + ANSWER
    assert score_response(text, ["x"], call_tags={"shop": "information"}).reward == 1.0
    assert score_response(text, ["x"], call_tags={"shop": "result"}).reward == -1.0


def test_a_tagged_answer_is_scored_without_a_format_term() -> None:
    text = "<search>q</search>whatever<answer> The X </answer>"
    assert score_response(text, ["x"], answer_format="tag") == (1.0, 1.0, 1.0, "The X", "correct")
    assert score_response(text, ["y"], answer_format="tag").reward == 0.0
    assert score_response(text, ["x"]).reward == -1.0
    none = score_response("the answer is x", ["x"], answer_format="tag")
    assert none == (0.0, 0.0, 0.0, None, "no answer: no <answer>...</answer>")
    # a box is nothing special here: "boxedx" is not "x"
    assert score_response(ANSWER, ["x"], answer_format="tag").em == 0.0


INFO = "<search>q</search><information>Doc 1(Title: t) <b></information>"


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (THINK + INFO + THINK + "<answer>x</answer>", 1.0),
        (f"\n{THINK}\n\n<answer>x</answer>\n", 1.0),
        (INFO + THINK + "<answer>x</answer>", 0.8),
        (THINK + INFO + THINK + "<answer>y</answer>", 0.2),
        ("<answer>y</answer>", 0.1),
        (THINK + "<answer> </answer>", 0.2),
        ("<answer> </answer>", 0.0),
        (THINK + INFO, 0.0),
        ("", 0.0),
    ],
)
def test_tree_grpo_reward(text: str, reward: float) -> None:
    assert score_structured(text, ["x"]).reward == reward
    assert score_response(text, ["x"], answer_format="structured") == score_structured(text, ["x"])


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "does not end with an answer"),
        ("<answer>x</answer>", "<answer> where <think> was expected"),
        (THINK + "words<answer>x</answer>", "text outside the tags before <answer>"),
        (THINK + "<answer>x</answer>words", "text after the answer"),
        (THINK + "<answer>x</answer>" + THINK, "<think> where the end was expected"),
        (THINK + "<search>q</search>" + THINK, "<think> where <information> was expected"),
        (THINK + "<search><think></search>", "<think> inside <search>"),
        (THINK + INFO + "<answer>x</answer>", "<answer> where <think> was expected"),
        ("<think>t", "<think> is not closed"),
        ("</think>", "</think> where <think> was expected"),
        (THINK + THINK, "<think> where <answer> or <search> was expected"),
    ],
)
def test_structure_faults_are_named(text: str, fault: str) -> None:
    assert fault in str(structure_fault(text))


def test_rules_by_name() -> None:
    for name in ("boxed", "at2po"):
        assert reward_rule(name)(GOOD, ["Eiffel Tower"]).reward == 1.0
        assert reward_rule(name)(ANSWER, ["x"]).reward == -1.0
    for name in ("tag", "search_r1"):
        assert reward_rule(name)("<answer>x</answer>", ["x"]).reward == 1.0
    for name in ("structured", "tree_grpo"):
        assert reward_rule(name)("<answer>x</answer>", ["x"]).reward == 0.8
    with pytest.raises(ConfigError, match="unknown reward rule 'bleu': expected one of boxed"):
        reward_rule("bleu")
    with pytest.raises(ConfigError, match="unknown answer_format 'xml'"):
        score_response(GOOD, ["x"], answer_format="xml")


_TEXT = st.lists(
    st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "<search>", "</search>", "<result>"])
    | st.sampled_from(["</result>", "<information>", "</information>", r"\boxed{", "{", "}", "x", "\ud800"])
    | st.text(max_size=3),
    max_size=14,
).map("".join)  # fmt: skip


@settings(max_examples=1000, deadline=None, database=None)
@given(text=_TEXT, golds=st.lists(st.text(max_size=5), max_size=2))
def test_any_response_is_scored_within_bounds(text: str, golds: list[str]) -> None:
    for answer_format, rewards in (("boxed", {-1.0, 0.0, 1.0}), ("tag", {0.0, 1.0})):
        scored = score_response(text, golds, answer_format=answer_format)
        assert scored.reward in rewards
        assert scored.em in (0.0, 1.0)
        assert 0.0 <= scored.f1 <= 1.0
        assert scored.reason
        assert scored.reward == scored.em or scored.reason.startswith("bad format")
    assert score_structured(text, golds).reward in {0.0, 0.1, 0.2, 0.8, 1.0}


@pytest.mark.parametrize(
    "unit", ["<search></search><result></result>", "<answer>", "</answer><think>", r"\boxed{", "{}", "a "]
)
def test_a_megabyte_is_scored_in_linear_time(unit: str) -> None:
    text = THINK + "<answer>" + unit * (1_000_000 // len(unit)) + "</answer>"
    start = time.process_time()
    for answer_format in ("boxed", "tag", "structured"):
        score_response(text, ["a b"], answer_format=answer_format)
    assert time.process_time() - start < 2.0
