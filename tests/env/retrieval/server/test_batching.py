import asyncio
import threading
import time
from collections.abc import Sequence

from at2po_env.data.corpus import Passage
from at2po_env.retrieval.bm25.retriever import Bm25Retriever
from at2po_env.retrieval.server.batching import DynamicBatcher


def test_a_search_never_holds_up_the_loop() -> None:
    threads = set[int]()

    class Slow:
        digest = "d" * 64

        def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
            threads.add(threading.get_ident())
            time.sleep(0.2)
            return [[Passage("0", query, "text", float(topk))] for query in queries]

    async def ask() -> int:
        batcher, ticks = DynamicBatcher(Slow()), 0
        search = asyncio.create_task(batcher.search(["q"], 3))
        while not search.done():
            await asyncio.sleep(0.01)
            ticks += 1
        assert (await search)[0][0].title == "q"
        await batcher.close()
        return ticks

    assert asyncio.run(ask()) > 5
    assert threading.get_ident() not in threads


def test_a_search_right_after_another_is_not_forgotten(passages: tuple[Passage, ...]) -> None:
    async def ask() -> None:
        batcher = DynamicBatcher(Bm25Retriever.from_passages(passages))
        for _ in range(3):
            assert await batcher.search(["enigma"], 1)
        await batcher.close()

    asyncio.run(asyncio.wait_for(ask(), 20))


def test_requests_get_in_between_searches(passages: tuple[Passage, ...]) -> None:
    retriever, seen = Bm25Retriever.from_passages(passages), list[str]()

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
