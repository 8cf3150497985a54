"""Policies: token ids in; sampled ids, their log-probs and the stop reason out."""
