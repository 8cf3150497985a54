"""Writes one question's tree as one self-contained HTML file.

The page loads nothing (a Content-Security-Policy says so), works from `file://`, follows the reader's
light or dark preference and can be read with the keyboard alone. What a policy wrote can be any text: it goes
as JSON whose `<`, `>` and `&` are escaped, and the script only ever sets it as text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from at2po_agent.report.run_folder import TreeRecord, is_right
from at2po_agent.report.turn_text import Decode, shorten, token_pieces
from at2po_agent.tree import ROOT, Tree
from at2po_agent.types import FloatArray, Turn
from at2po_env.errors import require

TEMPLATES = Path(__file__).parent / "templates"
COMPACT_ABOVE = 26


@dataclass(frozen=True)
class PageOptions:
    """Further facts for the page; all of them may be missing.

    Attributes:
        values: float[N] node values.
        advantages: float[N] node advantages.
        chains: M, the chains that the tree began with; None leaves forks unmarked.
        forks: K, the forks of each round.
        decode: Tokens to text, for the surprisal of each token.
        facts: Short remarks for the first line (run, step ...).
    """

    values: FloatArray | None = None
    advantages: FloatArray | None = None
    chains: int | None = None
    forks: int = 0
    decode: Decode | None = None
    facts: Sequence[str] = ()


class Stat(NamedTuple):
    """One figure of the page's head."""

    name: str
    value: str
    help: str


class Origin(NamedTuple):
    """The rounds that created the nodes.

    Attributes:
        rounds: Expansion round that created each node, 0 for the first chains.
        opens_fork: True where the node is the first turn of a fork.
    """

    rounds: list[int]
    opens_fork: list[bool]


