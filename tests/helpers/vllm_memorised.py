"""A tiny Qwen3 that has learnt a few episodes by heart, so that a real server has something to serve.

It answers questions of the HotpotQA sample over a corpus of one page each: inline, as a tagged chat, and with
the tool calls of Hermes. Random weights would show that a server answers; these show that episodes come out
right.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import torch
from tokenizers import AddedToken

import at2po_env
from at2po_agent.agents.model import ModelShape, build_model, train_tokenizer
from at2po_agent.transcripts.tokenizer import HFTokenizer

QUESTIONS = 4
NAMES = ("Orion", "Lyra", "Draco", "Vela")
MARKS = ("<|im_start|>", "<|im_end|>")
TAGS = ("<think>", "</think>", "<search>", "</search>", "<answer>", "</answer>", "<result>", "</result>")
TEMPLATE = """\
{%- if tools -%}
    {{- '<|im_start|>system\\n' + (tools | map(attribute='function.name') | join(', ')) + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'tool' -%}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
    {%- else -%}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') -}}
        {%- for call in message.tool_calls or [] -%}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}
            {{- call.function.arguments | tojson + '}\\n</tool_call>' -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


class Piece(NamedTuple):
    """Text that the model sees, or writes."""

    text: str
    written: bool


def write_corpus(folder: Path) -> Path:
    """One page for each question, under a name of its own."""
    env = _env(None, "tagged")
    pages = [
        {"id": str(number), "contents": f'"{name}"\n{name} is {answer_of(env, number)}.'}
        for number, name in enumerate(NAMES)
    ]
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(page) + "\n" for page in pages), encoding="utf-8")
    return path


def environment(corpus: Path, protocol: str) -> gymnasium.Env[str, str]:
    """HotpotQA's sample with a short prompt over that corpus."""
    return _env(corpus, protocol)


def _env(corpus: Path | None, protocol: str) -> gymnasium.Env[str, str]:
    more = {} if corpus is None else {"corpus": str(corpus)}
    options: dict[str, Any] = {"prompt": "short", "topk": 1, "protocol": protocol, **more}
    return gymnasium.make("at2po/HotpotQA-v0", disable_env_checker=True, **options)


def answer_of(env: gymnasium.Env[str, str], number: int) -> str:
    """What is right."""
    return str(env.get_wrapper_attr("tasks")[number].golden_answers[0])


def actions(env: gymnasium.Env[str, str], number: int, protocol: str) -> list[str]:
    """A search for the question's page, then the answer."""
    call = at2po_env.ToolCall("search", {"query": NAMES[number]})
    formatter = at2po_env.make_protocol(protocol, list(env.get_wrapper_attr("tools").values()))
    search = formatter.format_call(call)
    think = "" if protocol == "hermes" else "<think>look</think>"
    answer = f"<think>so</think><answer>\\boxed{{{answer_of(env, number)}}}</answer>"
    return [think + search, answer]


def episode(env: gymnasium.Env[str, str], number: int, protocol: str) -> tuple[str, list[tuple[str, str]]]:
    """The prompt, then (action, what it led to)."""
    prompt, _ = env.reset(seed=0, options={"index": number})
    return prompt, [(action, env.step(action)[0]) for action in actions(env, number, protocol)]


def inline_pieces(prompt: str, turns: Sequence[tuple[str, str]]) -> list[Piece]:
    """An episode as running text."""
    pieces = [Piece(prompt, False)]
    for action, shown in turns:
        pieces += [Piece(action, True), Piece(shown, False)]
    return pieces[:-1]


def chat_pieces(prompt: str, turns: Sequence[tuple[str, str]], *, tools: Sequence[str] = ()) -> list[Piece]:
    """An episode as the template shows it."""
    start = f"<|im_start|>system\n{', '.join(tools)}<|im_end|>\n" if tools else ""
    pieces = [Piece(f"{start}<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n", False)]
    for action, shown in turns:
        told = shown.strip() if tools else shown
        pieces.append(Piece(f"{action}<|im_end|>", True))
        pieces.append(Piece(f"\n<|im_start|>user\n{told}<|im_end|>\n<|im_start|>assistant\n", False))
    return pieces[:-1]


def episodes(corpus: Path) -> list[list[Piece]]:
    """All that is learnt by heart."""
    found = []
    for protocol in ("tagged", "hermes"):
        env = environment(corpus, protocol)
        for number in range(QUESTIONS):
            prompt, turns = episode(env, number, protocol)
            if protocol == "tagged":
                found += [inline_pieces(prompt, turns), chat_pieces(prompt, turns)]
            else:
                found.append(chat_pieces(prompt, turns, tools=["search"]))
    return found


def save_memorised(folder: Path, corpus: Path, *, steps: int = 100) -> HFTokenizer:
    """Learn the episodes, and leave model and tokenizer where a server finds them."""
    learnt = episodes(corpus)
    texts = ["".join(piece.text for piece in pieces) for pieces in learnt]
    tokenizer = train_tokenizer(texts, vocab_size=400, special_tokens=MARKS, eos_token="<|im_end|>")
    tokenizer.hf.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    tokenizer.hf.chat_template = TEMPLATE
    shape = ModelShape(
        vocab_size=len(tokenizer.hf),
        hidden_size=64,
        layers=2,
        heads=2,
        kv_heads=1,
        head_dim=32,
        ffn_size=128,
        max_positions=1024,
    )
    model: Any = build_model(shape, seed=0, eos_id=tokenizer.eos_id)
    rows = [_row(tokenizer, pieces) for pieces in learnt]
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [tokenizer.eos_id] * (length - len(row)) for row, _ in rows])
    labels = torch.tensor([row + [-100] * (length - len(row)) for _, row in rows])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small steps are slower by far on several threads of a busy machine
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1.0, (steps - step) / (0.5 * steps))
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    assert loss.item() < 0.02, f"not learnt by heart: {loss.item()}"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _row(tokenizer: HFTokenizer, pieces: Sequence[Piece]) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    for text, written in pieces:
        piece = tokenizer.encode(text)
        ids += piece
        labels += piece if written else [-100] * len(piece)
    whole = tokenizer.encode("".join(piece.text for piece in pieces))
    assert ids == whole, (
        "the pieces meet at tags, so that a server that reads the whole text sees the same ids"
    )
    return ids, labels
