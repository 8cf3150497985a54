"""What learns: a model, its tokenizer and a policy that samples with it, built from a configuration.

Read `agent`, then `model` (weights and tokenizers), `policy` (the sampler that a configuration names),
`cold_start` with `expert` (supervised learning before RL) and `dry_run` (what a run would need).
"""
