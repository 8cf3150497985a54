"""The retrieval server (extra `serve`).

`app` has the configuration and what answers a request, `batching` searches concurrent requests together,
`metrics` counts for Prometheus, and `running` runs the application: in this process, in several, in a thread.
"""
