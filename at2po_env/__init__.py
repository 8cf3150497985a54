"""The environment SDK: episodes that can be forked at any turn."""
