"""Makes models, adapters and tokenizers: from a shape and a seed, or from a folder of weights.

This module knows neither policies nor training; a model is a plain `transformers` causal language model.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.peft_utils import find_adapter_config_file

from at2po_agent.config.sections import LoraConfig
from at2po_agent.policies.weights import is_adapted
from at2po_agent.runs.checkpoint import STATE, base_folder
from at2po_agent.transcripts.tokenizer import HFTokenizer
from at2po_env.errors import ConfigError, require

Architecture: TypeAlias = Literal["qwen3", "qwen2", "llama"]
TokenizerKind: TypeAlias = Literal["bpe", "words"]
DType: TypeAlias = Literal["float32", "bfloat16", "float16"]

_WORD = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder; the defaults make the quickstart's (484,160 parameters at 318 tokens).

    Attributes:
        vocab_size: Rows of the embedding.
        hidden_size: Width of the residual stream.
        layers: Number of layers.
        heads: Attention heads.
        kv_heads: Heads of keys and values; divides `heads`.
        head_dim: Width of one head.
        ffn_size: Width of the feed-forward layer.
        max_positions: Longest sequence.
        tied: Whether input and output embeddings are one matrix.
        architecture: Family whose modules are used.
        init_std: Standard deviation of the random weights.
        rope_theta: Base of the rotary embedding.
    """

    vocab_size: int
    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    ffn_size: int = 256
    max_positions: int = 8192
    tied: bool = True
    architecture: Architecture = "qwen3"
    init_std: float = 0.02
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ConfigError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim ({self.head_dim}) must be even: rotary embeddings turn pairs")
        if self.architecture == "qwen2" and self.head_dim * self.heads != self.hidden_size:
            raise ConfigError(
                "qwen2 has heads * head_dim = hidden_size; "
                f"got {self.heads} * {self.head_dim} and {self.hidden_size}"
            )


def build_model(
    shape: ModelShape,
    *,
    seed: int,
    dtype: DType = "float32",
    device: str = "cpu",
    eos_id: int | None = None,
) -> PreTrainedModel:
    """Make a model with random weights that depend on the seed alone; torch's generator stays as it was.

    Args:
        shape: Sizes.
        seed: Decides the weights.
        dtype: Number format of the weights.
        device: The device of the model; `meta` allocates nothing.
        eos_id: End-of-sequence id written into the configuration.

    Returns:
        The model, in eval mode.
    """
    config = AutoConfig.for_model(
        shape.architecture,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.ffn_size,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=shape.tied,
        initializer_range=shape.init_std,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        bos_token_id=None,
        eos_token_id=eos_id,
        pad_token_id=None,
    )
    return _random_model(config, seed=seed, dtype=dtype, device=device)


def load_model(
    path: str | Path,
    *,
    dtype: DType = "float32",
    device: str = "cpu",
    random_init: bool = False,
    seed: int = 0,
) -> PreTrainedModel:
    """Load a causal language model from a folder (or a name that the local hub cache holds).

    A folder of adapters gives the model that they were trained on, with the adapters merged into its weights.

    Args:
        path: Folder with `config.json` and, unless `random_init`, the weights; or adapters of peft.
        dtype: Number format of the weights.
        device: The device of the model; `meta` reads the configuration and allocates nothing.
        random_init: Draw random weights of this shape from the seed instead of reading them.
        seed: Decides the random weights.

    Returns:
        The model, in eval mode.

    Raises:
        ConfigError: The folder holds no such model.
    """
    try:
        adapter = adapter_settings(path)
        source = str(path)
        if adapter is not None:
            base = base_folder(Path(path))
            own = (Path(path) / STATE).is_file() and base.is_dir()
            source = str(base if own else adapter["base_model_name_or_path"])
        config = AutoConfig.from_pretrained(source)
        if random_init or device == "meta":
            return _random_model(config, seed=seed, dtype=dtype, device=device)
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
        if adapter is not None:
            peft = require("peft", "lora")
            with _no_deprecations():
                loaded = peft.PeftModel.from_pretrained(loaded, str(path)).merge_and_unload()
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"no model can be loaded from {str(path)!r}: {error}") from error
    model: PreTrainedModel = loaded.to(device).eval()
    return model


def adapter_settings(path: str | Path) -> dict[str, Any] | None:
    """The settings of the adapters in a folder (or under a name of the hub); None where it holds a model."""
    file = find_adapter_config_file(str(path))
    return None if file is None else dict(json.loads(Path(file).read_text(encoding="utf-8")))


