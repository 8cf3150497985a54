"""Deadlines: calls that come back, calls that are given up, and a bound for those that linger."""

import threading
from collections.abc import Iterator

import pytest

from at2po_env import deadlines
from at2po_env.deadlines import DeadlineError, Workers, run_with_deadline


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Released at the end of the test, when no abandoned call may linger."""
    event, before = threading.Event(), list(deadlines._abandoned)  # other tests may have left some
    yield event
    event.set()
    own = [thread for entry in list(deadlines._abandoned) if entry not in before for thread in entry[1:]]
    for thread in own:
        thread.join(10)
    assert not any(thread.is_alive() for thread in own)
    assert not deadlines.abandoned_calls(None)
    assert all(entry in before for entry in deadlines._abandoned)


def test_a_call_within_its_time_gives_its_value_or_its_error() -> None:
    assert run_with_deadline(lambda: 3, 10, owner=None) == 3
    assert run_with_deadline(lambda: None, 10, owner=None) is None
    with pytest.raises(ZeroDivisionError):
        run_with_deadline(lambda: 1 // 0, 10, owner=None)


def test_calls_that_never_return_are_bounded_for_each_owner(
    monkeypatch: pytest.MonkeyPatch, release: threading.Event
) -> None:
    monkeypatch.setattr(deadlines, "MAX_ABANDONED", 1)
    hung, sound = object(), object()
    with pytest.raises(DeadlineError, match="timed out"):
        run_with_deadline(lambda: release.wait(30), 0.01, owner=hung)
    with pytest.raises(DeadlineError, match="1 earlier calls that timed out are still running"):
        run_with_deadline(lambda: 1, 10, owner=hung)
    assert run_with_deadline(lambda: 1, 10, owner=sound) == 1
    assert (deadlines.abandoned_calls(hung), deadlines.abandoned_calls(sound)) == (1, 0)


def test_a_pool_works_on_while_calls_of_another_owner_hang(
    monkeypatch: pytest.MonkeyPatch, release: threading.Event
) -> None:
    monkeypatch.setattr(deadlines, "MAX_ABANDONED", 1)
    with pytest.raises(DeadlineError):
        run_with_deadline(lambda: release.wait(30), 0.01, owner="another")
    pool: Workers[str, int] = Workers(1, deadline_s=30, owner="this")
    pool.submit("key", lambda: 7)
    assert pool.collect(float("inf")) == [("key", 7)]
    pool.close(10)


def test_an_owner_is_served_again_when_its_calls_have_returned(
    monkeypatch: pytest.MonkeyPatch, release: threading.Event
) -> None:
    monkeypatch.setattr(deadlines, "MAX_ABANDONED", 1)
    with pytest.raises(DeadlineError):
        run_with_deadline(lambda: release.wait(30), 0.01, owner="a tool")
    release.set()
    for owner, thread in list(deadlines._abandoned):
        thread.join(10 if owner == "a tool" else 0)
    assert run_with_deadline(lambda: 1, 10, owner="a tool") == 1


def test_jobs_without_a_thread_left_are_given_up(
    monkeypatch: pytest.MonkeyPatch, release: threading.Event
) -> None:
    monkeypatch.setattr(deadlines, "MAX_ABANDONED", 2)
    hanging: list[int] = []
    pool: Workers[int, None] = Workers(2, deadline_s=0.02)

    def hang(key: int) -> None:
        hanging.append(key)
        release.wait(30)

    for key in range(9):
        pool.submit(key, lambda key=key: hang(key))
    given_up: list[int] = []
    while pool.pending:
        given_up += [key for key, _ in pool.collect(float("inf"))]
    assert sorted(given_up) == list(range(9))
    assert len(hanging) <= 2 + 1  # two lost, and one that was begun when the first was lost
    pool.close()
