"""Several learners do what one process does: real processes, on the CPU."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.guess_runs import guess_config, guess_run, learners_run, metrics, trees
from safetensors.torch import load_file

from at2po_agent.cluster.learners import check_learners, join, share_out
from at2po_agent.config.loading import load_config
from at2po_agent.losses import register_loss, registry
from at2po_env.errors import ConfigError

# What the learners share: losses by token, turn and branch, entropies of a minibatch, the KL to the reference
# in the loss and in the reward, recomputed and sampled log-probs, weights against a mismatch, rows and packs.
VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {"preset": "grpo"},
    "at2po": {"preset": "at2po"},
    "aepo": {
        "algorithm": {"loss": "aepo", "kl_weight": 0.1},
        "train": {"packing": "rows", "importance_cap": 2.0},
    },
    "gspo": {
        "preset": "gspo",
        "algorithm": {"kl_weight": 0.1, "kl_place": "reward"},
        "train": {"old_log_probs": "sampler", "gradient_checkpointing": True},
    },
}
STEPS = 2
pytestmark = pytest.mark.timeout(900)  # most of it is the start of processes, which a busy machine delays


def checkpoint(folder: Path, file: str, step: int = STEPS) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step_{step:06d}" / f"{file}.safetensors")


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm of the first."""
    assert one.keys() == other.keys()
    pairs = [(tensor.double(), other[name].double()) for name, tensor in one.items()]
    total = sum(float(a.square().sum()) for a, _ in pairs)
    return (sum(float((a - b).square().sum()) for a, b in pairs) / total) ** 0.5


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with every run made by this process."""
    folder = tmp_path_factory.mktemp("alone")
    for name, variant in VARIANTS.items():
        guess_run(guess_config(folder / name, **variant))
    return folder


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by two learners, and one run that stops after its first step."""
    folder = tmp_path_factory.mktemp("two")
    jobs = [guess_config(folder / name, learners=2, **variant) for name, variant in VARIANTS.items()]
    half = guess_config(folder / "half", learners=2, train={"steps": 1})
    assert learners_run(*((config, False) for config in (*jobs, half))) == 0
    return folder


@pytest.fixture(scope="module")
def by_four(tmp_path_factory: pytest.TempPathFactory, by_two: Path) -> Path:
    """Two runs by four learners, and the one that two began."""
    folder = tmp_path_factory.mktemp("four")
    shutil.copytree(by_two / "half", folder / "half")
    jobs = [(guess_config(folder / name, learners=4, preset=name), False) for name in ("grpo", "at2po")]
    assert learners_run(*jobs, (guess_config(folder / "half", learners=4), True)) == 0
    return folder


def check_same_run(one: Path, other: Path) -> None:
    assert distance(checkpoint(one, "model", 0), checkpoint(one, "model")) > 1e-3  # something was learnt
    assert distance(checkpoint(one, "model", 0), checkpoint(other, "model", 0)) == 0
    assert distance(checkpoint(one, "model"), checkpoint(other, "model")) < 1e-6
    assert distance(checkpoint(one, "optimizer"), checkpoint(other, "optimizer")) < 1e-5
    for step in range(1, STEPS + 1):
        # The samples of step 1 are the same bit for bit. Then weights, and so log-probs, differ by rounding.
        tolerance = 0.0 if step == 1 else 1e-5
        for tree, same in zip(trees(one, step), trees(other, step), strict=True):
            np.testing.assert_array_equal(tree.parent, same.parent)
            np.testing.assert_allclose(tree.leaf_reward, same.leaf_reward, atol=1e-6)  # a KL may be in them
            for turn, again in zip(tree.turns[1:], same.turns[1:], strict=True):
                assert turn is not None
                assert again is not None
                assert (turn.ids, turn.version) == (again.ids, again.version)
                np.testing.assert_allclose(again.sampled_log_probs, turn.sampled_log_probs, atol=tolerance)
    assert len(metrics(one)) == len(metrics(other))
    for line, like in zip(metrics(one), metrics(other), strict=True):
        assert line.keys() == like.keys()
        for name, value in line.items():
            if name.startswith("mismatch/"):  # differences of numbers that differ by rounding
                assert abs(like[name] - value) < 1e-5, name
            elif name == "turn_kl_entropy":  # before the first update of a step, all that moved is rounding
                assert 0 <= like[name] <= 1
            elif isinstance(value, float):
                assert like[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
            else:
                assert like[name] == value, name


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_two_learners_make_the_run_of_one_process(alone, by_two, name):
    check_same_run(alone / name, by_two / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "at2po"])
def test_four_learners_make_the_run_of_one_process(alone, by_four, name):
    check_same_run(alone / name, by_four / name)


@pytest.mark.slow
def test_what_two_learners_began_four_go_on_with(alone, by_four):
    check_same_run(alone / "at2po", by_four / "half")


@pytest.mark.slow
def test_what_two_learners_began_one_process_goes_on_with(alone, by_two, tmp_path):
    shutil.copytree(by_two / "half", tmp_path / "half")
    guess_run(guess_config(tmp_path / "half"), resume=True)
    check_same_run(alone / "at2po", tmp_path / "half")


def test_the_costliest_pieces_are_shared_out_first():
    # 5 to the first, 4 to the second, 3 to the second (7), 3 to the first (8), 3 to the second (10).
    assert share_out([3, 5, 3, 4, 3], 2) == [1, 0, 0, 1, 1]
    assert share_out([1, 1], 3) == [0, 1]
    assert share_out([], 2) == []


# What a user can get wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cluster.learners=0"], r"cluster\.learners .*greater than or equal to 1"),
        (["cluster.learners=5"], r"5 learners share a minibatch of 4 questions.*use at most 4"),
    ],
)
def test_a_number_of_learners_that_cannot_be_is_one_clear_error(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config("quickstart", overrides)


def test_a_loss_that_needs_whole_minibatches_is_refused(monkeypatch):
    monkeypatch.setattr(registry, "_LOSSES", dict(registry._LOSSES))

    def loss(log_probs, old_log_probs, advantages, turn_ids):
        return ((log_probs - old_log_probs) * advantages * (turn_ids >= 0)).sum(), {}

    register_loss("whole_minibatches", loss)
    load_config("quickstart", ["algorithm.loss=whole_minibatches"])
    with pytest.raises(ConfigError, match=r"algorithm\.loss.*takes no totals.*cluster\.learners=1"):
        load_config("quickstart", ["algorithm.loss=whole_minibatches", "cluster.learners=2"])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"device": "cuda"}, r"2 learners on this machine need a GPU each, and it has 1\."),
        ({"device": "cuda:1"}, r"model\.device: cuda:1 is one device.*model\.device=cuda$"),
        ({"lora": {"rank": 4}}, r"adapters are not supported with several learners"),
        ({"sampler": "vllm"}, r"vllm is not supported with several learners"),
    ],
)
def test_a_model_that_learners_cannot_share_is_refused(tmp_path, monkeypatch, model, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=message):
        check_learners(guess_config(tmp_path, learners=2, model=model), here=2)


def test_learners_that_were_not_launched_are_asked_for_with_the_command(tmp_path):
    with pytest.raises(ConfigError, match=r"a process alone.*torchrun --nproc-per-node 2"):
        guess_run(guess_config(tmp_path / "run", learners=2))
    assert not (tmp_path / "run").exists()


def test_another_number_of_processes_than_learners_is_refused(tmp_path, monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    config = guess_config(tmp_path, learners=2)
    message = r"2 learners are configured, and this is a group of 4"
    with pytest.raises(ConfigError, match=message), join(config):
        pass
