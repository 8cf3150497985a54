"""A campaign of damage: seeded tries of many kinds, each of which must do no harm.

    python -m benchmarks.campaign --json --minutes 5
    python -m benchmarks.campaign --only kill,disk --out night --minutes 600
    python -m benchmarks.campaign --only kill --seed 0 --try 17

| kind | a try | module |
|---|---|---|
| `kill` | SIGKILL at a moment of a file or a random one, SIGTERM, SIGSTOP; then a resume | `runs` |
| `disk` | a disk that is full, read-only or broken in the middle of a run; then a resume | `disks` |
| `data` | a damaged file of a run, of questions, a corpus, an index or a result cache | `damage` |
| `server` | a lying or dying server behind `HttpRetriever` and behind a served model | `network` |
| `client` | hostile bytes to our retrieval server | `network` |
| `actions` | hostile actions and hostile passages | `text` |
| `tools` | hostile code for the calculator and the python tool | `text` |
| `snapshots` | mutated snapshots, restored and played on | `snapshots` |
| `soak` | only if named: one process that trains, searches and evaluates over and over | `soak` |

A try is a function of kind, seed and number, so a failure can be had again. `runner` runs the tries in
processes of their own, keeps the state of a campaign in its folder, and goes on from there.
"""
