"""Hands what a run has made to other programs.

Read `export` (a checkpoint as a plain Hugging Face folder with a model card), then `hub` (pushes it).
"""
