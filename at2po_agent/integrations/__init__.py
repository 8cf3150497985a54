"""Hands what a run has made to other programs, and takes part in other trainers.

Read `export` (a checkpoint as a plain Hugging Face folder with a model card), then `hub` (pushes it). `trl`
brings environments, tree rollouts and AT²PO's loss to TRL's `GRPOTrainer` (extra `trl`).
"""
