"""Pushes an exported folder to the Hugging Face Hub, with huggingface_hub's own client and token."""

from __future__ import annotations

from pathlib import Path

from at2po_agent.integrations.export import ExportError
from at2po_env.errors import require


def push(folder: Path, name: str, *, public: bool = False) -> str:
    """Upload a folder as a model, as one commit.

    Args:
        folder: What `export_run` wrote.
        name: OWNER/NAME on the hub; a new one is created, and an old one gets another commit.
        public: Whether a model that is created is open to everybody.

    Returns:
        The address of the commit.

    Raises:
        MissingExtraError: huggingface_hub is not installed.
        ExportError: The hub refuses or cannot be reached.
    """
    hub, errors = require("huggingface_hub", "hub"), require("huggingface_hub.errors", "hub")
    api = hub.HfApi()
    try:
        api.create_repo(name, repo_type="model", private=not public, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name, folder_path=str(folder), repo_type="model", commit_message=f"Upload {folder.name}"
        )
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.HTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(
            f"{name}: the hub did not take it ({reason}); the folder {folder} is complete. Fix: check the "
            "name and HF_TOKEN (a token that may write), then push again"
        ) from error
    return str(commit.commit_url)
