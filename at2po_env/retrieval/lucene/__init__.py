"""BM25 by Lucene through pyserini's jar (extra `lucene`).

`retriever`, `build`, and `jvm`, the one place that starts Java.
"""
