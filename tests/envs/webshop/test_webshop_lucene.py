"""The original's search engine behind the shop; run where pyserini and a Java are installed."""

from __future__ import annotations

import pytest
from at2po_envs.webshop.making import make

pytest.importorskip("pyserini")
pytest.importorskip("jnius_config")

pytestmark = pytest.mark.filterwarnings("ignore::at2po_env.data.At2poSampleWarning")


def test_lucene_stems_words_and_the_expert_shops_with_it() -> None:
    env = make(split="all", nouns="rule", retriever="lucene")
    state, _ = env.begin(env.tasks.by_id("B0SAMPLE05-h0"))
    # "bottle" finds "bottles" only where words are stemmed, and "insulating" what is "insulated".
    assert "B0SAMPLE05" in env.obey(state, "search[insulating]").observation
    assert "Total results: 0" in make(split="all").obey(state, "search[insulating]").observation
    for index in range(len(env.tasks)):
        env.reset(options={"index": index})
        for command in env.expert_commands():
            _, reward, terminated, _, _ = env.step(f"<action>{command}</action>")
        assert (reward, terminated) == (1.0, True)
