"""TRL's trainer with our environments, trees and loss; needs the extra `trl` (`make test-trl`)."""

import copy
import importlib
from importlib import resources
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.corridor import Corridor
from helpers.guess_env import GuessEnv
from helpers.learners import learner

import at2po_env
from at2po_agent.agents.model import ModelShape, build_model, train_tokenizer
from at2po_agent.credit.registry import credit_rules
from at2po_agent.losses.metrics import drift_metrics
from at2po_agent.packing.trees import pack_trees
from at2po_agent.rollout import RolloutConfig
from at2po_agent.tree import Tree
from at2po_agent.types import Turn
from at2po_env.episodes.command_env import FORMAT
from at2po_env.errors import ConfigError, EnvError

trl = pytest.importorskip("trl", reason="needs TRL (extra trl): make test-trl")
integration = importlib.import_module("at2po_agent.integrations.trl")

# TRL 1.16 asks transformers for an attribute whose name will go.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SHAPE = RolloutConfig(chains=4, forks=2, rounds=1, max_turn_tokens=3)
LEAVES = 6


class AnyGuess(GuessEnv):
    """Reads a digit out of any text, so that a random model earns different rewards."""

    def step(self, action):
        return super().step(str(sum(map(ord, action)) % 10))


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["Guess a digit:\n higher\n lower\n", "0! 1! 2! 3! 4! 5! 6! 7! 8! 9!"]
    return train_tokenizer(texts, vocab_size=280)


SETTINGS = {
    "max_steps": 1,
    "activation_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "bf16": False,
    "use_cpu": True,
}


def make_model(tokenizer, **changes):
    size = {"hidden_size": 16, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 8, "ffn_size": 16}
    return build_model(ModelShape(vocab_size=len(tokenizer), **size, **changes), seed=0)


def make_trainer(tokenizer, folder, *, cls=None, config=SHAPE, rollout_options=None, dataset=None, **options):
    """A trainer of a tiny model that guesses digits; every update sees two trees."""
    env = AnyGuess()
    settings = {
        "per_device_train_batch_size": 2 * LEAVES,
        "num_generations": LEAVES,
        "learning_rate": 1e-3,
        **SETTINGS,
        **options,
    }
    return (cls or integration.ATPOTrainer)(
        make_model(tokenizer),
        integration.TreeRollout(env, config, **(rollout_options or {})),
        integration.ATPOConfig(str(folder), **settings),
        train_dataset=integration.task_dataset(env) if dataset is None else dataset,
        processing_class=tokenizer.hf,
    )


def generated(trainer, questions=(3, 8), leaves=LEAVES):
    """A batch as TRL makes it before it is trained on, and its trees."""
    rows = [
        {"prompt": [{"role": "user", "content": "", "index": index}], "index": index}
        for index in questions
        for _ in range(leaves)
    ]
    trainer.model.train()  # TRL evaluates otherwise
    trainer.current_gradient_accumulation_steps = 1
    return trainer._generate_and_score_completions(rows), trainer.rollout_func.trees


def ours(trees, model, tokenizer, *, moved, epsilon=(3e-3, 4e-3)):
    """Loss and gradients of our learner on packed trees, by a model with the same weights."""
    twin = make_model(tokenizer)
    twin.load_state_dict(model.state_dict())
    batch = pack_trees(trees, [credit_rules()["tree"](tree).advantages for tree in trees])
    own = learner(twin, clip_low=epsilon[0], clip_high=epsilon[1])
    old = batch.sampled_log_probs if moved else own.log_probs(batch)
    return own.backward(batch, old)["loss"], {n: p.grad for n, p in twin.named_parameters()}


def move_weights(model, scale=0.05):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("moved", [False, True])
def test_loss_and_gradient_in_trl_are_ours_on_the_same_trees(tokenizer, tmp_path, moved):
    trainer = make_trainer(tokenizer, tmp_path)
    batch, trees = generated(trainer)
    if moved:  # as in a second epoch; the ratios then leave 1, and some turns are clipped
        batch["old_per_token_logps"] = batch["sampling_per_token_logps"]
        move_weights(trainer.model)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    expected, gradients = ours(trees, trainer.model, tokenizer, moved=moved)
    assert (batch["advantages"] != 0).any()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-4)
    clipped = trainer._metrics["train"]["clip_fraction"][-1]
    assert clipped > 0.05 if moved else clipped == 0


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_no_importance_level_of_trl_gives_the_loss_of_turns(tokenizer, tmp_path, level):
    trainer = make_trainer(tokenizer, tmp_path)
    batch, trees = generated(trainer)
    batch["old_per_token_logps"] = batch["sampling_per_token_logps"]
    move_weights(trainer.model)
    expected, _ = ours(trees, trainer.model, tokenizer, moved=True)
    trainer.importance_sampling_level, trainer.loss_type = level, "grpo"
    theirs = trl.GRPOTrainer._compute_loss(trainer, trainer.model, batch)
    assert abs(theirs.item() - expected.item()) > 1e-4


