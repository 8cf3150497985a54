import contextlib
import errno
import json
import os
import resource
from pathlib import Path

import pytest
import torch
from helpers.kills import killed_at
from torch import nn
from transformers import AutoModelForCausalLM

from at2po_agent.agents.model import ModelShape, build_model, train_tokenizer
from at2po_agent.runs import checkpoint
from at2po_agent.runs.checkpoint import (
    CheckpointError,
    check_checkpoint,
    config_digest,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    save_checkpoint,
)

CONFIG = {"optimizer.lr": "0.01", "run.seed": "0"}
SHAPE = ModelShape(vocab_size=300, hidden_size=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn_size=16)


def trained(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A tiny tied model after two steps, so that the optimizer has a state."""
    model = build_model(SHAPE, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(input_ids=torch.arange(8)[None]).logits.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def save(folder: Path, number: int, parts, keep: int = 9, **state) -> Path:
    model, optimizer = parts
    return save_checkpoint(
        folder,
        step=number,
        model=model,
        optimizer=optimizer,
        tokenizer=None,
        state=state,
        keep=keep,
        config=CONFIG,
    )


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_restored_run_goes_on_bit_for_bit(tmp_path):
    model, optimizer = trained()
    save(tmp_path, 2, (model, optimizer), cursor=7)
    other, other_optimizer = build_model(SHAPE, seed=1), None
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2)
    restored = load_checkpoint(tmp_path / "step_000002", model=other, optimizer=other_optimizer)
    assert restored.state == {"cursor": 7}
    step(model, optimizer)
    step(other, other_optimizer)
    assert same(weights(model), weights(other))


def test_without_the_optimizer_the_next_step_differs(tmp_path):
    # negative control: the moments matter, so the test above would notice if they were not restored
    model, optimizer = trained()
    save(tmp_path, 2, (model, optimizer))
    other = build_model(SHAPE, seed=1)
    load_checkpoint(tmp_path / "step_000002", model=other)
    fresh = torch.optim.AdamW(other.parameters(), lr=1e-2)
    step(model, optimizer)
    step(other, fresh)
    assert not same(weights(model), weights(other))


def test_the_learning_rate_comes_from_the_configuration_not_the_checkpoint(tmp_path):
    save(tmp_path, 2, trained())
    model = build_model(SHAPE, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    load_checkpoint(tmp_path / "step_000002", model=model, optimizer=optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_checkpoint_is_a_model_path(tmp_path):
    parts = trained()
    path = save(tmp_path, 2, parts)
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert same(weights(loaded), weights(parts[0]))


def test_the_tokenizer_is_saved_beside_the_weights(tmp_path):
    tokenizer = train_tokenizer(["some text, some more text"], vocab_size=280)
    model, optimizer = trained()
    path = save_checkpoint(
        tmp_path,
        step=1,
        model=model,
        optimizer=optimizer,
        tokenizer=tokenizer.hf,
        state={},
        keep=1,
        config=CONFIG,
    )
    assert type(tokenizer).load(path).encode("some text") == tokenizer.encode("some text")
    assert "tokenizer.json" in json.loads((path / "state.json").read_text())["files"]


def test_only_the_newest_are_kept_and_the_pointer_names_the_last(tmp_path):
    parts = trained()
    for number in (1, 2, 3):
        save(tmp_path, number, parts, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000003", "step_000002"]
    assert (tmp_path / "latest").read_text() == "step_000003\n"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "config.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "changed"])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, name, damage):
    model, optimizer = trained()
    save(tmp_path, 1, (model, optimizer), cursor=1)
    good = weights(model)
    step(model, optimizer)
    broken = save(tmp_path, 2, (model, optimizer), cursor=2)
    file = broken / name
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "gone":
        file.unlink()
    else:
        file.write_bytes(b"\xff" + content[1:])
    before = {path: path.read_bytes() for path in broken.iterdir()}

    said: list[str] = []
    fresh = build_model(SHAPE, seed=5)
    restored = load_newest(tmp_path, model=fresh, report=said.append)
    assert restored.state == {"cursor": 1}
    assert same(weights(fresh), good)
    assert len(said) == 1
    assert str(file) in said[0]
    assert "delete the folder" in said[0]
    assert {path: path.read_bytes() for path in broken.iterdir()} == before  # nothing overwritten


def test_a_broken_checkpoint_is_kept_beside_when_its_step_is_done_again(tmp_path):
    parts = trained()
    broken = save(tmp_path, 2, parts)
    (broken / "model.safetensors").write_bytes(b"half")
    again = save(tmp_path, 2, parts)
    check_checkpoint(again)
    assert (tmp_path / "step_000002.replaced-1" / "model.safetensors").read_bytes() == b"half"
    assert list_checkpoints(tmp_path) == [again]


def test_a_broken_newer_checkpoint_does_not_push_out_a_good_one(tmp_path):
    parts = trained()
    save(tmp_path, 1, parts, keep=2)
    (save(tmp_path, 9, parts, keep=2) / "state.json").unlink()
    save(tmp_path, 2, parts, keep=2)
    assert {path.name for path in list_checkpoints(tmp_path)} == {"step_000001", "step_000002", "step_000009"}


def test_no_whole_checkpoint_is_an_error_with_a_way_out(tmp_path):
    with pytest.raises(CheckpointError, match="it holds no checkpoint; start a new run"):
        load_newest(tmp_path / "none", model=build_model(SHAPE, seed=0), report=print)
    (save(tmp_path, 1, trained()) / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="all of its checkpoints are broken"):
        load_newest(tmp_path, model=build_model(SHAPE, seed=0), report=lambda _: None)


def test_another_model_is_refused(tmp_path):
    save(tmp_path, 1, trained())
    larger = build_model(
        ModelShape(vocab_size=300, hidden_size=24, layers=1, heads=2, kv_heads=1, head_dim=8, ffn_size=16),
        seed=0,
    )
    with pytest.raises(CheckpointError, match="do not fit this model"):
        load_checkpoint(tmp_path / "step_000001", model=larger)
    deeper = build_model(
        ModelShape(vocab_size=300, hidden_size=16, layers=2, heads=2, kv_heads=1, head_dim=8, ffn_size=16),
        seed=0,
    )
    with pytest.raises(CheckpointError, match="lacks"):
        load_checkpoint(tmp_path / "step_000001", model=deeper)


def test_another_format_version_is_refused(tmp_path):
    path = save(tmp_path, 1, trained())
    body = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(body | {"version": 99}))
    with pytest.raises(CheckpointError, match="format version 99, expected 1"):
        check_checkpoint(path)


def test_a_full_disk_leaves_the_earlier_checkpoint_as_it_was(tmp_path, monkeypatch):
    parts = trained()
    first = save(tmp_path, 1, parts)
    before = {path.name: path.read_bytes() for path in first.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"the disk is full; step_000001 is intact; free some space"):
        save(tmp_path, 2, parts, keep=1)
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir() if path.name != "latest"] == ["step_000001"]


def test_a_full_disk_is_named_when_the_tokenizer_meets_it(tmp_path):
    # A real failure: the tokenizer's file may not grow, and its library says so with a plain Exception.
    tokenizer = train_tokenizer(["some text"], vocab_size=280).hf

    class Limited:
        def save_pretrained(self, folder: str) -> None:
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
            try:
                tokenizer.backend_tokenizer.save(f"{folder}/tokenizer.json")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    class Buggy:
        def save_pretrained(self, _: str) -> None:
            raise LookupError("a bug")

    model, optimizer = trained()
    how = {"step": 1, "model": model, "optimizer": optimizer, "state": {}, "keep": 1, "config": CONFIG}
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint.*File too large"):
        save_checkpoint(tmp_path, tokenizer=Limited(), **how)
    with pytest.raises(LookupError, match="a bug"):
        save_checkpoint(tmp_path, tokenizer=Buggy(), **how)


def test_a_disk_that_refuses_in_the_middle_of_a_file_leaves_nothing_half_there(tmp_path):
    # a real failure within safetensors' own writer: files may not grow beyond 20 kB
    parts = trained()
    first = save(tmp_path, 1, parts)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write the checkpoint.*step_000001 is intact"):
            save(tmp_path, 2, parts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    check_checkpoint(first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000001"]


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    (tmp_path / ".step_000004.123.tmp").mkdir()
    save(tmp_path, 5, trained())
    assert not (tmp_path / ".step_000004.123.tmp").exists()


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("name", ["fsync", "rename", "replace", "unlink", "rmdir"])
def test_whenever_a_process_is_killed_every_checkpoint_that_counts_is_whole(tmp_path, name, moment):
    parts, number = trained(), 1
    save(tmp_path, 1, parts, keep=1)
    while killed_at(name, number, moment, lambda: save(tmp_path, 2, parts, keep=1)):
        found = list_checkpoints(tmp_path)
        assert found
        for path in found:
            check_checkpoint(path)
        save(tmp_path, 1, parts, keep=1)  # the next try replaces an older checkpoint again
        number += 1
    assert number > 1  # it was killed at least once
    assert list_checkpoints(tmp_path)[0].name == "step_000002"


def test_a_checkpoint_of_another_configuration_is_refused_though_its_shape_fits(tmp_path):
    path = save(tmp_path, 1, trained())
    other = {**CONFIG, "optimizer.lr": "0.5"}
    with pytest.raises(
        CheckpointError, match=r"another configuration .*\n  optimizer\.lr: was 0\.01, is 0\.5"
    ):
        load_newest(tmp_path, model=build_model(SHAPE, seed=0), report=print, config=other)
    load_newest(tmp_path, model=build_model(SHAPE, seed=0), report=print, config=CONFIG)
    body = json.loads((path / "state.json").read_text())
    del body["config"]  # an older release saved it
    (path / "state.json").write_text(json.dumps(body))
    load_newest(tmp_path, model=build_model(SHAPE, seed=0), report=print, config=other)


def test_the_digest_does_not_depend_on_the_order_of_the_settings():
    assert config_digest({"a": "1", "b": "2"}) == config_digest({"b": "2", "a": "1"})
    assert config_digest({"a": "1", "b": "2"}) != config_digest({"a": "2", "b": "1"})


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        "[" * 100_000,
        '{"step": "\xff"}',
        *(f'{{"{name}": []}}' for name in ("state", "files", "optimizer", "config")),
        '{"files": {"model.safetensors": []}}',
        '{"files": {"model.safetensors": {"bytes": 1}}}',
        '{"optimizer": {"0": 1}}',
        '{"version": "1"}',
    ],
)
def test_a_state_of_another_shape_is_one_clear_error(tmp_path, text):
    path = save(tmp_path, 1, trained())
    file = path / "state.json"
    with contextlib.suppress(ValueError, RecursionError):
        members = json.loads(text)
        text = json.dumps(json.loads(file.read_text()) | members if isinstance(members, dict) else members)
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"state\.json: not the JSON that a checkpoint ends with"):
        check_checkpoint(path)
