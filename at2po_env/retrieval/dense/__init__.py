"""Search by meaning (extra `dense`).

Read `retriever` first, then `encoders` (texts to vectors), `build` (a corpus to an index) and `search` (exact
search and FAISS files).
"""
