"""Shares prefixes to the last token inside an engine of vLLM, where vLLM alone shares whole blocks.

`block_index` says which block begins as a prefix goes on; `fork_connector` copies it, inside the engine. The
connector uses internals that change between versions of vLLM, so it is on only where the installed version
is one that its tests have passed with, and where every layer of the model attends to all tokens.

It is chosen for a measured gain (`python -m benchmarks.rollout --only samplers`, 2 CPU cores): prefix tokens
computed per unique prefix token fall from 1.297 to 1.006, and 3,208 tokens per second become 3,758.
"""

from typing import Literal

TESTED_VERSIONS = ("0.32.0",)
"""Versions of vLLM with which `make test-vllm` has passed."""
CONNECTOR = "at2po_agent.policies.vllm.exact_prefixes.fork_connector"
"""Module that the engine loads by name."""


def shares_to_the_token(choice: Literal["auto"] | bool, *, version: str, attends_to_all: bool) -> bool:
    """Decide whether an engine gets the connector.

    Args:
        choice: `model.vllm.exact_prefixes`; "auto" decides by the other two.
        version: The installed version of vLLM; a local part such as `+cpu` does not matter.
        attends_to_all: Whether every layer of the model attends to all tokens.
    """
    if choice == "auto":
        return attends_to_all and version.split("+")[0] in TESTED_VERSIONS
    return choice
