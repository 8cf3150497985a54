"""Holds the algorithms of the field as data: each is a choice of rollout, credit, loss and filters.

`docs/algorithms.md` is generated from here (`algorithms_table`), so it cannot drift.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TABLE_BEGIN, TABLE_END = (
    "<!-- table: generated from at2po_agent/config/presets.py -->",
    "<!-- end of table -->",
)


@dataclass(frozen=True)
class Preset:
    """One algorithm as a composition.

    Attributes:
        reference: Link of the paper.
        rollout: Expansion rule, published shape of the trees, interventions, shaping; the shape of a
            configuration's file wins over the published one.
        credit: Credit rule.
        loss: Loss.
        credit_options: Keywords of the credit rule, beyond its defaults.
        loss_options: Keywords of the loss, beyond its defaults.
        keep: The questions that are trained on.
        kl_weight: Weight of the KL term to the frozen reference.
        root_share: Share of the leaves that start at the root, for a rollout that cannot take over any shape
            of another configuration; None where it can.
    """

    reference: str
    rollout: Mapping[str, Any]
    credit: str
    loss: str
    credit_options: Mapping[str, Any] = field(default_factory=dict)
    loss_options: Mapping[str, Any] = field(default_factory=dict)
    keep: str = "all"
    kl_weight: float = 0.0
    root_share: float | None = None

    def algorithm(self) -> dict[str, Any]:
        """Return the `algorithm` section of this preset, without its name."""
        return {
            "keep": self.keep,
            "credit": self.credit,
            "credit_options": dict(self.credit_options),
            "loss": self.loss,
            "loss_options": dict(self.loss_options),
            "kl_weight": self.kl_weight,
        }

    def shape(self, leaves: int) -> dict[str, int]:
        """Return `rollout` keys that grow (nearly) so many leaves; empty where any shape will do."""
        if self.root_share is None:
            return {}
        chains = max(1, round(self.root_share * leaves))
        return {"chains": chains, "forks": (leaves - chains) // chains * chains or 1, "rounds": 1}


def algorithms_table() -> str:
    """Write a table in Markdown: a row per preset, a column per part."""
    titles = ("algorithm", "rollout", "leaves", "interventions", "credit", "loss", "filter, shaping", "KL")
    table = [titles, ("---",) * len(titles)]
    for name, preset in PRESETS.items():
        rollout = preset.rollout
        chains, rounds, forks = (rollout[key] for key in ("chains", "rounds", "forks"))
        shape = f"{chains} + {rounds} x {forks}" if rounds else f"{chains} chains"
        on = [part for part in ("thinking", "resampling") if part in rollout]
        extra = ["dynamic sampling"] if preset.keep == "informative" else []
        if "overlong_share" in rollout:
            extra.append(f"overlong over the last {rollout['overlong_share']:.0%}")
        cells = (
            f"[`{name}`]({preset.reference})",
            f"`{rollout['expansion']}`, {shape}",
            str(chains + rounds * forks),
            ", ".join(on) or "-",
            _part(preset.credit, preset.credit_options),
            _part(preset.loss, preset.loss_options),
            ", ".join(extra) or "-",
            f"{preset.kl_weight:g}, loss" if preset.kl_weight else "-",
        )
        table.append(cells)
    return "".join(f"| {' | '.join(row)} |\n" for row in table)


def _part(name: str, options: Mapping[str, Any]) -> str:
    shown = {key: f"{value:g}" if isinstance(value, float) else value for key, value in options.items()}
    values = ", ".join(f"{key} {value}" for key, value in shown.items())
    return f"`{name}`" + (f" ({values})" if values else "")


_CHAINS = {"expansion": "chains", "chains": 16, "forks": 0, "rounds": 0}
_GIGPO: Mapping[str, Any] = {
    "reference": "https://arxiv.org/abs/2505.10978",
    "credit": "gigpo",
    "credit_options": {"gamma": 0.95, "step_weight": 1.0},
    "loss": "grpo",
    "loss_options": {"clip_low": 0.2, "clip_high": 0.2},
}
_GIGPO_CHAINS = {"expansion": "chains", "chains": 5, "forks": 0, "rounds": 0}
_T2PO: Mapping[str, Any] = {**_GIGPO, "reference": "https://arxiv.org/abs/2605.02178"}
# The published thresholds do not fit the published signal (docs/deviations.md), so these follow a share.
_THINKING = {"thinking": {"enabled": True, "share": 0.15}}
_RESAMPLING = {"resampling": {"enabled": True, "share": 0.15}}

PRESETS: Mapping[str, Preset] = {
    "at2po": Preset(
        reference="https://arxiv.org/abs/2601.04767",
        rollout={"expansion": "entropy", "chains": 10, "forks": 6, "rounds": 2},
        credit="tree",
        loss="atpo",
        credit_options={"value_mode": "child_softmax", "advantage_mode": "node_value"},
        loss_options={"clip_low": 3e-3, "clip_high": 4e-3},
    ),
    "grpo": Preset(
        reference="https://arxiv.org/abs/2402.03300",
        rollout=_CHAINS,
        credit="group",
        loss="grpo",
        loss_options={"clip_low": 0.2, "clip_high": 0.2},
        kl_weight=1e-3,
    ),
    "dapo": Preset(
        reference="https://arxiv.org/abs/2503.14476",
        rollout={**_CHAINS, "overlong_share": 2000 / 6192},
        credit="group",
        loss="dapo",
        loss_options={"clip_low": 0.2, "clip_high": 0.28},
        keep="informative",
    ),
    "gspo": Preset(
        reference="https://arxiv.org/abs/2507.18071",
        rollout=_CHAINS,
        credit="group",
        loss="gspo",
        loss_options={"clip_low": 3e-4, "clip_high": 4e-4},
    ),
    "arpo": Preset(
        reference="https://arxiv.org/abs/2507.19849",
        rollout={"expansion": "arpo", "chains": 8, "forks": 8, "rounds": 1},
        credit="group",
        loss="grpo",
        loss_options={"clip_low": 0.2, "clip_high": 0.2},
        root_share=0.5,
    ),
    "aepo": Preset(
        reference="https://arxiv.org/abs/2510.14545",
        rollout={"expansion": "aepo", "chains": 8, "forks": 8, "rounds": 1},
        credit="group",
        loss="aepo",
        loss_options={"clip_low": 0.2, "clip_high": 0.2, "entropy_weight": 0.2},
        root_share=0.5,
    ),
    "tree_grpo": Preset(
        reference="https://arxiv.org/abs/2509.21240",
        rollout={"expansion": "tree_grpo", "chains": 2, "forks": 4, "rounds": 1},
        credit="tree_grpo",
        loss="grpo",
        loss_options={"clip_low": 0.2, "clip_high": 0.2},
        kl_weight=1e-3,
        root_share=1 / 3,
    ),
    "surpo": Preset(  # our own (docs/our-method.md)
        reference="our-method.md",
        rollout={**_CHAINS, "chains": 6},
        credit="surprisal",
        credit_options={"cap": 1.0},
        loss="grpo",
        loss_options={"clip_low": 0.2, "clip_high": 0.2},
    ),
    "gigpo": Preset(rollout=_GIGPO_CHAINS, **_GIGPO),
    "gigpo+tti": Preset(rollout={**_GIGPO_CHAINS, **_THINKING}, **_T2PO),
    "gigpo+tds": Preset(rollout={**_GIGPO_CHAINS, **_RESAMPLING}, **_T2PO),
    "t2po": Preset(rollout={**_GIGPO_CHAINS, **_THINKING, **_RESAMPLING}, **_T2PO),
}


def replace_between(page: Path, begin: str, end: str, text: str) -> None:
    """Replace what a page has between two marks, each alone in its line, and keep the rest."""
    head, _, rest = page.read_text(encoding="utf-8").partition(begin)
    page.write_text(f"{head}{begin}\n{text}{end}{rest.partition(end)[2]}", encoding="utf-8")


def write_table(page: Path) -> None:
    """Replace the table of a page."""
    replace_between(page, TABLE_BEGIN, TABLE_END, algorithms_table())


if __name__ == "__main__":
    write_table(Path(sys.argv[1]))
