"""Window transcripts: prompts, trees, training and evaluation with a prompt of its own for each turn."""

import json

import numpy as np
import pytest
import torch
from helpers.chat_samples import tokenizer_of
from helpers.corridor import Corridor
from helpers.guess_env import GuessEnv
from helpers.served_fake import serving

from at2po_agent.agents.agent import build_agent
from at2po_agent.agents.cold_start import record_demonstrations
from at2po_agent.agents.model import ModelShape, build_model
from at2po_agent.config.loading import load_config
from at2po_agent.config.sections import ColdStartConfig
from at2po_agent.evaluation.target import evaluate_policy, evaluation_config, open_policy
from at2po_agent.packing.rows import pack_rows
from at2po_agent.packing.trees import pack_trees
from at2po_agent.policies.hf.policy import HFPolicy
from at2po_agent.policies.scripted import ScriptedPolicy
from at2po_agent.report.curves import draw_run, read_curves
from at2po_agent.rollout import RolloutConfig, rollout
from at2po_agent.run import run_training
from at2po_agent.runs.progress import Progress
from at2po_agent.transcripts.chat import ChatTranscript
from at2po_agent.transcripts.inline import InlineTranscript
from at2po_agent.transcripts.window import WindowConfig, WindowTranscript
from at2po_agent.tree import Tree
from at2po_env.errors import ConfigError

SHAPE = RolloutConfig(
    chains=2, forks=2, rounds=2, max_turn_tokens=12, max_response_tokens=600, max_prompt_tokens=2000
)
ONE = SHAPE.model_copy(update={"chains": 1, "forks": 0, "rounds": 0})
WORLD = {"instructions": "Go out.\n", "observation": "A {turn} sign.", "admissible_commands": ("go", "see")}


