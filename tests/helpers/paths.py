"""Where the repository and the real data lie."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
REAL_DATA = ROOT.parent / "shared" / "data"
"""Small real samples; tests that need them skip where they are absent."""