def test_the_clip_bounds_are_those_of_the_settings(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, epsilon=0.05, epsilon_high=0.1)
    batch, trees = generated(trainer)
    batch["old_per_token_logps"] = batch["sampling_per_token_logps"]
    move_weights(trainer.model)
    loss = trainer.compute_loss(trainer.model, batch).item()
    wide, _ = ours(trees, trainer.model, tokenizer, moved=True, epsilon=(0.05, 0.1))
    narrow, _ = ours(trees, trainer.model, tokenizer, moved=True)
    assert loss == pytest.approx(wide.item(), abs=1e-6)
    assert abs(loss - narrow.item()) > 1e-4


def test_the_pieces_of_an_update_add_up_to_the_whole(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path)
    batch, _ = generated(trainer)
    whole = trainer.compute_loss(trainer.model, batch).item()
    trainer.current_gradient_accumulation_steps = 3
    pieces = [
        {key: value[part] if value.ndim else value for key, value in batch.items()}
        for part in (slice(0, 4), slice(4, 8), slice(8, 12))
    ]
    parts = [trainer.compute_loss(trainer.model, piece).item() for piece in pieces]
    assert sum(parts) == pytest.approx(whole, abs=1e-6)
    assert max(map(abs, parts)) > 1e-3


def test_the_kl_to_the_reference_is_added_with_its_weight(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path)
    batch, _ = generated(trainer)
    batch["ref_per_token_logps"] = batch["sampling_per_token_logps"] - 0.5
    without = trainer.compute_loss(trainer.model, batch).item()
    trainer.beta = 0.1
    # log pi - log ref = 0.5 on every token, so k3 = exp(-0.5) - 1 + 0.5 = 0.1065307
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(
        without + 0.1 * 0.1065307, abs=1e-5
    )


def test_a_completion_is_exactly_what_the_policy_saw_and_sampled(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path)
    trainer.model.train()
    output = trainer.rollout_func(
        [[{"role": "user", "content": "", "index": index}] for index in (3, 8) for _ in range(LEAVES)],
        trainer,
    )
    trees = trainer.rollout_func.trees
    leaves = [(tree, leaf) for tree in trees for leaf in tree.leaves()]
    assert [tree.task_id for tree in trees] == ["3", "8"]
    paths = [len(tree.path(leaf)) - 1 for tree, leaf in leaves]
    assert sum(map(len, trees)) - 2 < sum(paths)  # branches share turns
    assert len(leaves) == 2 * LEAVES == len(output["prompt_ids"])
    for row, (tree, leaf) in enumerate(leaves):
        turns = [tree.turns[node] for node in tree.path(leaf)[1:]]
        assert output["prompt_ids"][row] + output["completion_ids"][row] == tree.branch_ids(leaf)
        assert sum(output["env_mask"][row]) == sum(len(turn.action_ids) for turn in turns)
        kept = [p for p, m in zip(output["logprobs"][row], output["env_mask"][row], strict=True) if m]
        np.testing.assert_array_equal(
            np.float32(kept), np.concatenate([turn.sampled_log_probs for turn in turns])
        )
        assert output["leaf_reward"][row] == tree.leaf_reward[leaf]
        assert max(output["turn_ids"][row]) == len(turns) - 1
    assert len({len(mask) - sum(mask) for mask in output["env_mask"]}) > 1  # some saw an observation


def test_sampled_log_probs_are_those_that_trl_computes(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path)
    batch, _ = generated(trainer)
    computed, _, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model,
        torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
        torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
        batch["completion_ids"].shape[1],
    )
    moved = drift_metrics(computed.detach(), batch["sampling_per_token_logps"], batch["turn_ids"])
    assert moved["token_kl"].item() < 1e-9


def test_training_moves_weights_and_samples_with_the_new_ones(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, max_steps=2, num_iterations=2, gradient_accumulation_steps=2)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert trainer.state.global_step == 2
    assert any((value != before[name]).any() for name, value in trainer.model.state_dict().items())
    batch, _ = generated(trainer)
    batch["old_per_token_logps"] = batch["sampling_per_token_logps"]
    trainer.compute_loss(trainer.model, batch)
    assert trainer._metrics["train"]["approx_kl"][-1] < 1e-9


