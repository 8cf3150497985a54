"""A checkpoint becomes a folder that transformers alone reads, whole or not at all."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from helpers.kills import killed_at
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from at2po_agent.cli.app import app
from at2po_agent.config.loading import load_config
from at2po_agent.integrations.export import ExportError, export_run
from at2po_agent.integrations.hub import push
from at2po_agent.run import run_training
from at2po_agent.runs.checkpoint import CheckpointError
from at2po_env.errors import ConfigError, DataError

SETTINGS = [
    *("cold_start.steps=2", "cold_start.demonstrations=20", "train.steps=3", "train.questions=2"),
    *("train.minibatch_questions=1", "train.save_every=1", "eval.questions=3", "eval.every=0"),
    *("rollout.chains=2", "rollout.forks=1", "rollout.rounds=1", "rollout.max_turn_tokens=8"),
    *("model.hidden_size=32", "model.layers=1", "model.ffn_size=32", "run.threads=1"),
    *("rollout.temperature=0.8", "model.transcript=chat", "model.chat.template=chatml"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    run_training(load_config("quickstart", [*SETTINGS, f"run.dir={folder}"]))
    return folder


def test_an_export_is_the_newest_checkpoint_as_transformers_loads_it(run, tmp_path):
    exported = export_run(run, tmp_path / "model", max_shard_size="40KB")
    assert exported.checkpoint == run / "checkpoints" / "step_000003"
    shards = sorted(path.name for path in exported.folder.glob("*.safetensors"))
    assert len(shards) > 1
    assert set(
        json.loads((exported.folder / "model.safetensors.index.json").read_text())["weight_map"].values()
    ) == set(shards)
    assert all((exported.folder / name).stat().st_size < 100_000 for name in shards)

    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        kept, given = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            for folder in (exported.checkpoint, exported.folder)
        )
        assert torch.equal(kept(ids).logits, given(ids).logits)
        trained = load_file(exported.checkpoint / "model.safetensors")
        assert torch.equal(given.state_dict()["model.norm.weight"], trained["model.norm.weight"])
    assert given.generation_config.do_sample
    assert given.generation_config.temperature == 0.8

    tokenizer = AutoTokenizer.from_pretrained(exported.folder)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Who?"}], tokenize=False)
    assert chat == "<|im_start|>user\nWho?<|im_end|>\n"
    assert tokenizer.eos_token == "<|im_end|>"
    assert given.generation_config.eos_token_id == tokenizer.eos_token_id


def test_an_earlier_step_can_be_exported_and_a_missing_one_is_named(run, tmp_path):
    exported = export_run(run, step=2)
    assert exported.folder == run / "export" / "step_000002"
    weights = load_file(exported.folder / "model.safetensors")
    for step, same in ((2, True), (3, False)):
        kept = load_file(run / "checkpoints" / f"step_{step:06d}" / "model.safetensors")
        assert all(torch.equal(weights[name], kept[name]) for name in kept) == same
    with pytest.raises(ConfigError, match="no checkpoint of step 7; it has those of 2, 3"):
        export_run(run, tmp_path / "model", step=7)


def test_the_card_has_the_figures_of_the_run_with_their_counts(run, tmp_path):
    card = (export_run(run, tmp_path / "model").folder / "README.md").read_text(encoding="utf-8")
    summary = json.loads((run / "summary.json").read_text())
    assert card.startswith("---\nlibrary_name: transformers\n")
    for row in (
        "| Algorithm | `at2po` (expansion `entropy`, credit `tree`, loss `atpo`) |",
        "| Environment | `at2po/MiniWiki-v0` |",
        "| Training steps | 3 |",
        f"| Sampled tokens | {summary['sampled_tokens']:,} |",
        f"| Parameters | {summary['parameters']:,} |",
    ):
        assert row in card
    before, after = (
        "{:.3f} ({:.3f} to {:.3f})".format(
            *(summary[f"{name}_{moment}"] for name in ("em", "em_low", "em_high"))
        )
        for moment in ("before", "after")
    )
    assert f"| exact match, greedy | {before} | {after} | 3 |" in card
    assert f"at2po export {run} --step 3" in card
    settings = load_config(tmp_path / "model" / "training_config.yaml")
    assert settings.rollout == load_config(run).rollout
    # Step 2 was not evaluated: what was measured before training stands alone.
    earlier = (export_run(run, tmp_path / "earlier", step=2).folder / "README.md").read_text(encoding="utf-8")
    assert f"| exact match, greedy | {before} | - | 3 |" in earlier


def test_only_an_earlier_export_is_replaced_and_only_when_asked(run, tmp_path):
    out = tmp_path / "model"
    out.mkdir()  # an empty folder is taken
    export_run(run, out, step=2)
    with pytest.raises(ExportError, match=r"holds an export already.*add --replace"):
        export_run(run, out)
    assert "| Training steps | 2 |" in (out / "README.md").read_text()
    export_run(run, out, replace=True)
    assert "| Training steps | 3 |" in (out / "README.md").read_text()
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(ExportError, match="no earlier export and is left as it is"):
        export_run(run, other, replace=True)
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "model"]


# A replacing export renames twice: the old folder away, then the new one into its place.
@pytest.mark.parametrize(
    ("call", "number", "moment", "found"),
    [
        ("fsync", 1, "before", 2),
        ("rename", 1, "before", 2),
        ("rename", 1, "after", None),
        ("rename", 2, "after", 3),
    ],
)
def test_a_killed_export_leaves_the_old_folder_the_new_one_or_none(
    run, tmp_path, call, number, moment, found
):
    out = tmp_path / "model"
    export_run(run, out, step=2)
    assert killed_at(call, number, moment, lambda: export_run(run, out, replace=True))
    if found is None:
        assert not out.exists()
    else:
        assert f"| Training steps | {found} |" in (out / "README.md").read_text()
    export_run(run, out, replace=True)
    assert "| Training steps | 3 |" in (out / "README.md").read_text()
    assert os.listdir(tmp_path) == ["model"]


def test_what_cannot_be_exported_is_said_and_leaves_nothing(run, tmp_path):
    out = tmp_path / "out" / "model"
    with pytest.raises(DataError, match="no such folder"):
        export_run(tmp_path / "nothing", out)
    with pytest.raises(ConfigError, match="--max-shard-size: got 'big'"):
        export_run(run, out, max_shard_size="big")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    with pytest.raises(ConfigError, match="no checkpoint to export yet"):
        export_run(bare, out)
    broken = bare / "checkpoints" / "step_000003"
    broken.mkdir(parents=True)
    for file in (run / "checkpoints" / "step_000003").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cut short"):
        export_run(bare, out)
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot be written"):
        export_run(run, tmp_path / "file" / "model")
    assert not out.exists()
    assert not out.parent.exists() or not any(out.parent.iterdir())


class FakeHub:
    """Stands in for huggingface_hub.HfApi, and keeps what it is asked."""

    asked: list[tuple[str, dict[str, object]]] = []  # noqa: RUF012

    def create_repo(self, name, **options):
        self.asked.append((name, options))

    def upload_folder(self, **options):
        assert (Path(options["folder_path"]) / "README.md").is_file()
        self.asked.append(("upload", options))
        return SimpleNamespace(commit_url=f"https://hub/{options['repo_id']}/commit/1")


def test_an_export_is_pushed_as_a_private_model_unless_told_otherwise(run, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "asked", [])
    out = tmp_path / "model"
    result = CliRunner().invoke(app, ["export", str(run), "--out", str(out), "--push", "me/searcher"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [str(out), "https://hub/me/searcher/commit/1"]
    (name, created), (_, uploaded) = FakeHub.asked
    assert (name, created["private"], created["exist_ok"]) == ("me/searcher", True, True)
    assert (uploaded["repo_id"], uploaded["folder_path"]) == ("me/searcher", str(out))
    push(out, "me/searcher", public=True)
    assert FakeHub.asked[2][1]["private"] is False


def test_a_hub_that_cannot_be_reached_is_one_message_and_keeps_the_folder(run, tmp_path, monkeypatch):
    out = tmp_path / "model"

    def refuse(*_: object, **__: object) -> None:
        raise OfflineModeIsEnabled("offline mode is enabled")

    monkeypatch.setattr(FakeHub, "create_repo", refuse)
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    result = CliRunner().invoke(app, ["export", str(run), "--out", str(out), "--push", "me/searcher"])
    assert result.exit_code == 2
    assert "me/searcher: the hub did not take it (offline mode is enabled)" in result.stderr
    assert (out / "README.md").is_file()
