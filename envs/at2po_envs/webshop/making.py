"""Makes `at2po/WebShop-v0` from the keyword arguments of `gymnasium.make`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from at2po_env import TextVectorEnv, vector
from at2po_env.data import At2poSampleWarning, cache_dir
from at2po_env.data.cache import SAMPLE
from at2po_env.data.catalog import WEBSHOP
from at2po_env.errors import ConfigError
from at2po_env.retrieval import Retriever
from at2po_envs.webshop.env import WebShopEnv
from at2po_envs.webshop.goals import KINDS, Goals, Kind
from at2po_envs.webshop.shop import Searcher, Shop, open_shop


def make(
    *,
    dataset: str | Path | None = None,
    split: str = "train",
    goals: Kind | None = None,
    retriever: str | Retriever = "bm25",
    retriever_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> WebShopEnv:
    """Make an environment in which one product is bought.

    Args:
        dataset: A folder with the original's `items_shuffle*.json`, `items_ins_v2*.json` and perhaps
            `items_human_ins.json`, or the path of one `items_shuffle*.json`; "small" (1,000 products) or
            "full" for what `at2po data get webshop` or `webshop-full` downloaded. Default: the small set if
            it was downloaded, else the shipped sample.
        split: "train", "dev", "test" or "all".
        goals: "human" or "synthetic"; by default human where there are any. GiGPO and T²PO train on synthetic
            ones.
        retriever: "bm25", "lucene" (as the original), another kind, the address of a server, or a retriever
            whose passages have product ids.
        retriever_options: Keywords of the retriever.
        **options: observation_mode ("text" or "text_rich"), nouns, max_turns, instructions, show_commands and
            render_mode of `WebShopEnv`.
    """
    shop = open_shop(resolve(dataset))
    if goals is None:
        goals = "human" if shop.goal_counts["human"] else "synthetic"
    if goals not in KINDS:
        raise ConfigError(f"goals={goals!r}: expected {' or '.join(map(repr, KINDS))}")
    if isinstance(retriever, str) and not retriever_options:
        searcher = _searcher(shop, retriever)
    else:
        searcher = shop.searcher(retriever, retriever_options)
    return WebShopEnv(shop=shop, goals=_goals(shop, goals, split), searcher=searcher, **options)


# Shared by the environments of a process, with what they remember.
@lru_cache(maxsize=32)
def _goals(shop: Shop, kind: Kind, split: str) -> Goals:
    return shop.goals(kind, split)


@lru_cache(maxsize=8)
def _searcher(shop: Shop, retriever: str) -> Searcher:
    return shop.searcher(retriever)


def make_vector(**options: Any) -> TextVectorEnv:
    """Build many environments, stepped concurrently; they share products and search."""
    return vector.make_vector(make, **options)


def resolve(dataset: str | Path | None) -> Path:
    """Return the folder or file to use; see `make`."""
    cached = {size: cache_dir() / folder for size, folder in WEBSHOP.items()}
    if dataset is not None:
        return cached.get(str(dataset), Path(dataset))
    if any(cached["small"].glob("items_shuffle*.json")):  # which is downloaded last
        return cached["small"]
    warnings.warn(
        At2poSampleWarning(
            "WebShop: using the 18 products that ship with at2po, because no dataset= was given and "
            f"{cached['small']} does not exist. It shows that things run and measures nothing. Fix: `at2po "
            "data get webshop`, or give dataset=PATH."
        ),
        stacklevel=3,
    )
    return SAMPLE / "webshop"
