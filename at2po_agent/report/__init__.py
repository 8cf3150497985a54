"""What a run shows: curves, tables, the tree viewer."""
