"""Implements `at2po export`: a run's checkpoint as a plain Hugging Face folder."""

from pathlib import Path
from typing import Annotated

import typer

from at2po_agent.cli.eval import need_agent_extra


def export_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write. The default is RUN/export/step_NUMBER.")
    ] = None,
    step: Annotated[
        int | None, typer.Option(min=0, help="Step of the checkpoint. The default is the newest.")
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Most bytes of one file of weights.")
    ] = "5GB",
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace an earlier export in the same folder.")
    ] = False,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Also push it to the hub, as a private model.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="With --push: a model that is created there is public.")
    ] = False,
) -> None:
    """Write a checkpoint as a folder that transformers loads, with a model card; adapters are merged."""
    need_agent_extra()
    from at2po_agent.integrations.export import export_run
    from at2po_agent.integrations.hub import push as push_folder
    from at2po_agent.report.tables import shown_path

    exported = export_run(run, out, step=step, max_shard_size=max_shard_size, replace=replace)
    typer.echo(shown_path(exported.folder))
    if push is not None:
        typer.echo(push_folder(exported.folder, push, public=public))
