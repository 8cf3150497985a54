"""Several processes that train one model together: the learners.

Every learner runs the same program on the same trees, and holds the whole run in its memory but for a part of
what learns. Read `learners` (what they do together, and how they meet), `shards` (whose weights are where),
`sampling` (their shares of a rollout) and `launch` (how one command becomes several processes).
"""
