"""The command line `at2po`: `app` (all commands), `eval` with `suite` and `served`, `retrieval`."""

from at2po_agent.cli.app import main

__all__ = ["main"]
