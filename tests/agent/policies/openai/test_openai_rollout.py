"""Episodes, trees and pages with a served model: nothing but the policy and its transcript is new."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from helpers.served_fake import Reply, Seen, chat, chat_log_probs, completion, error, serving, tool_call

import at2po_env
from at2po_agent.evaluation.evaluate import evaluate
from at2po_agent.policies.openai import OpenAIPolicy
from at2po_agent.policies.openai.client import Server
from at2po_agent.policies.openai.messages import Dialect
from at2po_agent.report.run_folder import TreeRecord
from at2po_agent.report.tree_page import PageOptions, write_tree_page
from at2po_agent.rollout import RolloutConfig, rollout
from at2po_agent.tree import Tree
from at2po_env.data import At2poSampleWarning

ONE = RolloutConfig(chains=1, rounds=0, max_response_tokens=40_000, max_prompt_tokens=10_000)
SEARCH = "<think> Who? </think><search> Seven Samurai </search>"
ANSWER = "<think> There. </think><answer> \\boxed{ Tokyo } </answer>"
QUESTION = {"index": 0}  # In which city was the director of Seven Samurai born?


@pytest.fixture
def env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[gymnasium.Env[str, str]]:
    monkeypatch.setenv("AT2PO_CACHE", str(tmp_path / "cache"))
    with pytest.warns(At2poSampleWarning):
        made = gymnasium.make("at2po/HotpotQA-v0", disable_env_checker=True)
    yield made
    made.close()


def stripped(action: str, *, told: bool) -> dict[str, Any]:
    """An answer without its stop string, as servers give it; told: they say which one it was."""
    stop = "</search>" if "<search>" in action else "</answer>"
    return {"text": action.removesuffix(stop), **({"stop_reason": stop} if told else {})}


def texts_of(tree: Tree) -> list[str]:
    """Actions and observations of the first branch."""
    turns = [tree.turns[node] for node in tree.path(tree.leaves()[0])[1:]]
    return [part for turn in turns if turn is not None for part in (turn.observation, turn.action)][1:]


@pytest.mark.parametrize("told", [True, False])
def test_a_chat_searches_reads_and_answers(env: gymnasium.Env[str, str], told: bool) -> None:
    def model(seen: Seen) -> Any:
        parts = stripped(SEARCH if len(seen.body["messages"]) == 1 else ANSWER, told=told)
        return chat(parts.pop("text"), **parts)

    with serving(model) as fake, OpenAIPolicy(fake.url, "tiny") as policy:
        (tree,) = rollout([QUESTION], env, policy, ONE, seed=0)
    prompt, info = env.reset(options=QUESTION)
    search, observation, answer = texts_of(tree)
    assert (search, answer) == (SEARCH, ANSWER)
    assert tree.outcomes[-1] is not None
    assert (tree.outcomes[-1]["em"], tree.leaf_reward[-1]) == (1.0, 1.0)
    first, second = fake.bodies
    assert first["messages"] == [{"role": "user", "content": prompt}]
    assert first["stop"] == list(info["stop"])
    assert second["messages"] == [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": SEARCH},
        {"role": "user", "content": observation},
    ]
    assert "Akira Kurosawa" in observation


def test_a_completion_is_sent_the_running_text(env: gymnasium.Env[str, str]) -> None:
    def model(seen: Seen) -> Any:
        action = SEARCH if "</result>" not in seen.body["prompt"].split("Question:")[1] else ANSWER
        parts = stripped(action, told=True)
        return completion(parts["text"], stop_reason=parts["stop_reason"])

    dialect = Dialect("completions")
    with serving(model) as fake, OpenAIPolicy(fake.url, "tiny", dialect=dialect) as policy:
        (tree,) = rollout([QUESTION], env, policy, ONE, seed=0)
        unnamed = rollout([QUESTION], env, policy, ONE, seed=0)  # inline is also what None means
    assert unnamed[0].to_json() == tree.to_json()
    prompt, _ = env.reset(options=QUESTION)
    search, observation, _ = texts_of(tree)
    assert [body["prompt"] for body in fake.bodies[:2]] == [prompt, prompt + search + observation]
    assert tree.leaf_reward[-1] == 1.0


def test_native_tool_calls_are_hermes_actions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AT2PO_CACHE", str(tmp_path / "cache"))
    with pytest.warns(At2poSampleWarning):
        env = gymnasium.make("at2po/HotpotQA-v0", protocol="hermes", disable_env_checker=True)

    def model(seen: Seen) -> Any:
        if seen.body["messages"][-1]["role"] == "tool":
            return chat(ANSWER.removesuffix("</answer>"), stop_reason="</answer>")
        call = tool_call("search", '{"query": "Seven Samurai"}')
        return chat(None, finish="tool_calls", message={"reasoning": "Who?", "tool_calls": [call]})

    tools = env.get_wrapper_attr("tool_schemas")
    with serving(model) as fake, OpenAIPolicy(fake.url, "tiny", dialect=Dialect(tools=tools)) as policy:
        (tree,) = rollout([QUESTION], env, policy, ONE, seed=0)
    search, observation, _ = texts_of(tree)
    parsed = at2po_env.HermesProtocol().parse(search)
    assert parsed == at2po_env.ToolCall("search", {"query": "Seven Samurai"}, "Who?")
    assert tree.leaf_reward[-1] == 1.0
    assert fake.bodies[0]["tools"] == tools
    assert fake.bodies[0]["stop"] == ["</answer>"]
    asked, result = fake.bodies[1]["messages"][1:]
    (call,) = asked["tool_calls"]
    assert (asked["content"], json.loads(call["function"]["arguments"])) == ("", {"query": "Seven Samurai"})
    assert (result["role"], result["tool_call_id"]) == ("tool", call["id"])
    assert f"<tool_response>\n{result['content']}\n</tool_response>" == observation.strip()


def test_trees_grow_fork_and_are_shown(env: gymnasium.Env[str, str], tmp_path: Path) -> None:
    def model(seen: Seen) -> Any:
        searched = len(seen.body["messages"]) > 1
        action = ANSWER if searched else SEARCH
        sure = chat_log_probs((action, -0.1 if searched else -2.0))
        return chat(action, logprobs=sure, stop_reason=None)

    shape = ONE.model_copy(update={"chains": 2, "rounds": 1, "forks": 2})
    with serving(model) as fake, OpenAIPolicy(fake.url, "tiny") as policy:
        (tree,) = rollout([QUESTION], env, policy, shape, seed=0)
    assert len(tree.leaves()) == 4
    assert sorted(set(tree.entropy.tolist()[1:])) == pytest.approx([0.1, 2.0])  # nats a token, not a byte
    again = Tree.from_json(tree.to_json())
    page = write_tree_page(tmp_path / "tree.html", TreeRecord(again), PageOptions(chains=2, forks=2))
    assert "Seven Samurai" in page.read_text(encoding="utf-8")


def test_a_server_that_fails_now_and_then_costs_those_branches_only(env: gymnasium.Env[str, str]) -> None:
    def model(seen: Seen) -> Any:
        if "Seven Samurai" in seen.body["messages"][0]["content"]:
            return Reply(error("out of memory"), status=500)
        return chat(ANSWER)

    tasks = [{"index": index} for index in range(4)]
    with (
        serving(model) as fake,
        OpenAIPolicy(Server(fake.url, retries=1, backoff_s=0.001), "tiny") as policy,
    ):
        figures, trees = evaluate(tasks, env, policy, ONE, seed=0)
    assert figures.outcomes == {"abort": 1, "answer": 3}
    assert trees[0].outcomes[-1] is not None
    assert trees[0].outcomes[-1]["outcome"] == "abort"
    assert policy.stats.reasons == {"status 500": 1}
    assert (figures.questions, figures.tokens) == (4, 0.0)  # no log-probs: nothing counts as sampled


def test_episodes_do_not_depend_on_concurrency(env: gymnasium.Env[str, str]) -> None:
    def model(seen: Seen) -> Any:
        written = sum(message["role"] == "assistant" for message in seen.body["messages"])
        return chat(SEARCH if written < seen.body["seed"] % 3 else ANSWER)

    shape = ONE.model_copy(update={"chains": 3, "rounds": 1, "forks": 2})
    trees = []
    for concurrency in (1, 8):
        with serving(model) as fake, OpenAIPolicy(fake.url, "tiny", concurrency=concurrency) as policy:
            trees.append(rollout([QUESTION], env, policy, shape, seed=3)[0])
    assert trees[0].to_json() == trees[1].to_json()