class Letters:
    """One id per character."""

    eos_id = 0

    def __len__(self):
        return 1 << 17

    def encode(self, text):
        return [ord(letter) for letter in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


def window(max_tokens=10_000, **options):
    return WindowTranscript(InlineTranscript(Letters()), WindowConfig(**options), max_tokens=max_tokens)


def text(shown):
    assert shown.fresh
    return Letters().decode(shown.ids)


def test_a_prompt_shows_task_last_turns_observation_and_commands():
    transcript = window()
    first = transcript.first("unused", WORLD)
    assert text(first) == "Go out.\nYou are at turn 1. You see:\nA {turn} sign.\nYou can: go | see\n"
    shown = first
    for number, command in enumerate(("go", "see", "jump"), 2):
        info = {"observation": f"Place {number}.", "command": command, "admissible_commands": ()}
        shown = transcript.next(shown, f"<think>?</think>{command}", "framed", info, closed=True)
    assert text(shown) == (
        "Go out.\nThe last 2 of 3 turns:\nTurn 2. You saw: Place 2.\nYou did: see\n"
        "Turn 3. You saw: Place 3.\nYou did: jump\nYou are at turn 4. You see:\nPlace 4.\n"
    )


def test_an_environment_that_tells_nothing_has_its_texts_shown():
    transcript = window(turns=1, memory="actions")
    first = transcript.first("Question: who?", {})
    assert text(first) == "Question: who?\nYou are at turn 1. You see:\nNothing yet.\n"
    second = transcript.next(first, "<search>it</search>", "\nA page.\n", {}, closed=False)
    assert text(second) == (
        "Question: who?\nThe last 1 of 1 turns:\nTurn 1.\nYou did: <search>it</search>\n"
        "You are at turn 2. You see:\nA page.\n"
    )


def test_no_turns_are_shown_where_none_are_wanted():
    transcript = window(turns=0)
    shown = transcript.next(transcript.first("P", {}), "x", "o", {}, closed=False)
    assert text(shown) == "P\nYou are at turn 2. You see:\no\n"


def test_the_models_last_summary_is_shown_again():
    transcript = window(turns=0, memory="summary", template="{task}|{history}|{observation}")
    shown = transcript.first("P", {})
    assert "between <summary>\nand </summary>" in text(shown)
    assert "so far:" not in text(shown)
    shown = transcript.next(
        shown, "<summary> old </summary><summary>I saw A.</summary>go", "o", {}, closed=True
    )
    shown = transcript.next(shown, "<summary>never ends", "o", {}, closed=True)
    assert "Your summary so far: I saw A.\n" in text(shown)


def test_a_prompt_that_is_too_long_loses_old_turns_first_and_then_the_end_of_what_is_seen():
    template = "{task}{history}{observation}{commands}"
    whole = window(template=template, turns=2)
    shown = whole.first("P", {})
    for _ in range(2):
        shown = whole.next(shown, "a" * 30, "o" * 50, {}, closed=True)
    longest = len(shown.ids)
    for limit, past, cut in ((longest, 2, False), (longest - 1, 1, False), (60, 0, False), (40, 0, True)):
        tight = window(template=template, turns=2, max_tokens=limit)
        made = text(tight._write(shown.memory))
        assert len(made) <= limit
        assert made.count("You did") == past
        assert made.endswith(" [cut]") is cut
    assert made == "P" + "o" * 33 + " [cut]"
    assert text(window(template=template, max_tokens=3)._write(shown.memory)) == "P [cut]"


def test_the_windows_own_limit_comes_before_the_rollouts():
    options = {"template": "{task}{history}{observation}{commands}", "turns": 2}
    own = WindowTranscript(InlineTranscript(Letters()), WindowConfig(max_tokens=40, **options), max_tokens=60)
    for transcript, limit in ((own, 40), (window(max_tokens=60, **options), 60)):
        shown = transcript.next(transcript.first("P", {}), "a", "o" * 100, {}, closed=True)
        assert text(shown) == "P" + "o" * (limit - len("P [cut]")) + " [cut]"


def test_a_template_must_show_what_is_seen():
    with pytest.raises(ValueError, match=r"template lacks \{observation\}"):
        WindowConfig(template="{task}")
    with pytest.raises(ConfigError, match=r"window is set, but transcript is inline"):
        load_config("quickstart", ["model.window.turns=3"])


# Trees


def random_policy(transcript_options=None, seed=0):
    tokenizer = tokenizer_of("qwen")
    transcript = WindowTranscript(
        InlineTranscript(tokenizer), WindowConfig(**(transcript_options or {})), max_tokens=2000
    )
    shape = ModelShape(
        vocab_size=len(tokenizer), hidden_size=32, layers=2, heads=2, kv_heads=1, head_dim=16, init_std=0.3
    )
    return HFPolicy(build_model(shape, seed=seed), tokenizer, slots=16, transcript=transcript)


@pytest.fixture(scope="module")
def grown():
    policy = random_policy()
    trees = rollout([{"index": 0}, {"index": 1}], Corridor(), policy, SHAPE, seed=1)
    return policy, trees


def test_each_turn_records_the_prompt_that_the_policy_saw(grown):
    policy, trees = grown
    for tree in trees:
        assert len(tree.leaves()) == 6
        for leaf in tree.leaves():
            path = tree.path(leaf)[1:]
            turns = [tree.turns[node] for node in path]
            assert [turn.prompt_ids is None for turn in turns] == [True, *[False] * (len(path) - 1)]
            assert not any(turn.observation_ids for turn in turns)
            sequences = tree.sequences(leaf)
            assert len(sequences) == len(path)
            assert tree.branch_ids(leaf) == sequences[-1]
            for number, (turn, ids) in enumerate(zip(turns, sequences, strict=True), 1):
                assert tuple(ids[-len(turn.action_ids) :]) == turn.action_ids
                prompt = policy.tokenizer.decode(ids[: -len(turn.action_ids)])
                assert f"You are at turn {number}. You see:" in prompt
                assert prompt.startswith("Open the door.\nTask: leave")
            assert tree.response_tokens(leaf) == sum(len(turn.action_ids) for turn in turns)
    assert max(len(tree.path(leaf)) for tree in trees for leaf in tree.leaves()) == 5


def test_a_tree_with_prompts_goes_through_json(grown):
    for tree in grown[1]:
        again = Tree.from_json(tree.to_json())
        assert again.to_json() == tree.to_json()
        assert again.sequences(tree.leaves()[-1]) == tree.sequences(tree.leaves()[-1])


def test_a_forked_turn_sees_what_its_sibling_saw(grown):
    for tree in grown[1]:
        for node in range(len(tree)):
            inputs = {tree.turns[child].prompt_ids for child in tree.children(node)}
            assert len(inputs) <= 1


def test_a_recorded_prompt_that_was_not_sent_is_refused(grown):
    tree = grown[1][0]
    turn = next(turn for turn in tree.turns if turn is not None and turn.prompt_ids is not None)
    with pytest.raises(ValueError, match="token in, token out is broken"):
        Tree(tree.prompt_ids).add(0, turn, prefix_ids=turn.prompt_ids[:-1])


def test_a_prompt_beyond_the_limit_ends_its_branch():
    policy = ScriptedPolicy(lambda _: "forward", tokenizer_of("qwen"))
    config = WindowConfig(template="{task}{history}{observation}", memory="actions", turns=9)
    policy.transcript = WindowTranscript(InlineTranscript(policy.tokenizer), config, max_tokens=2000)
    (free,) = rollout([{"index": 1}], Corridor(), policy, ONE, seed=0)
    longest = max(len(turn.prompt_ids) for turn in free.turns[2:])
    tight = ONE.model_copy(update={"max_prompt_tokens": longest - 1})
    (tree,) = rollout([{"index": 1}], Corridor(), policy, tight, seed=0)
    (leaf,) = tree.leaves()
    assert tree.outcomes[leaf]["outcome"] == "length"
    assert "longer than" in tree.outcomes[leaf]["reason"]
    assert len(tree) == len(free) - 1


def test_environments_without_parts_play_too():
    policy = ScriptedPolicy(["1", "9", "5", "7"], tokenizer_of("qwen"))
    policy.transcript = WindowTranscript(InlineTranscript(policy.tokenizer), WindowConfig(), max_tokens=2000)
    (tree,) = rollout([{"index": 7}], GuessEnv(), policy, ONE, seed=0)
    (leaf,) = tree.leaves()
    assert tree.outcomes[leaf]["em"] == 1.0
    last = policy.tokenizer.decode(tree.turns[leaf].prompt_ids)
    assert "Turn 2. You saw: higher\nYou did: 9\n" in last
    assert last.endswith("You are at turn 4. You see:\nhigher\n")


# Training


def separate_log_probs(model, branch):
    """Log-probs of a branch's tokens by one plain forward pass per sequence, as a reference."""
    found = []
    for ids in branch.sequences:
        logits = model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0]
        chosen = logits.log_softmax(-1)[:-1].gather(1, torch.from_numpy(ids)[1:, None])[:, 0]
        found.append(torch.nn.functional.pad(chosen, (1, 0)))
    return torch.cat(found)


