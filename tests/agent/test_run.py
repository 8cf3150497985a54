"""A whole run on MiniWiki, from nothing: tokenizer, model, cold start, trees, evaluation, resume."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from at2po_agent.agents.agent import build_agent, example_texts
from at2po_agent.config.loading import load_config
from at2po_agent.config.sections import Config, Section, ServedConfig
from at2po_agent.rollout import RolloutConfig
from at2po_agent.run import run_training
from at2po_env import ToolEnv
from at2po_env.errors import ConfigError, EnvError

TINY = [
    "env.kwargs.worlds=2",
    "eval.kwargs.worlds=1",
    "eval.questions=6",
    "eval.every=1",
    "model.layers=1",
    "model.hidden_size=32",
    "model.ffn_size=32",
    "cold_start.steps=3",
    "cold_start.batch_size=2",
    "cold_start.demonstrations=6",
    "cold_start.env_kwargs.worlds=2",
    "rollout.chains=2",
    "rollout.forks=1",
    "rollout.rounds=1",
    "rollout.max_turn_tokens=8",
    "train.steps=2",
    "train.questions=2",
    "train.minibatch_questions=1",
    "train.save_every=1",
    "run.threads=1",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], set[str]]:
    """A tiny quickstart, and which settings it read."""
    folder = tmp_path_factory.mktemp("run") / "run"
    read: set[str] = set()
    patch = pytest.MonkeyPatch()
    for base in (Section, RolloutConfig):
        patch.setattr(base, "__getattribute__", _recording(read))
    summary = run_training(load_config("quickstart", [*TINY, f"run.dir={folder}"]))
    patch.undo()
    return folder, summary, read


def _recording(read: set[str]) -> Any:
    def get(settings: BaseModel, name: str) -> Any:
        if name in type(settings).model_fields:
            read.add(f"{type(settings).__name__}.{name}")
        return object.__getattribute__(settings, name)

    return get


def test_a_run_from_nothing_leaves_its_figures(run):
    folder, summary, _ = run
    assert {"em_before", "em_after", "sampled_em_after", "wall_seconds", "sampled_tokens"} <= set(summary)
    assert summary["cold_start"]["loss"] > 0
    assert summary["folder"] == str(folder)
    assert (folder / "checkpoints" / "step_000002" / "tokenizer.json").exists()


def test_a_run_reads_every_setting_that_it_offers(run):
    _, _, read = run
    sections = [Config, RolloutConfig]
    sections += [f.annotation for f in Config.model_fields.values() if f.annotation is not RolloutConfig]
    offered = {
        f"{section.__name__}.{name}"
        for section in sections
        if isinstance(section, type) and issubclass(section, BaseModel)
        for name in section.model_fields
    }
    # no occasion to read here: DAPO's number of tries and its factor, T2PO's signal, rewards of failures,
    # engines of vLLM, the server that only an evaluation asks, a pause
    elsewhere = {"AlgorithmConfig.oversampling", "RolloutConfig.overlong_factor", "RolloutConfig.signal"}
    elsewhere |= {"RolloutConfig.cut_reward", "RolloutConfig.error_reward", "ModelConfig.vllm"}
    elsewhere |= {"Config.served", *(f"ServedConfig.{name}" for name in ServedConfig.model_fields)}
    elsewhere |= {"HealthConfig.probe_every_s", "HealthConfig.give_up_after_s"}  # read during a pause
    assert offered - read <= elsewhere


def test_a_checkpoint_is_an_agent_of_its_own(run):
    folder, _, _ = run
    path = folder / "checkpoints" / "step_000002"
    agent = build_agent(load_config(folder, [f"model.path={path}"]))
    assert agent.tokenizer.encode("<search> x</search>")
    assert sum(p.numel() for p in agent.model.parameters()) == run[1]["parameters"]


def test_random_weights_leave_the_path_alone(run):
    nowhere = ["model.path=/no/such/model", f"model.tokenizer={run[0] / 'checkpoints' / 'step_000002'}"]
    random = ["model.random_init=true", "model.vocab_size=600"]
    agent = build_agent(load_config("quickstart", [*TINY, *nowhere, *random]))
    assert agent.model.config.vocab_size == 600
    with pytest.raises(ConfigError, match="/no/such/model"):
        build_agent(load_config("quickstart", [*TINY, *nowhere]))


def test_without_an_expert_the_tokenizer_learns_from_prompts():
    with_expert = example_texts(load_config("quickstart", TINY))
    without = example_texts(load_config("quickstart", [*TINY, "cold_start.steps=0"]))
    assert any("</search>" in text for text in with_expert)
    assert all("?" in text for text in without)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["env.id=at2po/NoSuchWiki-v0"], r"env\.id: .*at2po envs"),
        (["env.kwargs.hopz=3"], r"env\.kwargs: at2po/MiniWiki-v0 refuses .*hopz"),
        (["eval.id=Nothing-v3"], r"eval\.id"),
        (["env.kwargs.hops=[9]"], r"hops"),
    ],
)
def test_an_environment_that_cannot_be_made_is_one_clear_error(tmp_path, overrides, message):
    with pytest.raises(Exception, match=message) as caught:
        run_training(
            load_config("quickstart", [*TINY, "cold_start.steps=0", f"run.dir={tmp_path / 'r'}", *overrides])
        )
    assert type(caught.value).__module__ == "at2po_env.errors"


def test_foreign_code_that_exits_is_an_error_and_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(*_: object, **__: object) -> None:
        raise SystemExit(0)

    monkeypatch.setattr(ToolEnv, "reset", leave)  # it is met first where demonstrations are recorded
    with pytest.raises(EnvError, match=r"called sys\.exit\(0\)"):
        run_training(load_config("quickstart", [*TINY, f"run.dir={tmp_path / 'run'}"]))
