"""Makes any environment forkable.

Read in this order: `base` (the class to inherit, and `snapshot`, `restore`, `fork` for any stack of
wrappers), `snapshots` (the state of an environment as one frozen value with a digest), `layers` and `capture`
(wrappers are copied by value), `wrapper_state` (the JSON of known wrappers, and how others say what their
state is), `random_state` (generators as values) and `frozen` (immutable JSON values).
"""

from at2po_env.forking.base import ForkableEnv, fork, restore, snapshot
from at2po_env.forking.frozen import EMPTY, FrozenDict, Shared, freeze, thaw
from at2po_env.forking.snapshots import Snapshot

__all__ = [
    "EMPTY",
    "ForkableEnv",
    "FrozenDict",
    "Shared",
    "Snapshot",
    "fork",
    "freeze",
    "restore",
    "snapshot",
    "thaw",
]
