from pathlib import Path

import pytest
from typer.testing import CliRunner

from at2po_agent.cli.retrieval import app
from at2po_env.errors import ConfigError, RetrievalError

runner = CliRunner()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"id": "0", "contents": "\\"Ada\\"\\nwrote programs"}\n')
    return path


def test_index_builds_beside_the_corpus_and_says_where(corpus: Path) -> None:
    result = runner.invoke(app, ["index", str(corpus), "--kind", "bm25"])
    assert result.exit_code == 0, result.output
    (home,) = corpus.parent.glob("corpus.jsonl.bm25-*")
    assert (home / "manifest.json").exists()
    assert home.name in result.output.replace("\n", "")


def test_index_goes_where_it_is_told_and_is_verified_there(corpus: Path, tmp_path: Path) -> None:
    home = tmp_path / "elsewhere"
    built = runner.invoke(app, ["index", str(corpus), "--out", str(home)])
    assert built.exit_code == 0, built.output
    for arguments in ([], [str(corpus)]):
        result = runner.invoke(app, ["index", *arguments, "--verify", str(home)])
        assert result.exit_code == 0, result.output
        assert "is whole: bm25, 1 passages" in result.output.replace("\n", "")
    rows = home / "rows.u32"
    rows.write_bytes(bytes(byte ^ 1 for byte in rows.read_bytes()))
    result = runner.invoke(app, ["index", "--verify", str(home)])
    assert isinstance(result.exception, RetrievalError)
    assert str(rows) in str(result.exception)


def test_index_needs_a_corpus_or_something_to_verify() -> None:
    result = runner.invoke(app, ["index"])
    assert result.exit_code == 2
    assert "--verify FOLDER" in result.output


def test_an_unknown_kind_is_an_error_that_names_the_known_ones(corpus: Path) -> None:
    result = runner.invoke(app, ["index", str(corpus), "--kind", "annoy"])
    assert isinstance(result.exception, ConfigError)
    assert "bm25, lucene, flat" in str(result.exception)


def test_serving_beyond_this_machine_needs_a_token(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("starlette", reason="needs the extra 'serve'")
    monkeypatch.delenv("AT2PO_RETRIEVER_TOKEN", raising=False)
    result = runner.invoke(app, ["serve-retriever", str(corpus), "--host", "0.0.0.0"])
    assert isinstance(result.exception, ConfigError)


def test_the_token_comes_from_a_file_or_the_environment_and_never_from_an_argument(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("starlette", reason="needs the extra 'serve'")
    from at2po_env.retrieval.server import running
    from at2po_env.retrieval.server.app import ServerConfig

    seen = list[str | None]()

    def serve(_retriever: object, config: ServerConfig) -> None:
        seen.append(config.token and config.token.get_secret_value())

    monkeypatch.setattr(running, "serve", serve)
    monkeypatch.setenv("AT2PO_RETRIEVER_TOKEN", "of the environment")
    (tmp_path / "token").write_text("of the file\n")
    command = ["serve-retriever", str(corpus)]
    assert runner.invoke(app, command).exit_code == 0
    assert runner.invoke(app, [*command, "--token-file", str(tmp_path / "token")]).exit_code == 0
    assert seen == ["of the environment", "of the file"]
    missing = runner.invoke(app, [*command, "--token-file", str(tmp_path / "missing")])
    assert isinstance(missing.exception, ConfigError)
    assert "No such option" in runner.invoke(app, [*command, "--token", "t"]).output


@pytest.mark.parametrize(("options", "says"), [(["-o", "k1"], "NAME=VALUE"), (["-o", "k9=1"], "k9")])
def test_a_wrong_option_is_an_error(corpus: Path, options: list[str], says: str) -> None:
    pytest.importorskip("starlette", reason="needs the extra 'serve'")
    result = runner.invoke(app, ["serve-retriever", str(corpus), *options])
    assert says in result.output or says in str(result.exception)
    assert not isinstance(result.exception, TypeError | RetrievalError) or "k9" in str(result.exception)
