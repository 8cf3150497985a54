"""Environments over HTTP, so that other programs and machines can play and fork their episodes.

Read `messages` first (what is asked and answered), then `sessions` (the episodes of a server), `app` (the
server, extra `serve`), `openenv` (OpenEnv's protocol on the same server) and `client` (`RemoteEnv`, a served
environment as a forkable one).
"""

import gymnasium

from at2po_env.serving.client import RemoteEnv

REMOTE_ID = "at2po/Remote-v0"

if REMOTE_ID not in gymnasium.registry:
    gymnasium.register(
        REMOTE_ID,
        entry_point="at2po_env.serving.client:RemoteEnv",
        vector_entry_point="at2po_env.serving.client:make_remote_vector",
        order_enforce=False,
        disable_env_checker=True,
    )

__all__ = ["REMOTE_ID", "RemoteEnv"]
