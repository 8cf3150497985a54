"""Builds what learns from a configuration: a model, its tokenizer and a policy that samples with it.

Read `agent`, then `model` (weights and tokenizers) and `cold_start` with `expert` (supervised learning before
RL).
"""