def add_adapters(model: PreTrainedModel, config: LoraConfig, *, seed: int) -> nn.Module:
    """Put fresh adapters into a model, which then computes what it did: every B begins at 0.

    Args:
        model: Changed in place; its weights no longer learn.
        config: Rank, scale, dropout, and where.
        seed: Decides every A; torch's generator stays as it was.

    Returns:
        peft's model around it, in eval mode; only the adapters have gradients.

    Raises:
        MissingExtraError: peft is not installed.
        ConfigError: The model has no such layers, or a target is one of its embeddings.
    """
    peft = require("peft", "lora")
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.targets,
    )
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices, device_type="cuda"), _no_deprecations():
            torch.manual_seed(seed)
            adapted: nn.Module = peft.get_peft_model(model, settings).eval()
    except ValueError as error:
        layers = sorted({name.rpartition(".")[2] for name, part in model.named_modules() if _is_linear(part)})
        raise ConfigError(
            f"model.lora.targets: got {config.targets}, expected all-linear or names of linear layers: "
            f"{', '.join(layers)} ({error})"
        ) from error
    output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if any(hasattr(module, "base_layer") for module in (model.get_input_embeddings(), output)):
        raise ConfigError(
            f"model.lora.targets: got {config.targets}, which has an embedding; only the linear layers "
            "between the embeddings take adapters. Fix: model.lora.targets=all-linear"
        )
    return adapted


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Give the model under the adapters, whose weights learn until the end of the block; else the model."""
    if not is_adapted(model):
        yield model
        return
    base: nn.Module = model.get_base_model()  # type: ignore[operator]  # peft's
    own = [parameter for name, parameter in base.named_parameters() if ".lora_" not in name]
    with model.disable_adapter():  # type: ignore[operator]  # peft's
        try:
            for parameter in own:
                parameter.requires_grad_(True)
            yield base
        finally:
            for parameter in own:
                parameter.requires_grad_(False)


@contextlib.contextmanager
def _no_deprecations() -> Iterator[None]:
    """Silence what peft warns of transformers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _random_model(config: Any, *, seed: int, dtype: DType, device: str) -> PreTrainedModel:
    where = torch.device(device)
    devices = [where] if where.type == "cuda" else []
    factory: Any = AutoModelForCausalLM
    with torch.random.fork_rng(devices=devices, device_type="cuda"), where:
        torch.manual_seed(seed)
        model: PreTrainedModel = factory.from_config(config, dtype=getattr(torch, dtype)).eval()
    return model


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    eos_token: str = "<|endoftext|>",
    kind: TokenizerKind = "bpe",
) -> HFTokenizer:
    """Learn a byte-level vocabulary from texts; any text can be encoded and comes back verbatim.

    A special token swallows the space before it, so that the words around it keep their leading-space form;
    not so the end of sequence and marks such as `<|im_end|>`, around which texts stay verbatim.

    Args:
        texts: The texts to learn from.
        vocab_size: Most tokens, the special ones and the 256 bytes included.
        special_tokens: Strings that are always one token, such as the tags of a protocol.
        eos_token: The end-of-sequence token (also used for padding).
        kind: "bpe" learns merges; "words" takes whole words by frequency, the shortest sequences for a small
            closed world.

    Returns:
        The tokenizer; save it beside the checkpoint with `save_pretrained`.

    Raises:
        ConfigError: The vocabulary does not hold the bytes and the special tokens.
    """
    names = list(dict.fromkeys([eos_token, *special_tokens]))
    if vocab_size < 256 + len(names):
        raise ConfigError(
            f"vocab_size {vocab_size} does not hold 256 bytes and {len(names)} special tokens; "
            f"give at least {256 + len(names)}"
        )
    added = [
        AddedToken(
            name, lstrip=name != eos_token and not name.startswith("<|"), normalized=False, special=False
        )
        for name in names
    ]
    tokenizer = _words(texts, vocab_size, added) if kind == "words" else Tokenizer(models.BPE())
    if kind == "bpe":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=added,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        # The trainer flags all of them as special, which ends of sequence and marks are, and tags are not.
        tags = [str(token.content) for token in added if token.lstrip]
        tokenizer.add_tokens([AddedToken(tag, lstrip=True, normalized=False, special=False) for tag in tags])
    tokenizer.decoder = decoders.ByteLevel()
    wrap: Any = PreTrainedTokenizerFast
    return HFTokenizer(wrap(tokenizer_object=tokenizer, eos_token=eos_token, pad_token=eos_token))


def _words(texts: Iterable[str], vocab_size: int, added: list[AddedToken]) -> Tokenizer:
    """The most frequent words are one token each; any other is spelt in bytes, as there are no merges."""
    split = pre_tokenizers.Split(Regex(_WORD), "isolated")
    words = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    counts = Counter(word for text in texts for word, _ in words.pre_tokenize_str(text))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    reserved = {*alphabet, *(str(token.content) for token in added)}
    frequent = sorted(counts.keys() - reserved, key=lambda word: (-counts[word], word))
    tokens = list(dict.fromkeys([*(str(token.content) for token in added), *alphabet, *frequent]))
    vocab = {token: number for number, token in enumerate(tokens[:vocab_size])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.add_tokens(added)
    tokenizer.pre_tokenizer = words
    return tokenizer
