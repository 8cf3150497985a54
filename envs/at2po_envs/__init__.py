"""The environments shipped with at2po."""
