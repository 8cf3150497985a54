"""A run on disk and in time.

Read `folder` (the files of a run and who may write them), `checkpoint`, `scalars` (TensorBoard),
`progress` (what listeners are told), `interrupts` (Ctrl-C), `seeding` (one random stream per purpose)
and `clock`.
"""
