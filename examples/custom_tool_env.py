"""A tool environment of your own: typed functions, tasks, a reward; any agent can train on it."""

import json
import re
import tempfile
from collections.abc import Generator
from pathlib import Path

import gymnasium
import numpy as np

from at2po_agent.agents.agent import Agent
from at2po_agent.agents.cold_start import cold_start, record_demonstrations
from at2po_agent.agents.model import ModelShape, build_model, train_tokenizer
from at2po_agent.config.sections import ColdStartConfig, Config
from at2po_agent.policies.hf.policy import HFPolicy
from at2po_agent.run import run_training
from at2po_env import Ending, Task, ToolContext, ToolResult, register_tool_env, tool

STOCK = {"tea": 4, "rice": 7, "salt": 2, "oil": 9, "figs": 5, "nuts": 3}


@tool(state={"counted": 0})
def count(item: str, context: ToolContext) -> ToolResult:
    """Count an item in the warehouse.

    Args:
        item: Its name.
        context: The episode's side of the call; not shown to the policy.
    """
    return ToolResult(f"{item}: {STOCK[item]}", {"counted": context.state["counted"] + 1})


def reward(ending: Ending) -> float:
    """1 for the right answer, less for every count beyond the two that are needed."""
    right = ending.answer in ending.task.golden_answers
    return max(0.0, 1.0 - 0.25 * max(0, ending.tool_states["count"]["counted"] - 2)) if right else 0.0


register_tool_env(
    "examples/Warehouse-v0",
    tools=[count],
    tasks=[
        {"question": f"How many {a} and {b} together?", "golden_answers": str(STOCK[a] + STOCK[b])}
        for a in STOCK
        for b in STOCK
        if a < b
    ],
    reward=reward,
    max_turns=5,
)


def expert(task: Task, *, rng: np.random.Generator) -> Generator[str, str, None]:
    """Counts both goods, and adds them up right in one case of four."""
    goods = re.findall(r"many (\w+) and (\w+)", task.question)[0]
    for item in goods:
        yield f"<count> {item}</count>"
    yield f"<answer> {task.golden_answers[0] if rng.random() < 0.25 else rng.integers(5, 17)}</answer>"


def train(steps: int = 20) -> tuple[float, float]:
    """Show a tiny model the expert, then train it on trees; mean reward of its first and last steps."""
    cold = ColdStartConfig(steps=150, demonstrations=400, lr=0.01)
    config = Config.model_validate(
        {
            "env": {"id": "examples/Warehouse-v0", "kwargs": {"prompt": "short"}},
            "eval": {"questions": 0},
            "rollout": {"chains": 6, "forks": 3, "rounds": 2, "max_turn_tokens": 16},
            "optimizer": {"lr": 1e-3},
            "train": {"steps": steps, "questions": 8, "minibatch_questions": 4},
        }
    )
    env, rng = gymnasium.make("examples/Warehouse-v0", prompt="short"), np.random.default_rng(0)
    texts = ["<count> tea</count><result> : : </result><answer></answer>", str(list(range(17)))]
    texts += [env.reset(seed=i)[0] for i in range(99)]
    tokenizer = train_tokenizer(texts, vocab_size=400, kind="words")
    model = build_model(ModelShape(vocab_size=len(tokenizer), hidden_size=64, layers=2, ffn_size=128), seed=0)
    cold_start(model, record_demonstrations(env, tokenizer, cold, rng=rng, script=expert), cold, rng=rng)
    with tempfile.TemporaryDirectory() as folder:
        run = config.run.model_copy(update={"dir": f"{folder}/run"})
        run_training(config.model_copy(update={"run": run}), agent=Agent(model, HFPolicy(model, tokenizer)))
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rewards = [record["reward"] for record in map(json.loads, lines) if record["kind"] == "train"]
    return float(np.mean(rewards[:3])), float(np.mean(rewards[-3:]))


if __name__ == "__main__":
    print("mean reward, first and last steps:", train())
