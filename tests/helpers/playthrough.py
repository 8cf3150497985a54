"""Golden playthroughs: an episode as a text file that people read and a test replays line by line.

    PYTHONPATH=tests python -m helpers.playthrough FILE

writes a file anew after a change that was meant. A file begins with a line of JSON: the id, the arguments of
`make`, the options of `reset`, and the actions.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium

import at2po_env  # noqa: F401 - registers the ids
from at2po_env.data import At2poSampleWarning


def header_of(path: Path) -> dict[str, Any]:
    """Read the first line of a file."""
    header: dict[str, Any] = json.loads(path.read_text("utf-8").partition("\n")[0])
    return header


def play(header: dict[str, Any]) -> str:
    """Play an episode and return its file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", At2poSampleWarning)
        env = gymnasium.make(header["id"], **header["make"])
    observation, info = env.reset(seed=0, options=header["reset"])
    lines = [json.dumps(header, ensure_ascii=False), "", observation.strip("\n"), _facts(info)]
    for action in header["actions"]:
        observation, reward, terminated, truncated, info = env.step(action)
        lines += ["", f"> {action}", "", observation.strip("\n")]
        lines.append(f"reward={reward:g} terminated={terminated} truncated={truncated} {_facts(info)}")
    return "\n".join(lines) + "\n"


def _facts(info: dict[str, Any]) -> str:
    """Write the infos that the observation does not show."""
    hidden = ("observation", "instructions", "question", "admissible_commands")
    return "info " + json.dumps(
        {key: value for key, value in info.items() if key not in hidden}, ensure_ascii=False
    )


if __name__ == "__main__":
    golden = Path(sys.argv[1])
    golden.write_text(play(header_of(golden)), "utf-8")