@pytest.mark.parametrize("budget", [100_000, 700, 1])
def test_packed_turns_have_the_gradient_of_one_pass_per_prompt(grown, budget):
    policy, trees = grown
    model = policy.model
    rng = np.random.default_rng(0)
    advantages = [rng.standard_normal((len(tree.leaves()), len(tree))) for tree in trees]
    batch = pack_trees(trees, advantages)
    assert batch.unique_tokens < batch.flattened_tokens

    expected = torch.zeros(())
    for branch in batch.branches:
        trained = torch.from_numpy(branch.turn_ids >= 0)
        weights = torch.from_numpy(branch.advantages)
        expected = expected + (separate_log_probs(model, branch) * weights)[trained].sum()
    wanted = torch.autograd.grad(expected, list(model.parameters()))

    model.zero_grad()
    total, seen, tokens = 0.0, [], 0
    with batch.attention(model):
        for order, pack in batch.micro_batches(budget):
            log_probs = pack.log_probs(model)
            value = (log_probs * pack.advantages).sum()
            value.backward()
            total += float(value.detach())
            seen += order.tolist()
            tokens += pack.input_ids.numel()
    assert sorted(seen) == list(range(len(batch.branches)))
    assert total == pytest.approx(float(expected.detach()), rel=1e-5)
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=2e-4, atol=2e-4)
    if budget == 100_000:  # what prompts have in common is computed once
        assert tokens <= batch.unique_tokens < 0.7 * batch.flattened_tokens
    model.zero_grad()


