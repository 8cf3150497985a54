"""`at2po eval URL`, from its words to tables and files."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.served_fake import Reply, Seen, chat, chat_log_probs, completion, error, serving, tool_call
from typer.testing import CliRunner

from at2po_agent.cli.app import app
from at2po_agent.evaluation import target
from at2po_agent.evaluation.target import evaluation_config
from at2po_agent.policies.openai.client import Server
from at2po_env.data import At2poSampleWarning
from at2po_env.errors import ConfigError

HEED_SIGINT = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
ANSWER = "<think> easy </think> <answer> \\boxed{ Ada } </answer>"
SURE = {"logprobs": chat_log_probs(("<think> easy", -1.0), (ANSWER[12:], -3.0)), "stop_reason": None}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Questions of three sets (six of HotpotQA, every second answered by Ada), and a corpus."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AT2PO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    for name, split, golds in (
        ("hotpotqa", "dev", ["Ada", "Bob"] * 3),
        ("bamboogle", "test", ["Ada"]),
        ("musique", "dev", ["Bob"]),
    ):
        rows = [
            {"id": f"{i}", "question": f"Who {i}?", "golden_answers": [gold]} for i, gold in enumerate(golds)
        ]
        file = tmp_path / "qa" / name / f"{split}.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    passage = {"id": "0", "contents": '"Ada"\nAda wrote the first program.'}
    (tmp_path / "corpus.jsonl").write_text(json.dumps(passage) + "\n", encoding="utf-8")
    return tmp_path


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["eval", *words, "corpus=corpus.jsonl"])


HOTPOT = ("--env", "at2po/HotpotQA-v0", "dataset=qa/hotpotqa/dev.jsonl")


def test_a_served_model_is_evaluated_and_its_cost_is_told(folder: Path) -> None:
    prices = ("served.price_input=1", "served.price_output=10")
    with serving(lambda _: chat(ANSWER, **SURE)) as fake:
        shown = run(fake.url, "--model", "tiny", *HOTPOT, *prices)
        told = run(fake.url, "--model", "tiny", *HOTPOT, *prices, "--json")
        file = run(fake.url, "--model", "tiny", *HOTPOT, "--json", "out.json")
    assert shown.exit_code == 0, shown.output
    assert "greedy" in shown.stdout
    assert "0.500" in shown.stdout
    assert f"tiny at {fake.url}" in shown.stdout
    results = json.loads(told.stdout)
    assert (results["greedy"]["questions"], results["greedy"]["em"]) == (6, 0.5)
    assert results["greedy"]["tokens"] == 2.0  # the server's tokens, not bytes
    served = results["served"]
    assert (served["requests"], served["prompt_tokens"], served["completion_tokens"]) == (6, 60, 30)
    assert served["cost"] == pytest.approx((60 * 1 + 30 * 10) / 1e6)
    assert (served["model"], served["endpoint"], served["temperature"]) == ("tiny", "chat", 0.0)
    assert file.exit_code == 0
    assert json.loads((folder / "out.json").read_text(encoding="utf-8"))["greedy"] == results["greedy"]


def test_what_was_asked_is_what_the_options_say(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del folder
    monkeypatch.setenv("MY_KEY", "sk-mine")
    options = ("served.endpoint=completions", "served.api_key_env=MY_KEY", "served.temperature=0.7")
    with serving(lambda _: completion(ANSWER), models=["only"]) as fake:
        shown = run(fake.url, *HOTPOT, *options, "served.extra.min_p=0.1", "eval.questions=1")
    assert shown.exit_code == 0, shown.output
    assert "temperature 0.7" in shown.stdout
    (seen,) = fake.seen
    assert seen.headers["Authorization"] == "Bearer sk-mine"
    assert (seen.body["model"], seen.body["temperature"], seen.body["min_p"]) == ("only", 0.7, 0.1)
    assert seen.body["max_tokens"] == 2048  # rollout.max_turn_tokens, in the server's tokens again


def test_the_short_options_are_settings_of_the_configuration(folder: Path) -> None:
    del folder
    with serving(lambda _: chat(ANSWER, **SURE)) as fake:
        short = run(fake.url, "--model", "tiny", *HOTPOT, "--json")
        settings = ("served.model=tiny", "env.id=at2po/HotpotQA-v0", "dataset=qa/hotpotqa/dev.jsonl")
        spelled = run(fake.url, *settings, "--json")
    assert short.exit_code == spelled.exit_code == 0
    assert json.loads(short.stdout)["greedy"] == json.loads(spelled.stdout)["greedy"]


def test_limits_are_tokens_of_the_server() -> None:
    assert evaluation_config("http://localhost", []).rollout.max_turn_tokens == 2048 * 4
    single = evaluation_config("http://localhost", ["served.bytes_per_token=1"])
    assert single.rollout.max_turn_tokens == 2048


def test_the_suite_is_asked_set_by_set_and_keeps_what_it_has(folder: Path) -> None:
    with serving(lambda _: chat(ANSWER, **SURE)) as fake:
        shown = run(fake.url, "--model", "tiny", "--suite", "multihop", "dataset=qa")
    assert shown.exit_code == 0, shown.output
    results = json.loads((folder / "suite_multihop.json").read_text(encoding="utf-8"))
    assert (results["model"], results["served"]["requests"], results["complete"]) == ("tiny", 8, True)
    assert results["sets"]["hotpotqa"]["figures"]["em"] == 0.5
    assert shown.stdout.endswith("suite_multihop.json\n")

    def dies(_: Seen) -> Any:
        return Reply(error("gone"), status=401) if len(fake.seen) > 6 else chat(ANSWER)

    with serving(dies) as fake:
        broken = run(fake.url, "--model", "tiny", "--suite", "multihop", "dataset=qa")
    assert broken.exit_code == 2
    assert "refuses the key" in broken.stderr
    assert "complete are in suite_multihop-2.json" in broken.stderr
    kept = json.loads((folder / "suite_multihop-2.json").read_text(encoding="utf-8"))
    assert (kept["sets"]["hotpotqa"]["figures"]["em"], kept["complete"]) == (0.5, False)


def test_native_tools_come_from_the_environment(folder: Path) -> None:
    del folder

    def model(seen: Seen) -> Any:
        if seen.body["messages"][-1]["role"] == "tool":
            return chat(ANSWER)
        return chat(
            None, finish="tool_calls", message={"tool_calls": [tool_call("search", '{"query": "Ada"}')]}
        )

    words = ("--model", "tiny", *HOTPOT, "served.native_tools=true", "eval.questions=1", "--json")
    with serving(model) as fake:
        told = run(fake.url, *words, "eval.kwargs.protocol=hermes")
        assert json.loads(told.stdout)["greedy"]["em"] == 1.0
        assert fake.bodies[0]["tools"][0]["function"]["name"] == "search"
        assert fake.bodies[1]["messages"][-1]["content"].startswith("Doc 1")
        suite = run(
            fake.url,
            "--model",
            "tiny",
            "--suite",
            "multihop",
            "dataset=qa",
            "served.native_tools=true",
            "--json",
            "eval.kwargs.protocol=hermes",
        )
        assert json.loads(suite.stdout)["sets"]["bamboogle"]["figures"]["em"] == 1.0
        refused = run(fake.url, *words)
    assert refused.exit_code == 2
    assert "protocol has to be hermes" in refused.stderr


def test_answers_that_were_given_up_are_told(folder: Path) -> None:
    del folder

    def model(seen: Seen) -> Any:
        if "Who 3?" in seen.body["messages"][0]["content"]:
            return Reply(error("flagged", code="content_filter"), status=400)
        if "temperature" in seen.body:
            return Reply(error("Unsupported parameter", param="temperature"), status=400)
        return chat(ANSWER)

    with serving(model) as fake:
        refused = run(fake.url, "--model", "tiny", *HOTPOT)
        shown = run(fake.url, "--model", "tiny", *HOTPOT, "health.fail_at=0.2")
    assert refused.exit_code == 2
    assert "17% failed (requests 1)" in refused.output
    assert shown.exit_code == 0, shown.output
    assert "Note: 1 answers were given up and count as wrong (content filter 1)" in shown.stdout
    assert "the server refuses temperature" in shown.stdout


def test_a_server_that_dies_is_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"id": f"{i}", "question": f"Who {i}?", "golden_answers": ["Ada"]} for i in range(24)]
    (folder / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.setattr(target, "Server", partial(Server, retries=0, backoff_s=0.0))
    words = ("--model", "tiny", "--env", "at2po/HotpotQA-v0", "dataset=many.jsonl", "--json")

    def dies(_: Seen) -> Any:
        return Reply(error("out of memory"), status=500) if len(fake.seen) <= 30 else chat(ANSWER)

    with serving(dies) as fake:
        told = run(fake.url, *words, "health.probe_every_s=0.05")
    assert told.exit_code == 0, told.output
    results = json.loads(told.stdout)
    assert (results["greedy"]["em"], results["greedy"]["outcomes"]) == (1.0, {"answer": 24})
    assert results["served"]["failures"] == 30  # 24 questions and the probes: more than 20 in a row
    with serving(dies) as fake:
        blind = run(fake.url, *words, "health.pause_at=null")
    assert blind.exit_code == 2
    assert "20 requests in a row failed" in blind.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("http://127.0.0.1:1/v1", "served.endpoint=talk"),
            "served.endpoint (command line): got 'talk', expected: input should be 'chat' or 'completions'",
        ),
        (("http://127.0.0.1:1/v1", "served.concurrency=0"), "got 0, expected: input should be greater than"),
        (("http://127.0.0.1:1/v1", "served.timeout_s=0"), "got 0, expected: input should be greater than 0"),
        (("http://127.0.0.1:1/v1", "served.extra={"), "served.extra: cannot read"),
        (("http://127.0.0.1:1/v1", "served.extra=[1]"), "expected: input should be a valid dictionary"),
        (("http://127.0.0.1:1/v1", "served.timeout=3"), "unknown key (got 3); did you mean timeout_s"),
        (("http://127.0.0.1:1/v1", "served.api_key_env=NO_SUCH"), "NO_SUCH holds no key"),
        (("http://127.0.0.1:1/v1", "--suite", "multi"), "--suite: got 'multi'"),
        (("http://127.0.0.1:1/v1", "--suite", "all", "--env", "x"), "--suite asks its own environments"),
        (("http://127.0.0.1:1/v1", "served.price_cached=1"), "cached tokens needs"),
        (
            ("some/model", "--model", "x", "served.timeout_s=3"),
            "served.timeout_s=3, served.model=x: only for served models, but 'some/model'",
        ),
        (("http://127.0.0.1:1/v1", "--env", "at2po/Nothing-v0"), "`at2po envs` lists what there is"),
        (("http://127.0.0.1:1/v1",), "which model?"),
        (("http://u:p@127.0.0.1/v1", "--model", "m"), "an address holds no key"),
    ],
)
def test_wrong_words_are_one_message(folder: Path, words: tuple[str, ...], says: str) -> None:
    del folder
    result = run(*words, "dataset=qa/hotpotqa/dev.jsonl") if "--suite" not in words else run(*words)
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_another_environment_keeps_limits_and_drops_what_was_said_of_the_first() -> None:
    url = "http://localhost"
    other = evaluation_config(url, ["eval.kwargs.hops=1", "env.id=at2po/MiniWiki-v0"])
    assert (other.eval.id, other.eval.kwargs, other.env.kwargs) == ("at2po/MiniWiki-v0", {"hops": 1}, {})
    bamboogle = evaluation_config(url, ["env.kwargs.topk=5", "env.id=at2po/Bamboogle-v0"])
    shared = {"topk": 5, "max_turns": 7, "retriever": "bm25"}
    assert bamboogle.eval.kwargs == {**shared, "split": "test"}
    dev = evaluation_config(url, ["eval.kwargs.split=dev", "env.id=at2po/HotpotQA-v0"])
    assert dev.eval.kwargs["split"] == "dev"
    with pytest.raises(ConfigError, match="no_such"):
        evaluation_config(url, ["eval.no_such=1"])


def test_the_shipped_sample_serves_where_no_data_is(folder: Path) -> None:
    del folder
    with serving(lambda _: chat(ANSWER)) as fake:
        words = ["eval", fake.url, "--env", "at2po/HotpotQA-v0", "--json", "eval.questions=2"]
        with pytest.warns(At2poSampleWarning):
            told = CliRunner().invoke(app, words)
    assert json.loads(told.stdout)["greedy"]["questions"] == 2


@pytest.mark.slow
def test_ctrl_c_tells_what_was_spent_and_keeps_complete_sets(folder: Path) -> None:
    def model(_: Seen) -> Any:
        return Reply(chat(ANSWER), delay=30.0 if len(fake.seen) > 6 else 0.0)

    with serving(model) as fake:
        words = [
            "eval",
            fake.url,
            "--model",
            "tiny",
            "--suite",
            "multihop",
            "dataset=qa",
            "corpus=corpus.jsonl",
        ]
        process = subprocess.Popen(
            # A test run in the background of a shell ignores SIGINT, and so would its children.
            [sys.executable, "-c", f"{HEED_SIGINT}; from at2po_agent.cli.app import main; main()", *words],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 120
        while len(fake.seen) < 7 and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Stopped after 7 requests: 60 prompt tokens" in errors
    assert "complete are in suite_multihop.json" in errors
    assert "Traceback" not in errors
