"""Question answering over a searched corpus."""
