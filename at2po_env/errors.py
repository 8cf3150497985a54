"""The error model: a bad rollout is data, a bug is an exception.

What a policy can cause (malformed text, a failing tool, an exhausted budget) never raises: it becomes a
recorded outcome. What a user can cause (a wrong path, an unknown key, a broken line of data) raises one of
these, with what happened, what was expected and how to fix it. Anything else that raises is a bug.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class At2poError(Exception):
    """Root of every error that at2po raises on purpose."""


class EnvError(At2poError):
    """An environment was used, built or registered wrongly."""


class SnapshotError(EnvError):
    """A state cannot be captured, written, read or put back."""


class ContractError(EnvError, AssertionError):
    """An environment breaks the Gymnasium interface or the fork contract."""


class ToolError(At2poError):
    """A tool is declared wrongly; one that fails at run time is data, not an exception."""


class RetrievalError(At2poError):
    """A corpus, an index or a retriever does not fit the request."""


class PolicyError(At2poError):
    """A policy cannot be built or broke its protocol."""


class ConfigError(At2poError):
    """A configuration is invalid; carries every problem found, not only the first."""


class DataError(At2poError):
    """A data file is missing, truncated or malformed; names the file and the line."""


class MissingExtraError(At2poError, ImportError):
    """An optional dependency is not installed; names the extra that brings it."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module, or say which extra installs it.

    Args:
        module: Dotted name of the module to import.
        extra: The extra of this distribution that installs it.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: If the module (or something that it imports) is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{module!r} needs {error.name!r}, which is not installed. Fix: pip install 'at2po[{extra}]'"
        ) from error
