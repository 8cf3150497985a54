"""`at2po index` and `at2po serve-retriever`."""

import contextlib
import functools
import os
from pathlib import Path
from typing import Annotated

import typer

from at2po_env.errors import ConfigError

app = typer.Typer()


@app.command("index")
def index(
    corpus: Annotated[Path | None, typer.Argument(help="JSON lines in wiki-18 form.")] = None,
    kind: Annotated[str, typer.Option(help="bm25, lucene, flat, ivf, hnsw or ivfpq.")] = "bm25",
    out: Annotated[Path | None, typer.Option(help="Folder; default: beside the corpus.")] = None,
    encoder: Annotated[
        str, typer.Option(help="e5, bge, gte, minilm, or any sentence-transformers model.")
    ] = "e5",
    device: Annotated[str | None, typer.Option(help="Where the encoder runs.")] = None,
    tokens: Annotated[str, typer.Option(help="Of lucene: english (stemmed) or plain.")] = "english",
    verify: Annotated[
        Path | None, typer.Option(help="Build nothing; compare all of this index with its checksums.")
    ] = None,
) -> None:
    """Build a search index of a corpus; one that was killed goes on where it stopped."""
    from at2po_env.retrieval.building import build_index, verify_index

    if verify is not None:
        found = verify_index(verify, corpus)
        size = sum(file.bytes for file in found.files.values()) / 1e6
        typer.echo(f"{verify} is whole: {found.kind}, {found.passages:,} passages, {size:,.1f} MB")
        return
    if corpus is None:
        raise typer.BadParameter("give CORPUS, or --verify FOLDER", param_hint="CORPUS")
    folder = build_index(corpus, kind, out=out, encoder=encoder, device=device, tokens=tokens)
    typer.echo(f"{kind} index: {folder}")


@app.command("serve-retriever")
def serve_retriever(
    corpus: Annotated[Path, typer.Argument(help="JSON lines in wiki-18 form.")],
    retriever: Annotated[str, typer.Option(help="bm25, lucene, dense or hybrid.")] = "bm25",
    host: Annotated[str, typer.Option(help="Others than loopback need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any free one.")] = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the bearer token that requests must carry; default: AT2PO_RETRIEVER_TOKEN."
        ),
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="SQLite file that keeps results.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Each opens the corpus and answers for itself.")] = 1,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="Option of the retriever, NAME=VALUE; repeatable."),
    ] = None,
) -> None:
    """Serve searches over HTTP: POST /retrieve as Search-R1's clients expect, /health, /metrics."""
    from at2po_env.retrieval import open_retriever
    from at2po_env.retrieval.client import TOKEN_VARIABLE
    from at2po_env.retrieval.server.app import ServerConfig
    from at2po_env.retrieval.server.running import serve, serve_processes

    token = read_token(token_file, TOKEN_VARIABLE)
    config = ServerConfig.model_validate({"host": host, "port": port, "token": token, "processes": processes})
    config.check_address()
    opener = functools.partial(open_retriever, retriever, corpus, cache=cache, **read_options(option or []))
    where = f"http://{host}:{port} (process {os.getpid()}; Ctrl-C stops it)"
    if processes > 1:
        typer.echo(f"serving {retriever} of {corpus} by {processes} processes on {where}")
        serve_processes(opener, config)
        return
    opened = opener()
    typer.echo(f"serving {opened!r} on {where}")
    serve(opened, config)


def read_token(file: Path | None, variable: str) -> str | None:
    """Read a token from a file or the environment; other users of the machine could read an argument."""
    if file is None:
        return os.environ.get(variable)
    try:
        return file.read_text("utf-8").strip()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot read the token from {file} ({error}).") from error


def read_options(given: list[str]) -> dict[str, object]:
    """Parse NAME=VALUE; numbers, true and false become what they say."""
    options: dict[str, object] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"{text!r} is not NAME=VALUE")
        options[name] = {"true": True, "false": False}.get(value, value)
        for number in (float, int):
            with contextlib.suppress(ValueError):
                options[name] = number(value)
    return options
