"""Implements the command line `at2po`.

Nothing heavy is imported before a command needs it: help, `envs` and `data` never load torch. An error that
at2po raises on purpose is printed as one message, with exit code 2; any other is a bug and has a traceback.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from at2po_agent.cli.config import config_command
from at2po_agent.cli.eval import EXIT_INTERRUPTED, evaluate_command, need_agent_extra
from at2po_agent.cli.export import export_command
from at2po_agent.cli.retrieval import app as retrieval_app
from at2po_agent.cli.serving import app as serving_app
from at2po_env.errors import At2poError, DataError

if TYPE_CHECKING:
    from at2po_agent.config.sections import Config

EXIT_ERROR = 2
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)


def _examples(*commands: str) -> str:
    return "\n\n".join(("Examples:", *(f"[cyan]{command}[/cyan]" for command in commands)))


class _Commands(TyperGroup):
    """Turns at2po's own errors, and those of a disk that refuses, into one message."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except (At2poError, OSError) as error:
            text = str(error)
            if isinstance(error, OSError):
                if error.errno not in DISK_ERRORS:
                    raise
                text = f"{error.filename or 'a file'}: cannot be written ({error.strerror}); make room first"
            console = Console(stderr=True)
            console.print("Error:", style="bold red", end=" ")
            console.print(text, markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(EXIT_ERROR) from error


app = typer.Typer(
    cls=_Commands,
    help="Environments you can fork, trees you can train on.",
    epilog=_examples("at2po train quickstart", "at2po view runs/quickstart", "at2po envs"),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(
    help="Download questions and corpora, and show where they are.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.add_typer(data_app, name="data")
app.add_typer(retrieval_app)
app.add_typer(serving_app)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Settings that win over the configuration, such as train.steps=20."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def main() -> None:
    """Entry point of the console script."""
    warnings.formatwarning = _warning_line
    app(prog_name="at2po")


def _warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Print our own warnings for a person at the terminal; others keep file and line."""
    if category.__module__.startswith("at2po"):
        return f"Warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n{line or ''}"


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"at2po {version('at2po')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_say_version)
    ] = False,
) -> None:
    del show_version  # its callback has dealt with it


@app.command(
    epilog=_examples(
        "at2po train quickstart --smoke",
        "at2po train quickstart algorithm=grpo run.seed=1",
        "at2po train runs/quickstart --resume",
    )
)
def train(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A shipped configuration, a YAML file, or a run's folder.")
    ],
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with a run that was stopped: the one in the folder, or the newest of this name.",
        ),
    ] = False,
    smoke: Annotated[
        bool,
        typer.Option("--smoke", help="Cut the run down to about a minute, to check that everything works."),
    ] = False,
) -> None:
    """Train a policy, and evaluate it before and after; all results are kept in the run's folder."""
    need_agent_extra()
    from at2po_agent.cluster.launch import launch
    from at2po_agent.cluster.learners import check_learners, launched, rank
    from at2po_agent.config.loading import load_config
    from at2po_agent.health import ServiceError
    from at2po_agent.report.live import make_listener
    from at2po_agent.run import run_training

    # A run's folder may have been moved since its configuration was written.
    given = [f"run.dir={config}", *(overrides or [])] if Path(config).is_dir() else overrides or []

    def note(text: str) -> None:
        typer.echo(f"Note: {text}", err=True)

    loaded = load_config(config, given, note=note)
    if smoke:
        loaded = load_config(config, [*smoke_overrides(loaded), *given])
    if loaded.cluster.learners > 1 and launched() == 1 and not loaded.run.dry_run:
        check_learners(loaded, here=loaded.cluster.learners)
        if code := launch(loaded.cluster.learners, _learn, config, overrides, resume, smoke):
            raise typer.Exit(code)
        return
    try:
        with contextlib.closing(make_listener(Console(stderr=True))) as progress:
            summary = run_training(loaded, resume=resume, progress=progress)
    except KeyboardInterrupt as stop:
        if rank() == 0:
            _say_interrupted(stop, loaded)
        raise typer.Exit(EXIT_INTERRUPTED) from stop
    except ServiceError as error:
        if error.summary is not None and rank() == 0:
            _say_ending(config, Path(error.summary["folder"]), error.summary)
        raise
    if "folder" in summary and rank() == 0:
        _say_ending(config, Path(summary["folder"]), summary)


def _learn(config: str, overrides: list[str] | None, resume: bool, smoke: bool) -> None:
    """The command `train` in the process of one learner."""
    from at2po_agent.cluster.learners import rank

    warnings.formatwarning = _warning_line
    if rank() > 0:
        warnings.simplefilter("ignore")  # the first says it
    try:
        train(config, overrides, resume, smoke)
    except typer.Exit as left:
        raise SystemExit(left.exit_code) from left


def smoke_overrides(config: Config) -> list[str]:
    """Return the settings that cut a larger run down to a check that everything works."""
    largest = {
        "cold_start.steps": (config.cold_start.steps, 200),
        "cold_start.demonstrations": (config.cold_start.demonstrations, 1200),
        "train.steps": (config.train.steps, 4),
        "train.save_trees_every": (config.train.save_trees_every, 2),
        "eval.questions": (config.eval.questions, 50),
        "eval.every": (config.eval.every, 0),
    }
    smaller = [f"{key}={most}" for key, (value, most) in largest.items() if value > most]
    return [*smaller, f"run.name={config.run.name.removesuffix('-smoke')}-smoke"]


app.command(
    "eval",
    epilog=_examples(
        "at2po eval runs/quickstart",
        "at2po eval runs/quickstart eval.questions=500 --json",
        "at2po eval Qwen/Qwen3-4B dataset=dev.jsonl corpus=wiki-18.jsonl",
        "at2po eval runs/qwen3-4b-multihop --suite all --json all.json eval.questions=500",
        "at2po eval http://localhost:8000/v1 --model NAME --env at2po/HotpotQA-v0",
        "at2po eval https://HOST/v1 --model NAME served.api_key_env=OPENAI_API_KEY --suite all",
    ),
)(evaluate_command)
app.command(
    "config",
    epilog=_examples(
        "at2po config learning rate",
        "at2po config clip --of quickstart --set algorithm=grpo",
        "at2po config --of quickstart --out mine.yaml",
        "at2po config --schema",
    ),
)(config_command)

app.command(
    "export",
    epilog=_examples(
        "at2po export runs/quickstart",
        "at2po export runs/qwen3-4b-multihop --step 240 --out model --max-shard-size 2GB",
        "at2po export runs/qwen3-4b-multihop --push OWNER/NAME",
    ),
)(export_command)


@app.command(
    epilog=_examples(
        "at2po view runs/quickstart",
        "at2po view runs/quickstart --list",
        "at2po view runs/quickstart/trees/step_000010.jsonl --question 2 --out tree.html",
    )
)
def view(
    source: Annotated[Path, typer.Argument(metavar="RUN|TREES", help="A run's folder, or a file of trees.")],
    question: Annotated[
        str | None,
        typer.Option(
            help="Id of the question, or its number in --list. By default the tree whose leaves differ most."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write. The default is tree.html in the run's folder, or beside the file of trees."
        ),
    ] = None,
    list_only: Annotated[
        bool, typer.Option("--list", help="List the trees instead of writing a page.")
    ] = False,
) -> None:
    """Write one question's tree as a page for the browser, in a single file that loads nothing."""
    from at2po_agent.report.run_folder import pick, read_trees, tree_file
    from at2po_agent.report.run_report import TREE_PAGE, page_options, run_of
    from at2po_agent.report.tables import shown_path, tree_table
    from at2po_agent.report.tree_page import write_tree_page

    records = read_trees(source)
    if list_only:
        Console().print(tree_table(records, shown_path(tree_file(source))))
        return
    record, run = pick(records, question), run_of(source)
    target = out or ((source if source.is_dir() else source.parent) / TREE_PAGE)
    typer.echo(shown_path(write_tree_page(target, record, page_options(record, run))))


@app.command(
    epilog=_examples(
        "at2po plot runs/quickstart",
        "at2po plot runs/at2po runs/at2po-2 runs/grpo --out figures --format svg",
        "at2po plot runs/quickstart --only training,forks --json",
    )
)
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of runs.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the pictures. The default is plots in the first run's folder."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Figure to draw: training, exact_match, reward, success, forks or cost; several with commas "
            "or by repeating the option. By default all.",
        ),
    ] = None,
    image: Annotated[str, typer.Option("--format", help="png or svg.")] = "png",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the numbers behind the figures instead of their files.")
    ] = False,
) -> None:
    """Draw training, scores, forks and cost of runs; those that differ only in their seed become one mean."""
    from at2po_agent.report.plots import plot_runs
    from at2po_agent.report.tables import shown_path

    names = None if only is None else [name.strip() for text in only for name in text.split(",")]
    plots = plot_runs(runs, out or runs[0] / "plots", only=names, image=image)
    for name, reason in plots.left_out.items():
        typer.echo(f"{name} is left out: {reason}", err=True)
    for note in plots.notes:
        typer.echo(note, err=True)
    if as_json:
        _print_json(plots.to_json())
    else:
        for file in plots.files.values():
            typer.echo(shown_path(file))


