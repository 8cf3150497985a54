"""Chats through the whole agent: rollouts, demonstrations, training, evaluation, checkpoints."""

import json
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from helpers.chat_samples import tokenizer_of
from helpers.guess_env import GuessEnv

import at2po_env  # noqa: F401  registers the ids
from at2po_agent.agents.agent import build_agent
from at2po_agent.agents.cold_start import record_demonstrations
from at2po_agent.agents.expert import ExpertConfig, demonstrate
from at2po_agent.agents.model import ModelShape, build_model
from at2po_agent.config.loading import load_config
from at2po_agent.config.sections import ColdStartConfig
from at2po_agent.evaluation.evaluate import evaluate
from at2po_agent.evaluation.target import evaluate_policy, evaluation_config, open_policy
from at2po_agent.packing.rows import pack_rows
from at2po_agent.policies.base import Request, transcript_of
from at2po_agent.policies.hf.policy import HFPolicy
from at2po_agent.policies.scripted import ScriptedPolicy
from at2po_agent.rollout import RolloutConfig, rollout
from at2po_agent.run import run_training
from at2po_agent.runs.progress import Progress
from at2po_agent.transcripts.chat import ChatTranscript
from at2po_agent.transcripts.inline import InlineTranscript
from at2po_agent.tree import Tree
from at2po_agent.types import Generation
from at2po_env.errors import ConfigError

SHAPE = RolloutConfig(
    chains=2, forks=2, rounds=1, max_turn_tokens=12, max_response_tokens=600, max_prompt_tokens=200
)
CHAT = ["model.transcript=chat", "model.chat.template=chatml"]
TINY = [
    *("env.kwargs.worlds=2", "eval.kwargs.worlds=1", "eval.questions=4", "eval.every=0"),
    *("model.layers=1", "model.hidden_size=32", "model.ffn_size=32", "run.threads=1"),
    *("cold_start.steps=2", "cold_start.batch_size=2", "cold_start.demonstrations=4"),
    *("rollout.chains=2", "rollout.forks=1", "rollout.rounds=1", "rollout.max_turn_tokens=8"),
    *("train.steps=1", "train.questions=2", "train.minibatch_questions=1", "cold_start.env_kwargs.worlds=2"),
]


class FreeEnv(GuessEnv):
    """Takes any text for a guess and says how long it was; ends after four turns. No stop strings."""

    def reset(self, *, seed=None, options=None):
        prompt, info = super().reset(seed=seed, options=options)
        return prompt, {**info, "stop": ()}

    def step(self, action):
        (digit, turn) = self._state
        self._state = (digit, turn + 1)
        scores = {"em": float(str(digit) in action), "f1": 0.0, "answer": action, "outcome": "answer"}
        if turn == 3:
            return "", float(len(action) % 2), True, False, scores
        return f" {len(action)} letters\n", 0.0, False, False, {"outcome": "tool"}


@pytest.fixture(scope="module", params=["chatml", "qwen3-preserving", "llama3"])
def transcript(request):
    return ChatTranscript(
        tokenizer_of("llama" if request.param == "llama3" else "qwen"),
        template=request.param,
        system="Guess.",
        observation_role="tool" if request.param == "qwen3-preserving" else "user",
    )


def random_policy(transcript, seed=0):
    tokenizer = transcript.tokenizer
    shape = ModelShape(
        vocab_size=len(tokenizer), hidden_size=32, layers=1, heads=2, kv_heads=1, head_dim=16, init_std=0.3
    )
    model = build_model(shape, seed=seed, eos_id=tokenizer.eos_id)
    with torch.no_grad():  # so that some actions end by themselves and some are cut
        model.get_input_embeddings().weight[tokenizer.eos_id] *= 2.0
    return HFPolicy(model, tokenizer, slots=16, transcript=transcript)


def conversation(tree, leaf):
    listed = [{"role": "system", "content": "Guess."}, {"role": "user", "content": tree.prompt}]
    for node in tree.path(leaf)[1:]:
        turn = tree.turns[node]
        if node != tree.path(leaf)[1]:
            listed.append({"role": "observation", "content": turn.observation})
        listed.append({"role": "assistant", "content": turn.action})
    return listed


def rendered(transcript, tree, leaf):
    """The text that the template makes of a branch, up to the end of its last action."""
    role = transcript._renderer.role
    messages = [
        {**message, "role": role if message["role"] == "observation" else message["role"]}
        for message in conversation(tree, leaf)
    ]
    hf = transcript.tokenizer.hf
    text = hf.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    return text + messages[-1]["content"]


class Chatterer:
    """Writes random words; half of its turns end by themselves, the others are cut."""

    def __init__(self, transcript):
        self.tokenizer, self.transcript = transcript.tokenizer, transcript

    def generate(self, requests):
        return [self.write(np.random.default_rng(request.seed)) for request in requests]

    def write(self, rng):
        words = rng.choice([" Ann", "<think>", "</think>", "\n", " ", "7", "see"], size=rng.integers(5))
        ids, ends = self.tokenizer.encode("".join(words)), bool(rng.integers(2))
        ids += [self.tokenizer.eos_id] * ends
        log_probs = np.full(len(ids), -1.0, dtype=np.float32)
        return Generation(tuple(ids), log_probs, "eos" if ends else "length")


