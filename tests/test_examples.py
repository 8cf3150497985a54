import importlib
import sys
from pathlib import Path
from types import ModuleType

import gymnasium
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch):
    """Import an example by name, as `python examples/NAME.py` would find it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in ("custom_agent", "custom_tool_env"):
        sys.modules.pop(name, None)
    gymnasium.registry.pop("examples/Warehouse-v0")


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
