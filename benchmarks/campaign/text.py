"""Attacks environments with texts: hostile actions, hostile passages, and code for the tools that run it.

In an environment of tools the golden answer stands in the hostile passages and never in an action. So no
episode may be scored as right, whatever the policy writes and whatever a page says. The shipped worlds take
the same actions; there a reward only has to be one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium

from at2po_agent.agents.model import train_tokenizer
from at2po_agent.transcripts.chat import ChatTranscript
from at2po_agent.transcripts.inline import InlineTranscript
from at2po_env import Snapshot, ToolEnv, fork, snapshot
from at2po_env.data.tasks import Task
from at2po_env.retrieval.base import Passage
from at2po_env.tools import CalculatorTool, PythonTool, SearchTool
from at2po_env.tools.base import ToolContext, call_tool
from benchmarks.campaign.runner import Try, words

LIMIT_S = 1.0
GOLD = "zyxwv 7731"
TURNS = 4
_TAGS = words("think|search|answer|result|information|calculator|tool_call|tool_response|note")
_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_start|>assistant\n", "</s>")
_PIECES = (
    *(f"<{tag}>" for tag in _TAGS),
    *(f"</{tag}>" for tag in _TAGS),
    *("<", ">", "</", "<answer", "</answer", "&lt;answer>", "<<answer>>", "<ANSWER>", "<answer >"),
    *_CONTROL,
    *("\\boxed{", "\\boxed{x}", "}", "{", "{{question}}", "%s", "\\", "$"),
    *('{"name": "search", "arguments": {"query": "x"}}', '{"name": ["search"], "arguments": null}'),
    *('{"name": "calculator", "arguments": {"expression": "1"}}', '{"query": 1e999}', '{"query": NaN}'),
    *('{"a": ' * 50, "[" * 300, "x", "two words", "\n", "\0", "\ud800", "\u202e", "é", "1/0", "9**9**9"),
    *("\U0001f600", " " * 40, "a\r\nb"),
)


def hostile_text(rng: random.Random, extra: Sequence[str] = ()) -> str:
    """A text of tags, control tokens, broken JSON and odd characters; one in two hundred is long."""
    pieces = (*_PIECES, *extra)
    text = "".join(rng.choices(pieces, k=rng.choice((1, 2, 4, 8, 16))))
    return text * rng.randrange(1_000, 8_000) if rng.random() < 0.005 else text


class HostilePages:
    """Finds what it is told to find.

    Attributes:
        pages: Texts of the passages.
    """

    digest = "hostile"

    def __init__(self) -> None:
        self.pages = ["nothing"]

    def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        """The same pages for every query."""
        return [
            [Passage(f"{n}", page[:40], page, 1.0) for n, page in enumerate(self.pages[:topk])]
            for _ in queries
        ]


def _note(word: str) -> str:
    """Write a word down.

    Args:
        word: Any word.
    """
    return word


@contextlib.contextmanager
def hostile_texts(folder: Path) -> Iterator[Try]:
    """Episodes of hostile actions, every other one with hostile passages."""
    del folder
    shelf, task = HostilePages(), {"question": "What is it?", "golden_answers": [GOLD]}
    envs: list[gymnasium.Env[str, str]] = [
        ToolEnv(
            tools=[SearchTool(shelf), CalculatorTool(), _note],
            tasks=[task],
            reward=rule,
            protocol=protocol,
            on_malformed=malformed,  # type: ignore[arg-type]
            max_turns=TURNS,
        )
        for rule in ("boxed", "tag", "structured")
        for protocol in ("tagged", "search_r1", "hermes")
        for malformed in ("end", "notice")
    ]
    tools = len(envs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # shipped samples are what is wanted here
        for name, options in (("MiniWiki", {}), ("Household", {"size": "small"}), ("WebShop", {})):
            world = gymnasium.make(f"at2po/{name}-v0", max_turns=TURNS, disable_env_checker=True, **options)
            envs.append(world)
    tokenizer = train_tokenizer(["a text"], vocab_size=300, special_tokens=("<|im_start|>", "<|im_end|>"))
    transcripts = [InlineTranscript(tokenizer), ChatTranscript(tokenizer, template="chatml")]

    def attempt(rng: random.Random, number: int) -> str:
        env, most = envs[number % len(envs)], 0.2 if number % len(envs) < tools else 1.0
        hostile = number // len(envs) % 2 == 1
        answer = f"<answer>\\boxed{{ {GOLD} }}</answer>"
        gold = (GOLD, f"\\boxed{{{GOLD}}}", f"<answer>{GOLD}</answer>", answer)
        shelf.pages = [hostile_text(rng, gold) if hostile else "nothing" for _ in range(3)]
        env.reset(seed=number)
        for _ in range(TURNS):
            action = _action(rng, env)
            started = time.thread_time()
            observation, reward, terminated, truncated, info = env.step(action)
            took = time.thread_time() - started
            what = _judge(observation, float(reward), info, took, most) or _same_fork(env, number)
            for transcript in transcripts if hostile and not what else ():
                what = what or _control_tokens(transcript, tokenizer, observation)
            if what:
                return f"{what}: {action[:300]!r} with {shelf.pages!r:.300}"
            if terminated or truncated:
                return ""
        return "the episode did not end"

    yield attempt


def _action(rng: random.Random, env: gymnasium.Env[str, str]) -> str:
    """A hostile text, often within or around a call or an answer that would be valid."""
    text = hostile_text(rng)
    if rng.random() < 0.5:
        return text
    examples = env.unwrapped.example_actions()  # type: ignore[attr-defined]
    valid = rng.choice([*examples, "<answer>", "</answer>", "<think>t</think><answer>\\boxed{"])
    place = rng.randrange(len(valid) + 1)
    return valid[:place] + text + valid[place:]


def _judge(observation: Any, reward: float, info: Any, took: float, most: float) -> str:
    if took > LIMIT_S:
        return f"a step took {took:.1f} s"
    if not isinstance(observation, str) or not isinstance(info, dict):
        return f"a step returned {type(observation).__name__} and {type(info).__name__}"
    if not math.isfinite(reward) or not -1.0 <= reward <= most:
        return f"the reward is {reward}, but at most {most} can be earned"
    if info.get("em") and most < 1.0:
        return f"{info['answer']!r} was scored as right"
    return ""


def _same_fork(env: gymnasium.Env[str, str], number: int) -> str:
    """Every eighth episode: a fork and a copy through JSON are the same episode."""
    if number % 8:
        return ""
    snap = snapshot(env)
    if Snapshot.from_json(snap.to_json()).digest != snap.digest or snapshot(fork(env)).digest != snap.digest:
        return "a fork, or a copy through JSON, is another episode"
    return ""


def _control_tokens(transcript: Any, tokenizer: Any, observation: str) -> str:
    """A page must not become a control token: an observation has as many as a harmless one."""
    control = {tokenizer.encode(token)[0] for token in ("<|im_start|>", "<|im_end|>")} | {tokenizer.eos_id}
    count = [
        sum(token in control for token in transcript.observe(text, closed=False))
        for text in (observation, "x")
    ]
    return f"{type(transcript).__name__} made a control token of a page" if count[0] != count[1] else ""


# Code -----------------------------------------------------------------------------------------------------

_NUMBERS = words("0|1|-1|2|0.5|1e308|10**8|-10**8|4096|1j|True|''|[]|x|" + "9" * 40)
_OPERATORS = ("+", "-", "*", "/", "//", "%", "**", "<<", "@", ",", "if 1 else", "and", "==")
_CALLS = words("round|abs|sqrt|log|exp|factorial|comb|pow|max|min|sum|floor|__import__|().__class__")
_PROGRAMS = r"""
while True: pass
print('x' * 10**7)
while True: print('x' * 1000)
x = 'x' * 10**10
x = []\nwhile True: x.append(bytearray(10**7))
import os; os.fork(); os.fork(); print('child')
import os, time\nif os.fork() == 0: time.sleep(60)
import os; os.close(1); os.close(2)\nwhile True: pass
import os; os.kill(os.getpid(), 9)
import os; os.abort()
import sys; sys.exit(7)
import os; os._exit(0)
import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()
open('big', 'wb').write(b'x' * 10**8)
import signal, time\nfor n in {*range(1, 32)} - {9, 19}: signal.signal(n, signal.SIG_IGN)\ntime.sleep(60)
import sys; sys.stdout.buffer.write(bytes(range(256)) * 99)
print('\ud800')
import threading, time\n[threading.Thread(target=time.sleep, args=(60,)).start() for _ in range(20)]
10 ** 10 ** 8
files = [open('/dev/null') for _ in range(10**4)]
input()
raise SystemExit('\0')
1 +
print(1)
""".strip().splitlines()
"""Programs; a line that ends within one is written as \\n."""


@contextlib.contextmanager
def hostile_code(folder: Path) -> Iterator[Try]:
    """Expressions for the calculator, and every twentieth try a program for the python tool."""
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    calculator, python = CalculatorTool(), PythonTool(timeout_s=1.0, memory_mb=256)
    context = ToolContext(Task("0", "?", ("x",), {}), None, 0, 0)

    def attempt(rng: random.Random, number: int) -> str:
        program = number % 20 == 19
        if program:
            code = "\n".join(rng.sample(_PROGRAMS, rng.choice((1, 1, 2)))).replace(r"\n", "\n")
            tool, arguments, limit = python, {"code": code}, 4.0
        else:
            code = _expression(rng, rng.choice((1, 3, 6)))
            tool, arguments, limit = calculator, {"expression": code}, LIMIT_S  # type: ignore[assignment]
        wall, cpu = time.monotonic(), time.thread_time()
        result = call_tool(tool, arguments, context)
        took = time.monotonic() - wall if program else time.thread_time() - cpu
        if took > limit:
            return f"{tool.name} took {took:.1f} s: {code[:500]!r}"
        if type(result.text) is not str or len(result.text) > tool.max_chars + 100:
            return f"{tool.name} gave {result.text!r:.200}: {code[:500]!r}"
        json.dumps(result.text).encode()
        if program and (left := [path.name for path in folder.glob("at2po-python-*")]):
            return f"left folders {left}: {code!r}"
        gone_by = time.monotonic() + 10.0  # what was killed may still be dying
        while program and (alive := _processes_in(folder)):
            if time.monotonic() > gone_by:
                return f"left processes {alive}: {code!r}"
            time.sleep(0.01)
        return ""

    yield attempt


def _processes_in(folder: Path) -> list[int]:
    """Processes whose working directory is or was below a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if "/at2po-python-" in os.readlink(path / "cwd") and str(folder) in os.readlink(path / "cwd"):
                state = (path / "stat").read_text().rpartition(")")[2].split()[0]
                found += [int(path.name)] if state not in "ZX" else []
    return found


def _expression(rng: random.Random, depth: int) -> str:
    if depth <= 0 or rng.random() < 0.2:
        return rng.choice(_NUMBERS)
    kind = rng.randrange(5)
    if kind == 0:
        values = ", ".join(_expression(rng, depth - 2) for _ in range(rng.choice((0, 1, 1, 2, 3))))
        return f"{rng.choice(_CALLS)}({values})"
    if kind == 1:
        return "(" * rng.choice((1, 1, 200)) + _expression(rng, depth - 1) + ")" * rng.choice((1, 1, 200))
    if kind == 2:
        return rng.choice(("-", "~", "not ", "+" * 99, "lambda: ")) + _expression(rng, depth - 1)
    return f"{_expression(rng, depth - 1)} {rng.choice(_OPERATORS)} {_expression(rng, depth - 1)}"
