"""The quickstart's world and model in TRL's trainer: tree rollouts, advantages per turn, AT²PO's loss.

    pip install 'at2po[trl]' && python examples/trl_trainer.py

The quickstart's cold start teaches the model the form of an episode; then TRL trains it.
"""

import tempfile
from collections.abc import Sequence

from at2po_agent.agents.agent import Agent, build_agent
from at2po_agent.config.loading import load_config
from at2po_agent.config.sections import Config
from at2po_agent.environments import make_training_env
from at2po_agent.integrations.trl import ATPOConfig, ATPOTrainer, TreeRollout, task_dataset
from at2po_agent.run import run_training

COLD_START = ("train.steps=0", "eval.questions=0")


def cold_started(folder: str, overrides: Sequence[str] = ()) -> tuple[Config, Agent]:
    """The quickstart's model after a cold start, and its configuration."""
    config = load_config("quickstart", [*COLD_START, *overrides, f"run.dir={folder}/cold"])
    agent = build_agent(config)
    run_training(config, agent=agent)
    return config, agent


def make_trainer(config: Config, agent: Agent, folder: str, *, questions: int = 4, **options) -> ATPOTrainer:
    """TRL's trainer of this model, with the quickstart's trees and learning rate; a tree is a minibatch."""
    env = make_training_env(config)
    leaves = config.rollout.leaves
    settings = {
        "num_generations": leaves,
        "per_device_train_batch_size": leaves,
        "gradient_accumulation_steps": questions,
        "learning_rate": config.optimizer.lr,
        "lr_scheduler_type": "constant",
        "activation_checkpointing": False,
        "logging_steps": 1,
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
    }
    return ATPOTrainer(
        agent.model,
        TreeRollout(env, config.rollout),
        ATPOConfig(f"{folder}/trl", **{**settings, **options}),
        train_dataset=task_dataset(env, range(2000)),
        processing_class=agent.tokenizer.hf,
    )


def main(steps: int = 10) -> list[float]:
    """Train, and return the mean reward of each step."""
    with tempfile.TemporaryDirectory() as folder:
        config, agent = cold_started(folder)
        trainer = make_trainer(config, agent, folder, max_steps=steps)
        trainer.train()
        return [line["reward"] for line in trainer.state.log_history if "reward" in line]


if __name__ == "__main__":
    print("mean reward of each step:", [round(reward, 3) for reward in main()])
