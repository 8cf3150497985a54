"""Environments over HTTP, so that other programs and machines can play and fork their episodes.

Read `messages` first (what is asked and answered), then `sessions` (the episodes of a server), `app` (the
server, extra `serve`), `openenv` (OpenEnv's protocol on the same server) and `client` (`RemoteEnv`, a served
environment as a forkable one).
"""

from at2po_env.serving.client import RemoteEnv

__all__ = ["RemoteEnv"]
