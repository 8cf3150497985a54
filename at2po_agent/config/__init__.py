"""Every setting of a run.

Read `sections` (each field with its meaning and default), `loading` (files, overrides, all problems at
once), `presets` (the algorithms as data), `composition` (what goes with what); `shipped/` holds the
configurations with a name.
"""

from at2po_agent.config.loading import load_config
from at2po_agent.config.presets import PRESETS, Preset
from at2po_agent.config.sections import Config

__all__ = ["PRESETS", "Config", "Preset", "load_config"]
