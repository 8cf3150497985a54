import pytest

from at2po_agent.environments import EnvCounters
from at2po_env.retrieval.counters import count


def test_counters_show_what_rose_since_they_were_made():
    count(requests=10, queries=12, retries=1)
    counters = EnvCounters()
    assert counters.figures() == {}
    count(requests=4, queries=8)
    assert counters.figures()["retrieval/failures"] == 0
    count(failures=2, circuit_open=1)
    assert counters.figures() == {
        "retrieval/requests": 4,
        "retrieval/queries": 8,
        "retrieval/failures": 2,
        "retrieval/circuit_open": 1,
    }
    assert EnvCounters().figures() == {}


def test_the_hit_rate_is_that_of_the_step_alone():
    count(cache_hits=100)
    counters = EnvCounters()
    count(cache_hits=3, cache_misses=1)
    assert counters.figures()["retrieval/cache_hit_rate"] == pytest.approx(0.75)
    counters = EnvCounters()
    count(cache_misses=2)
    assert counters.figures()["retrieval/cache_hit_rate"] == 0.0
    counters = EnvCounters()
    count(requests=1)
    assert "retrieval/cache_hit_rate" not in counters.figures()
