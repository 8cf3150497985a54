"""BM25 by Lucene through pyserini's jar (extra `lucene`).

Read `retriever` (opens, builds and searches an index), then `jvm`, the only module that starts Java.
"""
