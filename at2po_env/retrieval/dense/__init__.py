"""Search by meaning (extra `dense`).

`retriever`, `encoders` (text to vectors), `build`, `flat` (exact search), `faiss_files`.
"""
