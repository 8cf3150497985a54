"""Configures a run.

Read `sections` (each field with its meaning and default), `loading` (files and overrides), `presets` (the
algorithms as data), `composition` (checks which parts go together); `shipped/` holds named configurations.
"""

from at2po_agent.config.loading import load_config
from at2po_agent.config.presets import PRESETS, Preset
from at2po_agent.config.sections import Config

__all__ = ["PRESETS", "Config", "Preset", "load_config"]