def test_every_branch_of_a_tree_decodes_to_its_conversation(transcript):
    decode, end = transcript.tokenizer.decode, transcript.tokenizer.eos_id
    policy, tasks = Chatterer(transcript), [{"index": index} for index in range(4)]
    trees = rollout(tasks, FreeEnv(), policy, SHAPE, seed=1)
    for tree in trees:
        assert decode(tree.prompt_ids) == transcript._renderer.opening(tree.prompt)
        for leaf in tree.leaves():
            ids = tree.branch_ids(leaf)
            assert decode(ids[:-1] if ids[-1] == end else ids) == rendered(transcript, tree, leaf)


def test_actions_of_a_model_end_by_themselves_or_are_cut_and_show_no_mark(transcript):
    policy, tasks = random_policy(transcript), [{"index": index} for index in range(4)]
    trees = rollout(tasks, FreeEnv(), policy, SHAPE, seed=1)
    turns = [turn for tree in trees for turn in tree.turns[1:]]
    assert {turn.stop_reason for turn in turns} == {"eos", "length"}
    mark = transcript.tokenizer.decode([transcript.tokenizer.eos_id])
    assert not any(mark in turn.action for turn in turns)


def test_closed_and_unclosed_actions_are_closed_once(transcript):
    tokenizer = transcript.tokenizer
    end = tokenizer.eos_id
    for closes in (False, True):
        policy = ScriptedPolicy(["1", "22", "333", "7"], tokenizer, end=closes, transcript=transcript)
        one = SHAPE.model_copy(update={"chains": 1, "forks": 0, "rounds": 0})
        (tree,) = rollout([{"index": 7}], FreeEnv(), policy, one, seed=0)
        (leaf,) = tree.leaves()
        turns = [tree.turns[node] for node in tree.path(leaf)[1:]]
        assert [turn.action for turn in turns] == ["1", "22", "333", "7"]
        assert [turn.observation_ids.count(end) for turn in turns] == [
            0,
            *[tokenizer.encode(transcript_text(transcript)).count(end) - closes] * 3,
        ]
        assert tree.outcomes[leaf]["em"] == 1.0
        assert (tree.branch_ids(leaf)[-1] == end) is closes


def transcript_text(transcript):
    return transcript.tokenizer.decode(transcript.observe(" 1 letters\n", closed=False))


def test_marks_of_the_template_are_never_trained(transcript):
    (tree,) = rollout([{"index": 1}], FreeEnv(), random_policy(transcript), SHAPE, seed=0)
    batch = pack_rows([tree], [np.ones(len(tree))])
    for ids, turn_ids, leaf in zip(batch.input_ids, batch.turn_ids, tree.leaves(), strict=True):
        actions = [tree.turns[node].action_ids for node in tree.path(leaf)[1:]]
        trained = [ids[turn_ids == turn].tolist() for turn in turn_ids[turn_ids >= 0].unique()]
        assert sorted(trained) == sorted(map(list, actions))


def test_template_tokens_count_as_observation(transcript):
    longer = len(transcript.observe(" 1 letters\n", closed=False))
    tight = SHAPE.model_copy(
        update={"chains": 1, "forks": 0, "rounds": 0, "max_response_tokens": 1 + longer, "max_turn_tokens": 1}
    )
    policy = ScriptedPolicy(lambda _: "1", transcript.tokenizer, transcript=transcript)
    (tree,) = rollout([{"index": 7}], FreeEnv(), policy, tight, seed=0)
    (leaf,) = tree.leaves()
    assert tree.outcomes[leaf]["outcome"] == "length"
    assert len(tree) == 2
    short = SHAPE.model_copy(update={"max_prompt_tokens": len(tree.prompt_ids) - 1})
    (none,) = rollout([{"index": 7}], FreeEnv(), policy, short, seed=0)
    assert none.leaves() == []


def test_evaluation_takes_the_transcript(transcript):
    seen = []

    def say(text):
        seen.append(text)
        return "7!"

    policy = ScriptedPolicy(say, transcript.tokenizer, transcript=transcript)
    figures, _ = evaluate([{"index": 7}], GuessEnv(), policy, SHAPE, seed=0)
    assert figures.em == 1.0
    assert seen == [transcript.tokenizer.decode(transcript.open("Guess a digit:\n"))]


