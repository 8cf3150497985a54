"""A circuit breaker: a server that keeps failing is left alone for a while, so that nobody waits for it."""

import threading
import time


class CircuitBreaker:
    """Open after `failures` calls in a row that failed; then one call at a time may try after `rest_s`.

    Args:
        failures: Failed calls in a row that open it.
        rest_s: Seconds for which calls are refused before one is let through to try.
    """

    def __init__(self, failures: int = 5, rest_s: float = 5.0) -> None:
        self._limit, self._rest_s = failures, rest_s
        self._failed, self._next_try = 0, 0.0
        self._lock = threading.Lock()

    def allows(self) -> bool:
        """Whether a call may go out now; a yes on an open circuit is for the caller alone."""
        with self._lock:
            if self._failed < self._limit:
                return True
            now = time.monotonic()
            if now < self._next_try:
                return False
            self._next_try = now + self._rest_s
            return True

    def record(self, ok: bool) -> None:
        """Tell how a call went."""
        with self._lock:
            self._failed = 0 if ok else self._failed + 1
            if not ok:
                self._next_try = time.monotonic() + self._rest_s
