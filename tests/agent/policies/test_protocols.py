"""What a policy may declare beside `generate`, and what a learner gets from one that declares nothing."""

import pytest
from helpers.guess_env import GuessingPolicy

from at2po_agent.policies.base import TrainablePolicy, as_trainable
from at2po_env.errors import PolicyError


class Counting(GuessingPolicy, TrainablePolicy):
    """Overrides one of the four."""

    updates = 0

    def weights_changed(self) -> None:
        self.updates += 1


class Undeclared(GuessingPolicy):
    """Has one of the four, and is no `TrainablePolicy`."""

    def weights_changed(self) -> None:
        raise AssertionError


def test_a_policy_that_only_generates_gets_defaults_that_do_nothing():
    sampler = as_trainable(GuessingPolicy())
    assert sampler.version == 0
    sampler.weights_changed()
    sampler.rest()
    sampler.close()


def test_a_trainable_policy_is_called_itself():
    policy = Counting()
    sampler = as_trainable(policy)
    sampler.weights_changed()
    sampler.rest()
    assert sampler is policy
    assert (policy.updates, sampler.version) == (1, 0)


def test_methods_that_would_never_be_called_are_refused():
    with pytest.raises(
        PolicyError, match=r"Undeclared has weights_changed, but only a subclass of .*TrainablePolicy"
    ):
        as_trainable(Undeclared())
