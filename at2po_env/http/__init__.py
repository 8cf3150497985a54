"""HTTP with bounds, for every room that asks a server or is one: `client`, and `server` (extra `serve`)."""
