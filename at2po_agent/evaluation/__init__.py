"""How good a policy is: no tree, one chain per question.

Read `evaluate` (one policy, one environment), `metrics` (figures about trees), `of_run` (a run's
checkpoint), `suite` and `suite_run` (the seven published sets), `served` (a model behind an address).
"""