@pytest.mark.parametrize("stops", [True, False])
def test_demonstrations_are_what_a_rollout_of_the_same_actions_is(transcript, stops):
    env = gymnasium.make("at2po/MiniWiki-v0", worlds=2, hops=(2,))
    env = env if stops else _WithoutStops(env)
    expert = partial(demonstrate, config=ExpertConfig(early_stop=0, half_query=0, page_title=0))
    settings = ColdStartConfig(demonstrations=1)
    (shown,) = record_demonstrations(
        env,
        transcript.tokenizer,
        settings,
        rng=np.random.default_rng(3),
        script=expert,
        transcript=transcript,
    )
    rng = np.random.default_rng(3)
    _, info = env.reset(seed=int(rng.integers(2**31)))
    actions = list(_actions(env, expert, info["task_id"], rng))
    policy = ScriptedPolicy(actions, transcript.tokenizer, end=not stops, transcript=transcript)
    roomy = RolloutConfig(
        chains=1, forks=0, rounds=0, max_turn_tokens=500, max_response_tokens=9000, max_prompt_tokens=5000
    )
    (tree,) = rollout([{"task_id": info["task_id"]}], env, policy, roomy, seed=0)
    (leaf,) = tree.leaves()
    assert tree.outcomes[leaf]["em"] == 1.0
    assert shown.ids.tolist() == tree.branch_ids(leaf)
    trained = [False] * len(tree.prompt_ids)
    for node in tree.path(leaf)[1:]:
        turn = tree.turns[node]
        trained += [False] * len(turn.observation_ids) + [True] * len(turn.action_ids)
    assert shown.trained.tolist() == trained


class _WithoutStops(gymnasium.Wrapper):
    """Leaves it to the policy to end its turns."""

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        return observation, {**info, "stop": ()}


def _actions(env, expert, task_id, rng):
    play = expert(env.get_wrapper_attr("tasks").by_id(task_id), rng=rng)
    action, ended = next(play), False
    while not ended:
        yield action
        observation, _, terminated, truncated, _ = env.step(action)
        ended = terminated or truncated
        if not ended:
            action = play.send(observation)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run in chat mode, from nothing: tokenizer, model, cold start, a step, evaluations."""
    folder = tmp_path_factory.mktemp("run") / "run"
    config = load_config("quickstart", [*TINY, *CHAT, "model.chat.system=Search.", f"run.dir={folder}"])
    return folder, run_training(config)


def test_a_run_trains_on_chats(run):
    folder, summary = run
    assert summary["steps"] == 1
    assert summary["cold_start"]["loss"] > 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (step,) = [line for line in lines if line["kind"] == "train"]
    assert step["trained_questions"] == 2
    records = [
        json.loads(line) for path in (folder / "trees").iterdir() for line in path.read_text().splitlines()
    ]
    assert records
    agent = build_agent(evaluation_config(str(folder), []))
    for record in records:
        text = agent.tokenizer.decode(Tree.from_json(record["tree"]).prompt_ids)
        assert text.startswith("<|im_start|>system\nSearch.<|im_end|>\n<|im_start|>user\nQuestion")


def test_a_checkpoint_keeps_the_template_and_its_end(run):
    folder, summary = run
    config = evaluation_config(str(folder), ["eval.questions=4", "eval.sampled=false"])
    assert config.model.chat.template == "chatml"
    agent = build_agent(config)
    transcript = transcript_of(agent.policy)
    assert isinstance(transcript, ChatTranscript)
    tokenizer = agent.tokenizer
    assert tokenizer.decode([tokenizer.eos_id]) == "<|im_end|>"
    assert "Search." in tokenizer.decode(transcript.open("P"))
    with open_policy(config) as policy:
        again = evaluate_policy(config, policy, Progress())["greedy"]
    assert again["em"] == summary["em_after"]
    own = load_config(
        folder, [f"model.path={config.model.path}", "model.chat.template=tokenizer", "run.dir=null"]
    )
    served = build_agent(own)  # what the checkpoint itself says
    assert transcript_of(served.policy).open("P") == transcript.open("P")


def test_a_run_from_nothing_is_told_to_name_a_template():
    with pytest.raises(ConfigError, match=r"set model\.chat\.template=chatml"):
        build_agent(load_config("quickstart", [*TINY, "model.transcript=chat"]))


def test_a_chat_that_would_not_be_used_is_an_error():
    with pytest.raises(ConfigError, match=r"chat is set, but .* set model\.transcript=chat"):
        load_config("quickstart", ["model.chat.template=chatml"])


def test_an_agent_is_inline_unless_told_otherwise(transcript):
    assert isinstance(transcript_of(random_policy(transcript)), ChatTranscript)
    assert isinstance(transcript_of(build_agent(load_config("quickstart", TINY)).policy), InlineTranscript)


def test_the_sampler_ends_a_turn_where_the_template_does(transcript):
    policy = random_policy(transcript)
    prefix = tuple(transcript.open("P"))
    ends = {
        generation.ids[-1]
        for generation in policy.generate([Request(prefix, max_tokens=60, seed=seed) for seed in range(20)])
        if generation.stop_reason == "eos"
    }
    assert ends == {transcript.tokenizer.eos_id}
