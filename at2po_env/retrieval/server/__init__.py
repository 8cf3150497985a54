"""The retrieval server (extra `serve`).

`app` (the application), `service` and `batching` (what it does), `processes`, `metrics`, `config`.
"""