def tree_page(record: TreeRecord, options: PageOptions | None = None) -> str:
    """Render the page as text.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    options = options or PageOptions()
    jinja2 = require("jinja2", "agent")
    loader = jinja2.FileSystemLoader(str(TEMPLATES))
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    nodes, as_markup = _nodes(record, options), jinja2.utils.markupsafe.Markup
    facts = list(options.facts) + ([] if record.step is None else [f"step {record.step}"])
    facts += [f"question {record.tree.task_id}"] if record.tree.task_id else []
    tree = record.tree
    asked = [line.strip() for line in tree.prompt.splitlines() if line.strip().endswith("?")]
    question = asked[-1].removeprefix("Question:").strip()[:500] if asked else ""
    best_leaf = max(tree.leaves(), key=lambda leaf: (tree.leaf_reward[leaf], -leaf), default=ROOT)
    payload = {"prompt": record.tree.prompt, "start": best_leaf, "nodes": nodes}
    html = environment.get_template("tree.html.j2").render(
        title=record.question or question or tree.task_id or "Tree",
        facts=facts,
        golden_answers=record.golden_answers,
        stats=tree_stats(record.tree),
        rounds=max((node["round"] for node in nodes), default=0),
        compact=len(record.tree.leaves()) > COMPACT_ABOVE,
        css=as_markup((TEMPLATES / "tree.css").read_text(encoding="utf-8")),
        script=as_markup((TEMPLATES / "tree.js").read_text(encoding="utf-8")),
        data=as_markup(script_json(payload)),
    )
    return str(html)


def write_tree_page(path: str | Path, record: TreeRecord, options: PageOptions | None = None) -> Path:
    """Write the page; characters that UTF-8 cannot hold are written as escapes."""
    target = Path(path)
    target.write_text(tree_page(record, options), encoding="utf-8", errors="backslashreplace")
    return target


def script_json(value: Any) -> str:
    r"""Write JSON that can stand inside a `<script>` element: no `<`, `>`, `&`, nothing outside ASCII.

    All of these occur only within strings, where `\u003c` means the same to a JSON parser.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def node_origins(record: TreeRecord, chains: int | None, forks: int) -> Origin:
    """Tell which expansion round created each node, and which nodes open a fork.

    Branches enter a tree whole, one round after the other, so a branch ends at each leaf. Where the
    record does not say the rounds, the first `chains` branches are round 0, then every `forks` one round.
    """
    leaf = record.tree.is_leaf
    rounds, opens, branch, new_branch = [0], [False], 0, True
    for node in range(1, len(record.tree)):
        late = chains is not None and forks > 0 and branch >= chains
        rounds.append(1 + (branch - (chains or 0)) // forks if late else 0)
        opens.append(new_branch)
        new_branch = bool(leaf[node])
        branch += new_branch
    rounds = rounds if record.rounds is None else list(record.rounds)
    return Origin(rounds, [first and number > 0 for first, number in zip(opens, rounds, strict=True)])


def tree_stats(tree: Tree) -> list[Stat]:
    """Compute the figures of the page's head."""
    leaves, turns = tree.leaves(), [turn for turn in tree.turns if turn is not None]
    correct = sum(is_right(tree.outcomes[leaf] or {}) for leaf in leaves)
    rewards = tree.leaf_reward[tree.is_leaf]
    unique = len(tree.prompt_ids) + sum(len(turn.ids) for turn in turns)
    flat = sum(len(ids) for leaf in leaves for ids in tree.sequences(leaf))
    share = f" ({correct / len(leaves):.0%})" if leaves else ""
    return [
        Stat("Leaves", str(len(leaves)), "Ways in which an episode of this question ended"),
        Stat(
            "Correct",
            f"{correct}{share}",
            "Leaves that succeeded, or whose answer matches a golden answer exactly",
        ),
        Stat("Mean reward", f"{rewards.mean():.2f}" if len(rewards) else "–", "Over the leaves"),
        Stat("Turns", str(len(turns)), "Nodes of the tree; turns on a shared path count once"),
        Stat("Sampled tokens", f"{sum(int(t.sampled_mask.sum()) for t in turns):,}", "Written by the policy"),
        Stat(
            "Saved by sharing",
            f"{1 - unique / flat:.0%}" if flat else "–",
            "Tokens that one row per leaf repeats",
        ),
    ]


def _nodes(record: TreeRecord, options: PageOptions) -> list[dict[str, Any]]:
    tree = record.tree
    rounds, opens = node_origins(record, options.chains, options.forks)
    depth, out = [0], []

    def finite(array: FloatArray | None, node: int) -> float | None:
        return None if array is None or not np.isfinite(array[node]) else round(float(array[node]), 4)

    for node, parent in enumerate(tree.parent.tolist()):
        if node != ROOT:
            depth.append(depth[parent] + 1)
        outcome = tree.outcomes[node]
        if outcome is not None:  # JSON holds no infinite or undefined number: it becomes text
            outcome = {
                key: str(value) if isinstance(value, float) and not np.isfinite(value) else value
                for key, value in outcome.items()
            }
        out.append(
            {
                "parent": parent,
                "turn": depth[node],
                "round": rounds[node],
                "forked": opens[node],
                "value": finite(options.values, node),
                "advantage": finite(options.advantages, node),
                "reward": finite(tree.leaf_reward, node),
                "outcome": outcome,
                **_turn(tree.turns[node], options.decode, len(tree.prompt_ids)),
            }
        )
    return out


def _turn(turn: Turn | None, decode: Decode | None, prompt_tokens: int) -> dict[str, Any]:
    if turn is None:
        return {"kind": "prompt", "summary": "", "observation_tokens": prompt_tokens}
    short = shorten(turn.action)
    pieces = None if decode is None else token_pieces(turn.action_ids, turn.action, decode)
    seen: dict[str, Any] = {
        "kind": short.kind,
        "summary": short.text,
        "observation": turn.observation,
        "observation_tokens": len(turn.ids) - len(turn.action_ids),
        "action": turn.action if pieces is None else "",
        "entropy": round(turn.entropy, 4),
        "sampled_tokens": int(turn.sampled_mask.sum()),
        "stop_reason": turn.stop_reason,
    }
    if pieces is not None:
        seen["pieces"] = pieces
        seen["surprisal"] = [round(max(0.0, -float(p)), 3) for p in turn.sampled_log_probs]
        if not turn.sampled_mask.all():
            seen["forced"] = (~turn.sampled_mask).tolist()
    return seen