def test_log_probs_of_packed_turns_are_those_that_were_sampled(grown):
    policy, trees = grown
    batch = pack_trees(trees, [np.ones(len(tree)) for tree in trees])
    with torch.no_grad(), batch.attention(policy.model):
        for _, pack in batch.micro_batches(100_000):
            found = pack.log_probs(policy.model)
            trained = pack.turn_ids >= 0
            torch.testing.assert_close(found[trained], pack.sampled_log_probs[trained], rtol=1e-3, atol=1e-3)


def test_turn_ids_count_the_turns_of_the_branch(grown):
    _, trees = grown
    batch = pack_trees(trees, [np.ones(len(tree)) for tree in trees])
    branches = iter(batch.branches)
    for tree in trees:
        for leaf in tree.leaves():
            branch = next(branches)
            turns = [tree.turns[node] for node in tree.path(leaf)[1:]]
            found = branch.ids[branch.turn_ids >= 0].tolist()
            assert found == [token for turn in turns for token in turn.action_ids]
            assert branch.turn_ids.max() == len(turns) - 1
            assert len(branch.starts) == len(turns)


def test_sequences_are_limited_one_by_one(grown):
    _, trees = grown
    ones = [np.ones(len(tree)) for tree in trees]
    longest = max(len(ids) for tree in trees for leaf in tree.leaves() for ids in tree.sequences(leaf))
    pack_trees(trees, ones, max_length=longest)
    with pytest.raises(ValueError, match=f"the longest has {longest} tokens"):
        pack_trees(trees, ones, max_length=longest - 1)
    cut = pack_trees(trees, ones, max_length=longest - 1, overflow="truncate")
    assert all(branch.longest <= longest - 1 for branch in cut.branches)
    whole = pack_trees(trees, ones)
    lost = sum(len(branch.ids) for branch in whole.branches) - sum(len(branch.ids) for branch in cut.branches)
    assert lost == sum(
        len(ids) == longest for tree in trees for leaf in tree.leaves() for ids in tree.sequences(leaf)
    )


def test_rows_refuse_turns_with_prompts_of_their_own(grown):
    _, trees = grown
    with pytest.raises(ConfigError, match=r"Fix: train\.packing=tree"):
        pack_rows(trees, [np.ones(len(tree)) for tree in trees])


# The whole agent

TINY = [
    *("env.id=at2po-test/Corridor-v0", "env.kwargs={}", "eval.kwargs={}", "eval.questions=2", "eval.every=0"),
    *("model.layers=1", "model.hidden_size=32", "model.ffn_size=32", "run.threads=1", "cold_start.steps=0"),
    *("rollout.chains=2", "rollout.forks=1", "rollout.rounds=1", "rollout.max_turn_tokens=8"),
    *("train.steps=2", "train.questions=2", "train.minibatch_questions=1", "model.transcript=window"),
]


