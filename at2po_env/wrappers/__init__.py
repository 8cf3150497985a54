"""Views on text environments."""
