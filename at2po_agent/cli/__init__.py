"""Implements the command line `at2po`: `app` has all commands, `eval` and `retrieval` the larger ones."""

from at2po_agent.cli.app import main

__all__ = ["main"]
