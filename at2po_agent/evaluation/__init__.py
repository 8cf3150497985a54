"""Measures how good a policy is: no tree, one chain per question.

Read `evaluate` (one policy in one environment), `metrics` (figures of trees), `published` (the seven sets and
their published figures), `suite` (evaluates on these sets), `target` (what `at2po eval` is given: a run, a
checkpoint, a model, or the address of a served one).
"""
