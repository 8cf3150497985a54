"""The benchmark of retrievers: `__main__` is the command and runs the others, each in a process of its own.

Read `__main__` for the keys, then `stages` (building, speed, recall), `server` (load on it) and `peer`
(pyserini).
"""