@app.command(epilog=_examples("at2po envs", "at2po envs --json"))
def envs(as_json: AsJson = False) -> None:
    """List the environment ids with the data that they need."""
    from at2po_agent.report.listings import environment_rows, environment_table

    rows = environment_rows()
    if as_json:
        _print_json([row._asdict() for row in rows])
    else:
        Console().print(environment_table(rows))


@data_app.command("list", epilog=_examples("at2po data list", "at2po data list --json"))
def data_list(as_json: AsJson = False) -> None:
    """List the data sets that can be downloaded, and which of them are on this machine."""
    from at2po_agent.report.listings import data_rows, data_table

    rows = data_rows()
    if as_json:
        _print_json([row._asdict() for row in rows])
    else:
        Console().print(data_table(rows))


@data_app.command("get", epilog=_examples("at2po data get hotpotqa wiki-18", "at2po data get all"))
def data_get(
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="Names from `at2po data list`, or all.")],
) -> None:
    """Download data sets into the cache; an interrupted download goes on where it stopped."""
    from at2po_agent.report.listings import plain_download_report
    from at2po_env.data.download import get

    errors = Console(stderr=True)
    report = None if errors.is_terminal else plain_download_report(lambda text: typer.echo(text, err=True))
    for name in names:
        for path in get(name, progress=report):
            typer.echo(path)


