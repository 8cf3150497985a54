"""What a configuration's algorithm section asks of the learner: its loss as an objective, its credit rule."""

import inspect

from at2po_agent.config.sections import AlgorithmConfig
from at2po_agent.credit.registry import Credit, credit_rules
from at2po_agent.learning.learner import Objective
from at2po_agent.losses import get_loss, make_loss
from at2po_agent.tree import Tree


def objective(settings: AlgorithmConfig) -> Objective:
    """The loss that a configuration names, with its options."""
    spec = get_loss(settings.loss)
    built_in = spec.function.__module__.startswith("at2po_agent.losses.")
    return Objective(
        make_loss(settings.loss, settings.loss_options),
        divisible="totals" in inspect.signature(spec.function).parameters,
        needs_advantage=built_in and not (settings.kl_weight and settings.kl_place == "loss"),
        needs_entropy="entropies" in spec.requires,
        kl_weight=settings.kl_weight if settings.kl_place == "loss" else 0.0,
        kl_estimator=settings.kl_estimator,
        level=spec.level,
    )


def give_credit(tree: Tree, settings: AlgorithmConfig) -> Credit:
    """Advantages of one tree under the credit rule that a configuration names."""
    return credit_rules()[settings.credit](tree, **settings.credit_options)
