"""Measurements that the README and the docs quote; each is a command that prints JSON with `--json`.

| `python -m benchmarks.` | measures |
|---|---|
| `env` | a fork and a step of an environment |
| `sandbox` | a call of the python and the shell tool, with and without bubblewrap |
| `rollout`, `policy` | the scheduler against lock-step rounds; the samplers |
| `losses`, `packing`, `step` | the losses, packed trees against rows, a whole training step |
| `retrieval`, `retrieval_hits` | speed, memory and recall of retrievers; titles found by BM25 |
| `campaign` | nothing: it tries to break promises, and counts failures |
| `gradient` | how good each method's estimate of the policy gradient is (`gradient_*`) |
| `algorithms` | every algorithm from one cold start at one budget (`race`, `race_report`) |

Each module's docstring names its keys. `_timing` is shared by all, `random_trees` and `slow_world` make the
loads.
"""
