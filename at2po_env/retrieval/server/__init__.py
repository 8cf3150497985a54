"""The retrieval server (extra `serve`).

`app` has the configuration, the metrics and what answers a request, `batching` searches concurrent requests
together, and `running` runs the application: in this process, in several, in a thread.
"""
