"""Policies behind one protocol: token ids in, sampled ids out."""
