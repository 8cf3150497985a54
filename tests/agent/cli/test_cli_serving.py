"""`at2po serve-env`: a real server process, its arguments, and its end."""

import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
from typer.testing import CliRunner

pytest.importorskip("uvicorn", reason="needs the extra serve")

from at2po_agent.cli.app import app
from at2po_env import fork
from at2po_env.serving import RemoteEnv

runner = CliRunner()


def test_a_served_process_is_played_and_forked_until_it_is_stopped() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["serve-env", "at2po/MiniWiki-v0", "-o", "split=test", "--kwargs", '{"hops": [2]}']
    program = [
        sys.executable,
        "-c",
        "from at2po_agent.cli import main; main()",
        *command,
        "--port",
        str(port),
    ]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        url = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 60
        while True:
            try:
                assert httpx.get(f"{url}/health").json() == {"status": "ok", "sessions": 0}
                break
            except httpx.TransportError:
                assert time.monotonic() < until
                assert server.poll() is None
                time.sleep(0.1)
        env = RemoteEnv(url)
        env.reset(seed=3)
        env.step("<think> a </think> <search> film </search>")
        twin = fork(env)
        action = "<think> b </think> <search> director </search>"
        assert env.step(action) == twin.step(action)
        server.send_signal(signal.SIGTERM)
        output, _ = server.communicate(timeout=30)
    assert server.returncode in (0, -signal.SIGTERM)
    assert "Traceback" not in output


def test_wrong_arguments_are_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AT2PO_ENV_TOKEN", raising=False)
    command = ["serve-env", "at2po/MiniWiki-v0"]
    for arguments, says in (
        (["serve-env", "no/Such-v0"], "cannot be made"),
        ([*command, "--host", "0.0.0.0"], "AT2PO_ENV_TOKEN"),
        ([*command, "--kwargs", "{"], "--kwargs is no JSON"),
        ([*command, "--kwargs", "[]"], "expected a JSON object"),
        ([*command, "-o", "nothing=1"], "nothing"),
    ):
        result = runner.invoke(app, arguments)
        assert result.exit_code == 2
        assert says in result.output
