import asyncio
import threading
import time
from collections.abc import Sequence

from at2po_env.data.passages import Passage
from at2po_env.retrieval.bm25.retriever import Bm25Retriever
from at2po_env.retrieval.server.batching import IN_LOOP_S, DynamicBatcher


class Noting:
    """Notes the thread of each search; takes the time that it is told to."""

    digest = "d" * 64

    def __init__(self, *, computes_only: bool) -> None:
        self.computes_only, self.seconds = computes_only, 0.0
        self.threads = list[int]()

    def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        self.threads.append(threading.get_ident())
        time.sleep(self.seconds)
        return [[Passage("0", query, "text", float(topk))] for query in queries]


def searched(retriever: Noting, seconds: list[float]) -> list[bool]:
    """For each search of so many seconds: was it made in the thread of the event loop?"""

    async def ask() -> None:
        batcher = DynamicBatcher(retriever)
        for number, retriever.seconds in enumerate(seconds):
            assert (await batcher.search([f"q{number}"], 3))[0][0].title == f"q{number}"
        await batcher.close()

    asyncio.run(ask())
    return [thread == threading.get_ident() for thread in retriever.threads]


def test_short_searches_that_only_compute_are_made_in_the_loop() -> None:
    # The first one shows how long they take; one that was long sends the next to a thread.
    long = 3 * IN_LOOP_S
    assert searched(Noting(computes_only=True), [0.0, 0.0, long, 0.0, 0.0]) == [
        False,
        True,
        True,
        False,
        True,
    ]


def test_searches_that_may_wait_never_hold_up_the_loop() -> None:
    assert searched(Noting(computes_only=False), [0.0] * 5) == [False] * 5


def test_requests_get_in_between_searches_in_the_loop(passages: tuple[Passage, ...]) -> None:
    retriever, seen = Bm25Retriever.from_passages(passages), list[str]()
    assert retriever.computes_only

    async def ask(batcher: DynamicBatcher, name: str, times: int) -> None:
        for _ in range(times):
            await batcher.search(["enigma"], 1)
            seen.append(name)

    async def both() -> None:
        batcher = DynamicBatcher(retriever, max_batch=1)
        await asyncio.gather(ask(batcher, "a", 30), ask(batcher, "b", 30))
        await batcher.close()

    asyncio.run(both())
    assert max(len(run) for run in "".join(seen).replace("ab", "a b").replace("ba", "b a").split()) <= 2
