from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from at2po_agent.agents.agent import build_agent, check_device, check_model_path
from at2po_agent.agents.model import ModelShape, build_model, load_model, train_tokenizer
from at2po_agent.config.sections import Config
from at2po_agent.transcripts.tokenizer import HFTokenizer
from at2po_env.errors import ConfigError, PolicyError

TEXTS = ["<search> who directed the river </search>", "Ann Bell was born in Oslo."] * 10
TAGS = ["<search>", "</search>"]
BPE = train_tokenizer(TEXTS, vocab_size=300, special_tokens=TAGS)
WORDS = train_tokenizer(TEXTS, vocab_size=300, special_tokens=TAGS, kind="words")


def parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_default_shape_is_the_quickstarts() -> None:
    assert parameters(build_model(ModelShape(vocab_size=318), seed=0)) == 484_160


def test_the_published_4b_shape_is_built_without_allocating() -> None:
    shape = ModelShape(
        vocab_size=151_936,
        hidden_size=2560,
        layers=36,
        heads=32,
        kv_heads=8,
        head_dim=128,
        ffn_size=9728,
        max_positions=40_960,
    )
    model = build_model(shape, seed=0, dtype="bfloat16", device="meta")
    assert parameters(model) == 4_022_468_096
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "llama"])
def test_weights_depend_on_the_seed_alone(architecture: Any) -> None:
    shape = ModelShape(vocab_size=32, layers=1, architecture=architecture)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = build_model(shape, seed=3, eos_id=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = build_model(shape, seed=3), build_model(shape, seed=4)
    for one, two in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
    assert any(
        not torch.equal(one, two) for one, two in zip(first.parameters(), other.parameters(), strict=True)
    )
    assert not first.training
    assert first.config.eos_token_id == 4


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"heads": 3, "kv_heads": 2}, "multiple of kv_heads"),
        ({"head_dim": 7}, "even"),
        ({"architecture": "qwen2", "head_dim": 16}, "hidden_size"),
    ],
)
def test_impossible_shapes_are_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelShape(vocab_size=32, **sizes)


def test_a_saved_model_loads_the_same_and_random_init_keeps_only_its_shape(tmp_path: Path) -> None:
    model = build_model(ModelShape(vocab_size=32, layers=1), seed=0)
    model.save_pretrained(tmp_path)
    same, other = load_model(tmp_path), load_model(tmp_path, random_init=True, seed=5)
    for saved, loaded in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(saved, loaded)
    assert parameters(other) == parameters(model)
    assert not torch.equal(next(model.parameters()), next(other.parameters()))
    assert next(load_model(tmp_path, device="meta").parameters()).device.type == "meta"


def test_a_folder_without_a_model_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(PolicyError, match="nowhere"):
        HFTokenizer.load(tmp_path / "nowhere")


@pytest.mark.parametrize("tokenizer", [BPE, WORDS], ids=["bpe", "words"])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
@settings(deadline=None)
def test_any_text_comes_back_verbatim(tokenizer: HFTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("tokenizer", [BPE, WORDS], ids=["bpe", "words"])
def test_special_tokens_are_one_id_show_when_decoded_and_swallow_the_space_before(
    tokenizer: HFTokenizer,
) -> None:
    ids = tokenizer.encode("born <search> river </search>")
    assert sum(tokenizer.decode([token]) in TAGS for token in ids) == 2
    assert tokenizer.decode(ids) == "born<search> river</search>"
    assert tokenizer.encode(tokenizer.decode([tokenizer.eos_id])) == [tokenizer.eos_id]


def test_encoding_adds_nothing() -> None:
    assert BPE.encode("") == []
    assert BPE.encode("a") + BPE.encode("b") == [*BPE.encode("a"), *BPE.encode("b")]
    assert BPE.eos_id not in BPE.encode("river")


def test_training_is_deterministic_and_survives_saving(tmp_path: Path) -> None:
    again = train_tokenizer(TEXTS, vocab_size=300, special_tokens=TAGS)
    assert again.hf.get_vocab() == BPE.hf.get_vocab()
    BPE.save_pretrained(tmp_path)
    loaded = HFTokenizer.load(tmp_path)
    text = "who <search> directed \u65e5 </search> Ann  \n"
    assert loaded.encode(text) == BPE.encode(text)
    assert loaded.decode(loaded.encode(text)) == BPE.decode(BPE.encode(text))
    assert (loaded.eos_id, len(loaded)) == (BPE.eos_id, len(BPE))


def test_the_vocabulary_must_hold_the_bytes() -> None:
    with pytest.raises(ConfigError, match="at least 259"):
        train_tokenizer(TEXTS, vocab_size=258, special_tokens=TAGS)


def test_a_tokenizer_without_an_end_is_refused() -> None:
    bare = train_tokenizer(TEXTS, vocab_size=300).hf
    bare.eos_token = None
    with pytest.raises(PolicyError, match="no eos token"):
        HFTokenizer(bare)


def test_a_device_that_is_not_here_is_one_clear_error() -> None:
    for device in ("cuda:99", "nonsense"):
        with pytest.raises(ConfigError, match=f"model.device: got '{device}', which torch cannot use here"):
            check_device(device)
    check_device("cpu")


def test_a_misspelt_folder_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    for path in ("runs/quickstrat", "./runs/quickstrat", str(tmp_path / "runs" / "quickstrat")):
        with pytest.raises(
            ConfigError, match=r"model\.path: there is no folder .*did you mean .*quickstart\?"
        ):
            check_model_path("model.path", path)
    with pytest.raises(ConfigError, match="there is no folder 'a/b/c'"):
        check_model_path("model.path", "a/b/c")
    for name in ("runs/quickstart", "Qwen/Qwen3-4B", "gpt2"):
        check_model_path("model.path", name)
    with pytest.raises(ConfigError, match="there is no folder"):
        build_agent(Config.model_validate({"model": {"path": "./nothing"}}))
