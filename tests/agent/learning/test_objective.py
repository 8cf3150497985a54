import numpy as np
import pytest
from helpers.guess_env import GuessEnv, GuessingPolicy

from at2po_agent.config.composition import composition_problems
from at2po_agent.config.loading import load_config
from at2po_agent.config.presets import PRESETS
from at2po_agent.config.sections import AlgorithmConfig
from at2po_agent.credit import Credit, credit_rules, register_credit
from at2po_agent.learning.learner import Objective
from at2po_agent.learning.step import give_credit
from at2po_agent.losses import register_loss
from at2po_agent.rollout import RolloutConfig, expansion_rules, register_expansion, rollout
from at2po_agent.tree import Tree
from at2po_agent.types import Turn
from at2po_env.errors import ConfigError


def small_tree(rewards: list[float], entropies: list[float]) -> Tree:
    """A first turn with two continuations, and a branch of its own: leaves 2, 3 and 4."""
    tree = Tree([1, 2])

    def turn(entropy: float) -> Turn:
        return Turn((), (3,), np.array([-entropy], dtype=np.float32), None, "", "", entropy, "stop")

    shared = tree.add(0, turn(entropies[0]))
    places = (shared, shared, 0)
    later = zip(places, entropies[1:], strict=True)
    leaves = [tree.add(parent, turn(entropy)) for parent, entropy in later]
    for leaf, reward in zip(leaves, rewards, strict=True):
        tree.close(leaf, reward)
    return tree


