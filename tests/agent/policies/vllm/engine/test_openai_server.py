"""`OpenAIPolicy` against vLLM's own server on loopback."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest

pytest.importorskip("vllm", reason="needs an environment with vLLM")

from helpers.vllm_memorised import QUESTIONS, actions, environment, save_memorised, write_corpus
from typer.testing import CliRunner

from at2po_agent.agents.model import load_model
from at2po_agent.cli.app import app
from at2po_agent.evaluation.evaluate import evaluate
from at2po_agent.policies.base import Request
from at2po_agent.policies.hf.policy import HFPolicy
from at2po_agent.policies.openai import OpenAIPolicy
from at2po_agent.policies.openai.client import Server
from at2po_agent.policies.openai.messages import Dialect
from at2po_agent.rollout import RolloutConfig
from at2po_agent.transcripts.tokenizer import HFTokenizer
from at2po_agent.tree import Tree
from at2po_env.errors import PolicyError

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore::at2po_env.data.At2poSampleWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of packages that vLLM brings
]

CONTEXT = 512
BYTES = 16
"""Bytes that stand for a token of a limit here: tags and learnt words are long tokens."""
KNOWN = [{"index": index} for index in range(QUESTIONS)]
TOKENS = RolloutConfig(max_turn_tokens=48, max_response_tokens=300, max_prompt_tokens=300)
LIMITS = TOKENS.model_copy(
    update={
        name: getattr(TOKENS, name) * BYTES
        for name in ("max_turn_tokens", "max_response_tokens", "max_prompt_tokens")
    }
)
_ENVIRONMENT = {
    **{"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    **{"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_WORKER_MULTIPROC_METHOD": "fork"},
    **{"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
}


class Running(NamedTuple):
    """A server, and what it serves."""

    url: str
    process: subprocess.Popen[bytes]
    model: Path
    corpus: Path

    def policy(self, endpoint: Any, **options: Any) -> OpenAIPolicy:
        dialect = Dialect(endpoint, bytes_per_token=BYTES, tools=options.pop("tools", ()))
        return OpenAIPolicy(
            Server(self.url, **options.pop("patience", {})), "tiny", dialect=dialect, **options
        )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AT2PO_CACHE", str(folder / "cache"))
        corpus = write_corpus(folder)
        save_memorised(folder / "model", corpus)
        port, log = free_port(), (folder / "log").open("wb")
        # `vllm serve` does the same, but looks for a distribution of that name, which vllm-cpu is not.
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(folder / "model"), "--served-model-name", "tiny"),
            *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"),
            *("--max-model-len", str(CONTEXT), "--max-num-seqs", "16"),
            *("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--enable-prompt-tokens-details"),
        ]
        process = subprocess.Popen(
            command, env={**os.environ, **_ENVIRONMENT}, stdout=log, stderr=log, start_new_session=True
        )
        server = Running(f"http://127.0.0.1:{port}/v1", process, folder / "model", corpus)
        try:
            _await_server(server, folder / "log")
            yield server
        finally:
            kill(process)
            log.close()


def kill(process: subprocess.Popen[bytes]) -> None:
    """The server and its engine, which outlives a server that is killed alone."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


def _await_server(server: Running, log: Path) -> None:
    deadline = time.monotonic() + 200
    while True:
        try:
            httpx.get(f"{server.url}/models", timeout=5, trust_env=False)
        except httpx.TransportError:
            alive = server.process.poll() is None
            assert alive and time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]  # noqa: PT018
            time.sleep(0.2)
        else:
            return


@pytest.fixture
def here(running: Running) -> HFPolicy:
    """The same model in this process."""
    return HFPolicy(load_model(running.model), HFTokenizer.load(running.model), slots=16)


def written(trees: list[Tree]) -> list[list[str]]:
    return [[turn.action for turn in tree.turns if turn is not None] for tree in trees]


def test_completions_answer_as_the_same_model_in_this_process(running: Running, here: HFPolicy) -> None:
    env = environment(running.corpus, "tagged")
    expected, trees = evaluate(KNOWN, env, here, TOKENS, seed=0)
    with running.policy("completions") as policy:
        figures, served = evaluate(KNOWN, env, policy, LIMITS, seed=0)
    assert written(served) == written(trees)
    assert written(served) == [actions(env, number, "tagged") for number in range(QUESTIONS)]
    assert (figures.em, expected.em) == (1.0, 1.0)
    assert figures.outcomes == expected.outcomes == {"answer": QUESTIONS}
    # The tokens are counted and weighed alike, though the ids here are bytes.
    assert figures.tokens == expected.tokens
    for mine, theirs in zip(served, trees, strict=True):
        assert mine.entropy == pytest.approx(theirs.entropy, abs=1e-4)
    assert policy.stats.completion_tokens == expected.tokens * QUESTIONS
    assert policy.stats.failures == 0


def test_log_probs_of_unsure_answers_are_those_of_the_model(running: Running, here: HFPolicy) -> None:
    text = "Once upon a time"  # nothing that was learnt
    (expected,) = here.generate([Request(tuple(here.tokenizer.encode(text)), 12, temperature=0.0)])
    with running.policy("completions") as policy:
        request = Request(tuple(policy.tokenizer.encode(text)), 12 * BYTES, temperature=0.0)
        (answer,) = policy.generate([request])
    assert float(expected.log_probs.sum()) < -1.0
    assert float(answer.log_probs.sum()) == pytest.approx(float(expected.log_probs.sum()), abs=1e-3)
    assert answer.sampled is not None
    assert int(answer.sampled.sum()) == len(expected.ids)
    values = answer.log_probs[answer.sampled]
    np.testing.assert_allclose(values, expected.log_probs, atol=1e-3)


