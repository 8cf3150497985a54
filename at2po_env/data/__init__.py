"""Question-answering data, corpora and procedural worlds."""
