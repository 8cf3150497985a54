import importlib
import sys
from pathlib import Path
from types import ModuleType

import gymnasium
import pytest

from at2po_agent.agents.agent import build_weights
from at2po_agent.learning.learner import Learner, Objective, make_optimizer
from at2po_agent.learning.step import give_credit
from at2po_agent.packing.trees import pack_trees

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch):
    """Import an example by name, as `python examples/NAME.py` would find it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in ("custom_agent", "custom_tool_env", "trl_trainer"):
        sys.modules.pop(name, None)
    gymnasium.registry.pop("examples/Warehouse-v0", None)


@pytest.mark.slow
def test_an_own_tool_environment_is_trained_on(example):
    module = example("custom_tool_env")
    first, last = module.train(steps=3)
    assert 0.0 < first < 1.0  # the cold start took, and left something to learn
    assert last > 0.0


def test_an_own_tool_environment_takes_under_40_lines():
    text = (EXAMPLES / "custom_tool_env.py").read_text(encoding="utf-8")
    environment = text[text.index("STOCK =") : text.index("def expert(")]
    assert len(environment.strip().splitlines()) < 40


@pytest.mark.slow
def test_an_own_agent_learns_in_the_tree_trainer(example):
    before, after = example("custom_agent").main(steps=60)
    assert after >= before + 0.15


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_loss_of_the_quickstart_in_trl_is_ours_at_every_step(example, tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="needs TRL (extra trl): make test-trl")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    module = example("trl_trainer")
    short = ("cold_start.steps=40", "cold_start.demonstrations=320")
    config, agent = module.cold_started(str(tmp_path), short)
    trainer = module.make_trainer(config, agent, str(tmp_path), questions=1, max_steps=3, save_strategy="no")
    theirs = trainer._compute_loss
    losses = []

    def both(model, inputs):
        """TRL's loss; beside it that of our learner, on the same tree and by a copy of the weights."""
        loss = theirs(model, inputs)
        twin = build_weights(config.model, seed=0, vocab_size=len(agent.tokenizer))
        twin.load_state_dict(agent.model.state_dict())
        trees = trainer.rollout_func.trees
        batch = pack_trees(trees, [give_credit(tree, config.algorithm).advantages for tree in trees])
        objective = Objective.of(config.algorithm)
        learner = Learner(
            twin, make_optimizer(twin, config.optimizer), objective, token_budget=10**6, max_grad_norm=1.0
        )
        ours = learner.backward(batch, learner.log_probs(batch))["loss"]
        losses.append((loss.item(), ours.item()))
        return loss

    monkeypatch.setattr(trainer, "_compute_loss", both)
    trainer.train()
    assert len(losses) == 3
    assert any(abs(ours) > 1e-3 for _, ours in losses)
    for loss, ours in losses:
        assert loss == pytest.approx(ours, abs=1e-6)
