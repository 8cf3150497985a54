"""From trees with credit to new weights.

Read `step` (the updates of one training step), `learner` (log-probs and one optimiser update), `reference`
(the frozen model of KL terms) and `mismatch` (sampler against learner).
"""