@data_app.command("path", epilog=_examples("at2po data path", "at2po data path hotpotqa"))
def data_path(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A name from `at2po data list`.")] = None,
) -> None:
    """Print the files of a data set, or the folder of all data."""
    from at2po_agent.report.listings import data_files
    from at2po_env.data.cache import cache_dir

    if name is None:
        typer.echo(cache_dir())
        return
    found = data_files(name)
    if not found:
        raise DataError(f"{name!r} is not on this machine. Fix: at2po data get {name}")
    for path in found:
        typer.echo(path)


def _say_ending(config: str, run: Path, summary: dict[str, Any]) -> None:
    from at2po_agent.report.run_report import write_run_report
    from at2po_agent.report.tables import command_line, print_ending, shown_path

    program, folder = _program(), shown_path(run)
    other = "at2po" if summary.get("algorithm") == "grpo" else "grpo"
    again = [config] if not Path(config).is_dir() else [f"{folder}/config.yaml", "run.dir=null"]
    commands = [
        (command_line(*program, "view", folder, "--list"), "the trees that were kept"),
        (command_line(*program, "eval", folder, "eval.questions=500"), "a tighter estimate"),
        (command_line(*program, "train", *again, f"algorithm={other}"), "another algorithm, to compare"),
    ]
    print_ending(Console(), run, summary, write_run_report(run), commands)


def _say_interrupted(stop: KeyboardInterrupt, config: Config) -> None:
    """Say what was saved and how to go on, with the command as it can be typed here."""
    from at2po_agent.report.run_report import write_run_report
    from at2po_agent.report.tables import command_line

    fallback = Path(config.run.dir) if config.run.dir else None
    run: Path | None = getattr(stop, "folder", fallback)
    if run is not None and run.is_dir():
        write_run_report(run)
    text = str(stop).replace("at2po ", command_line(*_program()) + " ", 1) or "stopped"
    Console(stderr=True).print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _program() -> list[str]:
    """Return the words that call this program, so that printed commands can be typed here."""
    called = Path(sys.argv[0])
    if called.name != "at2po":
        return ["at2po"]
    found = shutil.which("at2po")
    if found is not None and Path(found).resolve() == called.resolve():
        return ["at2po"]
    from at2po_agent.report.tables import shown_path

    return [shown_path(called)]


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