def test_plain_grpo_of_trl_takes_the_tree_rollout(tokenizer, tmp_path):
    env = AnyGuess()
    settings = trl.GRPOConfig(
        str(tmp_path),
        **SETTINGS,
        per_device_train_batch_size=LEAVES,
        num_generations=LEAVES,
        logging_steps=1,
    )
    trainer = trl.GRPOTrainer(
        make_model(tokenizer),
        integration.leaf_rewards,
        settings,
        train_dataset=integration.task_dataset(env),
        processing_class=tokenizer.hf,
        rollout_func=integration.TreeRollout(env, SHAPE),
    )
    trainer.train()
    logged = next(line for line in trainer.state.log_history if "reward" in line)
    (tree,) = trainer.rollout_func.trees
    assert logged["reward"] == pytest.approx(np.nanmean(tree.leaf_reward), abs=1e-6)


def test_evaluations_grow_as_many_chains_as_they_have_generations(tokenizer, tmp_path):
    trainer = make_trainer(
        tokenizer, tmp_path, num_generations_eval=3, per_device_eval_batch_size=6, eval_on_start=False
    )
    metrics = trainer.evaluate(eval_dataset=integration.task_dataset(AnyGuess(), range(2)))
    trees = trainer.rollout_func.trees
    assert [len(tree.leaves()) for tree in trees] == [3, 3]
    assert all(len(tree.children(0)) == 3 for tree in trees)  # no turn is shared
    rewards = np.concatenate([tree.leaf_reward[tree.is_leaf] for tree in trees])
    assert metrics["eval_reward"] == pytest.approx(rewards.mean(), abs=1e-6)


def test_a_branch_without_tokens_is_not_trained():
    tree = Tree([4, 5])
    tree.add(0, Turn((), (), np.zeros(0, np.float32), None, "", "", 0.0, "length"))
    tree.close(1, -1.0)
    (only,) = integration.TreeRollout(AnyGuess(), SHAPE)._completions(tree, 1)
    assert only["completion_ids"] == [5]  # TRL wants a token
    assert only["env_mask"] == [0]
    assert only["turn_ids"] == [-1]


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        (
            {"num_generations": 4, "per_device_train_batch_size": 8},
            "num_generations=4, and a tree has 6 leaves",
        ),
        ({"temperature": 0.7}, "temperature=0.7 in the trainer and 1.0 in the rollout"),
    ],
)
def test_settings_that_contradict_the_rollout_are_refused(tokenizer, tmp_path, changed, complaint):
    trainer = make_trainer(tokenizer, tmp_path, **changed)
    with pytest.raises(ConfigError, match=complaint):
        trainer.train()