def problems(**values: object) -> dict[str, str]:
    return dict(composition_problems(values))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_a_valid_configuration(name, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(f"algorithm: {name}\n")
    config = load_config(path)
    assert config.algorithm.preset == name
    assert config.rollout.expansion in expansion_rules()
    assert Objective.of(config.algorithm).loss is not None


def test_tree_credit_is_at2pos():
    # rewards 1, 0, 0: mean 1/3, population std sqrt(2)/3, so z = sqrt 2, -1/sqrt 2, -1/sqrt 2;
    # equal entropies below the shared turn: its value is the mean of z_1 and z_2.
    tree = small_tree([1.0, 0.0, 0.0], [0.5, 0.7, 0.7, 0.5])
    credit = give_credit(tree, AlgorithmConfig())
    z = np.array([2**0.5, -(0.5**0.5), -(0.5**0.5)])
    shared = (z[0] + z[1]) / 2
    root = (shared + z[2]) / 2
    assert credit.values == pytest.approx([root, shared, *z], abs=1e-5)
    assert credit.advantages == pytest.approx([root, shared, *z], abs=1e-5)


def test_softmax_values_favour_the_uncertain_child():
    tree = small_tree([1.0, 0.0, 0.0], [0.5, 2.0, 0.0, 0.5])
    weight = np.exp(2.0) / (np.exp(2.0) + 1)
    z = np.array([2**0.5, -(0.5**0.5)])
    expected = weight * z[0] + (1 - weight) * z[1]
    assert give_credit(tree, AlgorithmConfig()).advantages[1] == pytest.approx(expected, abs=1e-5)
    mean = give_credit(tree, AlgorithmConfig(credit_options={"value_mode": "child_mean"}))
    assert mean.advantages[1] == pytest.approx(z.mean(), abs=1e-5)  # negative control


def test_group_credit_is_one_number_per_branch():
    # unbiased std of (1, 0, 0) is 1/sqrt 3: advantages 2/sqrt 3, -1/sqrt 3, -1/sqrt 3
    tree = small_tree([1.0, 0.0, 0.0], [0.5, 0.7, 0.7, 0.5])
    credit = give_credit(tree, AlgorithmConfig(credit="group"))
    assert credit.advantages == pytest.approx(np.array([2, -1, -1]) / 3**0.5, abs=1e-5)


def test_shared_group_credit_gives_a_shared_turn_the_mean_of_its_branches():
    tree = small_tree([1.0, 0.0, 0.0], [0.5, 0.7, 0.7, 0.5])
    credit = give_credit(tree, AlgorithmConfig(credit="group_shared"))
    assert credit.advantages[1] == pytest.approx((2 - 1) / 2 / 3**0.5, abs=1e-5)


def test_group_mode_of_tree_credit_is_per_branch():
    tree = small_tree([1.0, 0.0, 0.0], [0.5, 0.7, 0.7, 0.5])
    credit = give_credit(tree, AlgorithmConfig(credit_options={"advantage_mode": "group"}))
    assert credit.advantages.shape == (3,)


@pytest.mark.parametrize(
    ("values", "key", "message"),
    [
        ({"algorithm": {"loss": "gppp"}}, "algorithm.loss", "did you mean gppo"),
        ({"algorithm": {"credit": "gruop"}}, "algorithm.credit", "did you mean group"),
        ({"rollout": {"expansion": "entropie"}}, "rollout.expansion", "did you mean entropy"),
        ({"algorithm": {"loss_options": {"clip_low": -1}}}, "algorithm.loss_options", "at least 0"),
        ({"algorithm": {"loss_options": {"clip_hi": 1}}}, "algorithm.loss_options.clip_hi", "clip_high"),
        (
            {"algorithm": {"credit_options": {"value_mode": "softmax"}}},
            "algorithm.credit_options",
            "child_softmax",
        ),
        (
            {"algorithm": {"credit_options": {"value_mod": 1}}},
            "algorithm.credit_options.value_mod",
            "value_mode",
        ),
        ({"rollout": {"chains": 1, "rounds": 0, "forks": 0}}, "rollout.chains", "at least 2 leaves"),
        ({"rollout": {"temperature": 0}}, "rollout.temperature", "nothing is learnt"),
    ],
)
def test_a_senseless_composition_is_refused_with_a_reason(values, key, message):
    found = problems(**values)
    assert list(found) == [key]
    assert message in found[key]


def test_without_training_any_shape_will_do():
    assert problems(rollout={"chains": 1, "rounds": 0, "forks": 0}, train={"steps": 0}) == {}


@pytest.mark.parametrize("loss", ["atpo", "grpo", "gspo", "sapo"])
@pytest.mark.parametrize("credit", ["tree", "group", "group_shared"])
@pytest.mark.parametrize("expansion", ["entropy", "random", "chains", "continue"])
def test_parts_go_with_each_other(loss, credit, expansion):
    parts = {"loss": loss, "credit": credit}
    assert problems(algorithm=parts, rollout={"expansion": expansion}) == {}
    shape = RolloutConfig(chains=3, forks=2, rounds=1, expansion=expansion)
    (tree,) = rollout([{"index": 4}], GuessEnv(), GuessingPolicy(), shape, seed=0)
    advantages = give_credit(tree, AlgorithmConfig(**parts)).advantages
    assert np.isfinite(advantages).all()


def test_own_parts_are_one_pure_function_each():
    def deepest_first(*arrays, k, **rest):
        del rest
        inner = np.flatnonzero(~arrays[2])
        return [int(inner[-1])] * k

    def signs(tree, *, scale=1.0):
        rewards = tree.leaf_reward[tree.is_leaf]
        return Credit(scale * np.sign(rewards - rewards.mean()))

    def plain(log_probs, old_log_probs, advantages, turn_ids, *, power=1.0):
        del old_log_probs
        return -((advantages * log_probs * (turn_ids >= 0)).mean() ** power), {}

    register_expansion("test_deepest", deepest_first)
    register_credit("test_signs", signs)
    register_loss("test_plain", plain)
    algorithm = {
        "credit": "test_signs",
        "credit_options": {"scale": 2.0},
        "loss": "test_plain",
        "loss_options": {"power": 3.0},
    }
    assert problems(algorithm=algorithm, rollout={"expansion": "test_deepest"}) == {}
    chosen = Objective.of(AlgorithmConfig(**algorithm))
    assert not chosen.divisible
    assert not chosen.needs_advantage
    tree = small_tree([1.0, 0.0, 0.0], [0.5, 0.7, 0.7, 0.5])
    assert give_credit(tree, AlgorithmConfig(**algorithm)).advantages.tolist() == [2.0, -2.0, -2.0]


def test_a_credit_name_cannot_be_taken_twice():
    with pytest.raises(ConfigError, match="registered already"):
        register_credit("tree", credit_rules()["group"])


def test_built_in_losses_can_be_cut_and_skip_rows_without_advantage():
    chosen = Objective.of(AlgorithmConfig(loss="gspo", loss_options={"clip_low": 0.1}))
    assert chosen.divisible
    assert chosen.needs_advantage