def test_chats_search_and_answer(running: Running) -> None:
    env = environment(running.corpus, "tagged")
    with running.policy("chat") as policy:
        figures, trees = evaluate(KNOWN, env, policy, LIMITS, seed=0)
    assert written(trees) == [actions(env, number, "tagged") for number in range(QUESTIONS)]
    assert {turn.stop_reason for tree in trees for turn in tree.turns if turn is not None} == {"stop"}
    assert figures.em == 1.0
    assert figures.tokens > 0


def test_the_servers_own_tool_calls_are_hermes_actions(running: Running) -> None:
    env = environment(running.corpus, "hermes")
    tools = env.get_wrapper_attr("tool_schemas")
    with running.policy("chat", tools=tools) as policy:
        figures, trees = evaluate(KNOWN, env, policy, LIMITS, seed=0)
    assert written(trees) == [actions(env, number, "hermes") for number in range(QUESTIONS)]
    assert figures.em == 1.0
    first = trees[0].turns[1]
    assert first is not None
    assert first.action_ids[0] == 263  # the mark of a call that the server parsed, not its text
    assert figures.tokens > 0


def test_sampling_takes_seeds_and_is_counted(running: Running) -> None:
    with running.policy("chat", concurrency=4) as policy:
        prompt = tuple(policy.transcript.open("Say something."))
        requests = [
            Request(prompt, 8 * BYTES, temperature=1.5, top_p=0.9, seed=seed) for seed in (1, 2, 3, 1)
        ]
        answers = policy.generate(requests)
    assert len({answer.ids for answer in answers}) > 1
    assert all(np.isfinite(answer.log_probs).all() for answer in answers)
    stats = policy.stats
    assert (stats.requests, stats.failures, stats.left_out) == (4, 0, [])
    assert stats.prompt_tokens > 0
    assert 4 <= stats.completion_tokens <= 32


def test_limits_of_the_context_are_understood(running: Running) -> None:
    with running.policy("completions") as policy:
        prompt = tuple(policy.tokenizer.encode("Once upon a time"))
        (long,) = policy.generate([Request(prompt, 4000 * BYTES, temperature=0.0)])
        assert (long.stop_reason in ("length", "eos"), policy.stats.shortened) == (True, 1)
        crowded = tuple(policy.tokenizer.encode("Once upon " * 600))
        (full,) = policy.generate([Request(crowded, 8 * BYTES)])
        assert (full.stop_reason, policy.stats.reasons) == ("abort", {"context": 1})


def test_a_model_that_is_not_served_is_told(running: Running) -> None:
    with OpenAIPolicy(running.url, "nothing") as policy, pytest.raises(PolicyError, match="it has: tiny"):
        policy.generate([Request(tuple(policy.transcript.open("Hi")), 8)])


def test_the_command_evaluates_the_whole_sample(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AT2PO_CACHE", str(running.model.parent / "cache"))
    limits = [
        f"rollout.{name}={getattr(TOKENS, name)}" for name in ("max_turn_tokens", "max_response_tokens")
    ]
    words = [
        *("eval", running.url, "--env", "at2po/HotpotQA-v0", "served.endpoint=completions", "--json"),
        *("served.price_input=1", "served.price_output=2", f"corpus={running.corpus}", *limits),
        *("eval.kwargs.prompt=short", "eval.kwargs.topk=1"),
    ]
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 0, told.output
    results = json.loads(told.stdout)
    assert results["greedy"]["questions"] == 12
    assert results["greedy"]["em"] >= QUESTIONS / 12
    served = results["served"]
    assert (served["model"], served["failures"]) == ("tiny", 0)
    assert served["cost"] == pytest.approx((served["prompt_tokens"] + 2 * served["completion_tokens"]) / 1e6)


def test_a_server_that_is_killed_ends_in_aborted_answers_then_in_an_error(running: Running) -> None:
    """The last test: the server does not come back."""
    env = environment(running.corpus, "tagged")
    patience = {"retries": 1, "backoff_s": 0.05, "connect_s": 2.0}
    with running.policy("completions", concurrency=2, max_failures=6, patience=patience) as policy:
        prompt = tuple(policy.tokenizer.encode("Once upon a time"))
        tickets = {
            policy.submit(Request(prompt, 400 * BYTES, temperature=1.0, seed=seed)) for seed in range(6)
        }
        while policy.stats.completion_tokens == 0:
            for ticket, answer in policy.poll():
                tickets.discard(ticket)
                assert answer.stop_reason != "abort"
        kill(running.process)
        reasons = []
        while tickets:
            for ticket, answer in policy.poll():
                tickets.discard(ticket)
                reasons.append(answer.stop_reason)
        assert "abort" in reasons
        with pytest.raises(PolicyError, match=r"requests in a row failed.*connection"):
            evaluate(KNOWN * 3, env, policy, LIMITS, seed=0)