def test_a_dataset_of_others_is_refused(tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets")
    other = datasets.Dataset.from_dict({"prompt": ["Guess a digit:\n"] * 4})
    trainer = make_trainer(tokenizer, tmp_path, dataset=other)
    with pytest.raises(ConfigError, match="must come from `task_dataset`"):
        trainer.train()


def test_prompts_that_make_no_whole_tree_are_refused(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path)
    prompts = [[{"role": "user", "content": "", "index": index}] for index in (1, 1, 1, 1, 2, 2)]
    with pytest.raises(ConfigError, match="not blocks of 6 equal ones"):
        trainer.rollout_func(prompts, trainer)


def test_a_prompt_that_is_too_long_is_refused(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, config=SHAPE.model_copy(update={"max_prompt_tokens": 1}))
    with pytest.raises(ConfigError, match="0 leaves, not 6; a prompt longer than"):
        trainer.train()


@pytest.mark.parametrize(
    ("name", "value"), [("loss_type", "bnpo"), ("top_p", 0.9), ("scale_rewards", "none")]
)
def test_settings_without_effect_are_refused(tmp_path, name, value):
    with pytest.raises(ConfigError, match=f"{name}: without effect on ATPOTrainer"):
        integration.ATPOConfig(str(tmp_path), use_cpu=True, bf16=False, **{name: value})


def test_arguments_of_other_kinds_are_refused():
    with pytest.raises(ConfigError, match="got function and SimpleNamespace"):
        integration.ATPOTrainer(None, integration.leaf_rewards, SimpleNamespace())
    with pytest.raises(ConfigError, match="no rule named 'best'; known: "):
        integration.TreeRollout(GuessEnv(), SHAPE, credit="best")


# Environments whose functions a model calls through its chat template ---------------------------------------


@at2po_env.tool
def look(place: str, closely: bool = False) -> str:
    """Look at a place.

    Args:
        place: Where to look.
        closely: Whether to take time.
    """
    return f"{place}: {'a coin' if closely else 'something'}"


def treasure(tools=(look,), **options):
    return at2po_env.ToolEnv(
        tasks=[{"question": "What lies in the box?", "golden_answers": "a coin"}] * 3,
        tools=list(tools),
        max_turns=4,
        **options,
    )


@pytest.mark.parametrize("reward", ["tag", "boxed", "structured"])
@pytest.mark.parametrize("protocol", ["tagged", "hermes"])
def test_functions_play_the_episode_under_every_reward_and_protocol(reward, protocol):
    played = integration.tool_environment(treasure(reward=reward, protocol=protocol))()
    assert played.reset(index=0, prompt="ignored") == "What lies in the box?"
    assert "box: a coin" in played.look(place="box", closely=True)
    assert "box: something" in played.look(place="box")
    assert played.get_reward() == 0.0
    played.answer(answer="a coin")
    assert played.get_reward() == 1.0
    with pytest.raises(EnvError, match="the episode has ended"):
        played.look(place="box")
    played.reset(index=1)
    played.answer(answer="dust")
    assert played.get_reward() < 1.0


def test_instances_are_episodes_of_their_own():
    factory = integration.tool_environment(treasure())
    first, second = factory(), factory()
    first.reset(index=0)
    second.reset(index=0)
    first.answer(answer="a coin")
    assert (first.get_reward(), second.get_reward()) == (1.0, 0.0)
    assert "something" in second.look(place="box")


def test_a_world_of_commands_has_one_function():
    env = Corridor(instructions=f"Open the door.\n{FORMAT}\nTask: {{question}}\n")
    played = integration.tool_environment(env)()
    opening = played.reset(index=0)
    assert "<action>" not in opening
    assert "by calling `act`" in opening
    assert "place 3" in played.act(command="forward")
    assert played.get_reward() == 0.25
    played.act(command="open door")
    assert played.get_reward() == 1.25


CALL = '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call><|im_end|>'
LOOK = CALL % ("look", '{"place": "box", "closely": true}')
ANSWER = CALL % ("answer", '{"answer": "%s"}')


def test_the_tool_loop_of_trl_plays_our_environment(tmp_path, monkeypatch):
    marks = {"special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"}
    shown = train_tokenizer(["a coin"], vocab_size=300, **marks)
    template = resources.files("trl").joinpath("chat_templates/qwen3.jinja")
    shown.hf.chat_template = template.read_text(encoding="utf-8")
    env = treasure()
    settings = trl.GRPOConfig(str(tmp_path), **{**SETTINGS, "num_generations": 2}, max_completion_length=500)
    trainer = trl.GRPOTrainer(
        make_model(shown, max_positions=4096),
        args=settings,
        train_dataset=integration.task_dataset(env),
        processing_class=shown.hf,
        environment_factory=integration.tool_environment(env),
    )
    # The first episode looks and answers right, the second answers wrong at once.
    done = "Done.<|im_end|>"
    waves = iter([[LOOK, ANSWER % "dust"], [ANSWER % "a coin", done], [done]])
    prompts = []

    def scripted(prompt_ids, *_, **__):
        prompts.extend(shown.decode(ids) for ids in prompt_ids)
        return [shown.encode(text) for text in next(waves)], None

    monkeypatch.setattr(trainer, "_generate_single_turn", scripted)
    trainer.model.train()
    row = {"prompt": [{"role": "user", "content": ""}], "index": 0}
    batch = trainer._generate_and_score_completions([dict(row), dict(row)])
    assert "What lies in the box?" in prompts[0]
    assert "Look at a place." in prompts[0]  # the functions stand in the prompt
    assert "box: a coin" in prompts[2]
    assert trainer._metrics["train"]["rewards/ToolEnv/mean"] == [0.5]
    assert trainer._metrics["train"]["tools/failure_frequency"] == [0.0]
    first, second = batch["advantages"].tolist()
    assert first > 0 > second


def test_environments_that_no_function_can_play_are_refused():
    with pytest.raises(ConfigError, match="GuessEnv cannot be played by functions"):
        integration.tool_environment(GuessEnv())

    @at2po_env.tool
    def reset(place: str) -> str:
        """Put a place back.

        Args:
            place: Where.
        """
        return place

    with pytest.raises(ConfigError, match="tools reset: a function of TRL needs another name"):
        integration.tool_environment(treasure(tools=[reset]))
    with pytest.raises(EnvError, match=r"they have prompt\. Fix: add a column index or task_id"):
        integration.tool_environment(treasure())().reset(prompt="")