@pytest.fixture(scope="module", params=["inline", "chat"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    extra = ["model.chat.template=chatml"] if request.param == "chat" else []
    options = [*TINY, *extra, f"model.window.written_as={request.param}", f"run.dir={folder}"]
    config = load_config("quickstart", options)
    config = config.model_copy(
        update={
            "env": config.env.model_copy(update={"kwargs": {}}),
            "eval": config.eval.model_copy(update={"kwargs": {}}),
        }
    )
    return request.param, folder, run_training(config)


def test_a_run_trains_on_windows(run):
    written, folder, summary = run
    assert summary["steps"] == 2
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert [step["trained_questions"] for step in steps] == [2, 2]
    for moment in ("before", "after"):
        low, high = summary[f"sampled_success_low_{moment}"], summary[f"sampled_success_high_{moment}"]
        assert 0 <= low <= summary[f"sampled_success_{moment}"] <= high <= 1
    evaluations = [line for line in lines if line["kind"] == "eval"]
    assert evaluations[-1]["metrics"]["success"] == summary["sampled_success_after"]
    assert read_curves(folder).score == "Success"
    assert (folder / "learning_curve.png").exists() or draw_run(folder, folder / "curve.png").exists()
    # The learner's log-probs of each turn are those that the sampler saw, prompt by prompt.
    assert all(step["mismatch/max_difference"] < 1e-4 for step in steps)
    agent = build_agent(evaluation_config(str(folder), []))
    assert isinstance(agent.policy.transcript, WindowTranscript)
    opening = agent.tokenizer.decode(agent.policy.transcript.first("P", {}).ids)
    assert opening.startswith("<|im_start|>user\nP\n" if written == "chat" else "P\n")


def test_demonstrations_are_one_per_turn(run):
    def script(task, *, rng):
        del task, rng
        yield "forward"
        yield "forward"
        yield "open door"

    agent = build_agent(evaluation_config(str(run[1]), []))
    transcript = agent.policy.transcript
    (*shown,) = record_demonstrations(
        Corridor(tasks=[{"id": "far", "question": "leave", "golden_answers": ["x"]}]),
        agent.tokenizer,
        ColdStartConfig(demonstrations=1),
        rng=np.random.default_rng(0),
        script=script,
        transcript=transcript,
    )
    assert len(shown) == 3
    texts = [agent.tokenizer.decode(one.ids[one.trained].tolist()) for one in shown]
    marks = agent.tokenizer.decode([agent.tokenizer.eos_id])
    assert [one.removesuffix(marks) for one in texts] == ["forward", "forward", "open door"]
    assert "You are at turn 3." in agent.tokenizer.decode(shown[2].ids[~shown[2].trained].tolist())


def test_a_served_model_is_sent_one_message_a_turn():
    def answer(seen):
        del seen
        message = {"role": "assistant", "content": "<action>forward</action>"}
        return {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {}}

    with serving(answer) as server:
        config = load_config(
            "quickstart",
            [*TINY, f"served.url={server.url}", "served.logprobs=false", "eval.questions=1"],
        )
        config = config.model_copy(update={"eval": config.eval.model_copy(update={"kwargs": {}})})
        config = config.model_copy(update={"env": config.env.model_copy(update={"kwargs": {}})})
        with open_policy(config) as policy:
            figures = evaluate_policy(config, policy, Progress())
    asked = [seen.body["messages"] for seen in server.seen if "messages" in seen.body]
    assert len(asked) == 4
    assert all([message["role"] for message in messages] == ["user"] for messages in asked)
    assert "Turn 2. You saw:" in asked[2][0]["content"]
    assert next(iter(figures.values()))["outcomes"] == {"limit": 1}


def test_a_template_that_rewrites_earlier_messages_will_do_for_single_messages():
    rewriting = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% if message.role == 'assistant' and not loop.last %}gone{% else %}{{ message.content }}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = tokenizer_of("qwen", rewriting)
    with pytest.raises(ConfigError, match="does not preserve prefixes"):
        ChatTranscript(tokenizer)
    transcript = ChatTranscript(tokenizer, growing=False)
    decoded = transcript.tokenizer.decode(transcript.open("P"))
    assert decoded == "<|im_start|>user\nP<|im_end|>\n<|im_start|>assistant\n"
