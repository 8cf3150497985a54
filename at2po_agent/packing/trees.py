"""The packed form of a minibatch: one sequence per pack that holds every unique token once.

The published way writes one row per leaf and repeats what branches share. Here branches that begin with the
same ids share their tokens: a tree's prompt and turns, the observation of sibling turns, and the first words
of siblings that happen to be alike. A token's log-prob depends on the ids before it alone, so this is exact.

Losses see rows. The log-probs of the packed tokens, each made once, are gathered into one row per branch that
holds the branch's trained tokens in order; then any loss runs on them as it is. So the weight of a shared
token is the sum over the branches through it whatever the loss, ratios per turn are those of the branch's
turn, and advantages that differ between branches on shared tokens (tree_grpo, group credit) need no rule of
their own. A row costs as many numbers as the branch has trained tokens; the model never sees it.

Packs are cut between branches (`prefixes.cut_branches`). Each branch lies whole in one pack, and losses
divide by the counts of the whole minibatch (`losses.LossTotals`), so the gradient does not depend on the cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Self
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from transformers import PreTrainedModel

from at2po_agent.packing.batch import move
from at2po_agent.packing.branches import BranchTokens, Overflow, tree_branches
from at2po_agent.packing.log_probs import (
    TokenStats,
    exchanged_forward,
    head_of,
    linear_log_probs,
    logits_at,
    token_stats,
)
from at2po_agent.packing.prefixes import Layout, SortedBranches, cut_branches, lay_out, sort_branches
from at2po_agent.packing.tree_attention import attention_implementation, tree_attention
from at2po_agent.tree import Tree
from at2po_env.errors import ConfigError


def pack_trees(
    trees: Sequence[Tree],
    advantages: Sequence[ArrayLike],
    *,
    max_length: int | None = None,
    overflow: Overflow = "error",
) -> PackedBatch:
    """Pack trees so that each unique token is computed once; arguments and errors as `tree_branches`."""
    return pack_branches(tree_branches(trees, advantages, max_length=max_length, overflow=overflow))


def pack_branches(branches: Sequence[BranchTokens]) -> PackedBatch:
    """Pack any branches that may share prefixes.

    Args:
        branches: At least one with tokens.
    """
    # Rows of the trained tokens alone, padded to the longest. They are also at least as wide as the branch
    # with the most turns has turns, since turn ids must lie below the width.
    trained = [np.flatnonzero(branch.turn_ids >= 0) for branch in branches]
    turns = max(int(branch.turn_ids.max(initial=-1)) + 1 for branch in branches)
    shape = (len(branches), max(1, turns, *(len(depths) for depths in trained)))
    turn_ids = np.full(shape, -1, dtype=np.int64)
    advantages, log_probs = (np.zeros(shape, dtype=np.float32) for _ in range(2))
    for row, (branch, depths) in enumerate(zip(branches, trained, strict=True)):
        end = len(depths)
        turn_ids[row, :end] = branch.turn_ids[depths]
        advantages[row, :end], log_probs[row, :end] = branch.advantages[depths], branch.log_probs[depths]
    return PackedBatch(
        turn_ids=torch.from_numpy(turn_ids),
        advantages=torch.from_numpy(advantages),
        sampled_log_probs=torch.from_numpy(log_probs),
        branches=tuple(branches),
        prefixes=sort_branches([branch.ids for branch in branches], [branch.starts for branch in branches]),
    )


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Branches of one or more trees, ready to be cut into packs: a `Batch`. It lives on the host.

    Attributes:
        turn_ids: int64[B, T], one row per branch, T its trained tokens at most; -1 beyond them.
        advantages: float32[B, T].
        sampled_log_probs: float32[B, T], nats.
        branches: Their ids, and which tokens are trained.
        prefixes: Their depth-first order, and how much neighbours share.
    """

    turn_ids: Tensor
    advantages: Tensor
    sampled_log_probs: Tensor
    branches: tuple[BranchTokens, ...]
    prefixes: SortedBranches

    @property
    def unique_tokens(self) -> int:
        """Tokens when every shared one counts once; at most so many where branches have several sequences."""
        return self.prefixes.unique_tokens

    @property
    def flattened_tokens(self) -> int:
        """Tokens of all branches."""
        return sum(len(branch.ids) for branch in self.branches)

    @property
    def trees(self) -> Tensor:
        """int64[B]: the tree of each branch."""
        return torch.tensor([branch.tree for branch in self.branches])

    def tokens(self, rows: Tensor) -> int:
        """Tokens of some branches when every shared one counts once."""
        return self.prefixes.keep(rows.numpy()).unique_tokens

    def with_advantages(self, advantages: Tensor) -> Self:
        """The same branches with other advantages."""
        return replace(self, advantages=advantages)

    def attention(self, model: nn.Module) -> AbstractContextManager[None]:
        """Let a model attend along trees within the block; the backward pass belongs there.

        Raises:
            ConfigError: The model cannot be trained on packed trees (`check_model`).
        """
        check_model(model)
        return tree_attention(model)

    def micro_batches(self, max_tokens: int, *, rows: Tensor | None = None) -> Iterator[tuple[Tensor, Pack]]:
        """Cut the batch into packs with as little repetition as possible.

        Arguments, results and errors as `Batch.micro_batches`; the budget counts unique tokens.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        chosen = self.prefixes if rows is None else self.prefixes.keep(rows.cpu().numpy())
        for cut in cut_branches(chosen, max_tokens):
            part = SortedBranches(*(field[cut] for field in chosen))
            yield torch.from_numpy(part.order), self._pack(part)

    def _pack(self, part: SortedBranches) -> Pack:
        # Lay out the branches; where they have several sequences, lay out all of these, and join the paths of
        # the sequences of each branch.
        pieces = [self.branches[index].sequences for index in part.order]
        if all(len(sequences) == 1 for sequences in pieces):
            layout = lay_out(part.lengths, part.shared)
            paths = layout.paths
        else:
            laid = sort_branches([sequence for sequences in pieces for sequence in sequences])
            layout = lay_out(laid.lengths, laid.shared)
            by_number = [layout.paths[place] for place in np.argsort(laid.order)]
            ends = np.cumsum([len(sequences) for sequences in pieces]).tolist()
            paths = [
                np.concatenate(by_number[end - len(sequences) : end])
                for sequences, end in zip(pieces, ends, strict=True)
            ]

        # Write the ids of every branch along its path; those that it shares are written again, unchanged.
        ids = np.empty(len(layout.last), dtype=np.int64)
        trained, before = [], []
        for index, path in zip(part.order, paths, strict=True):
            ids[path] = self.branches[index].ids
            depths = np.flatnonzero(self.branches[index].turn_ids >= 0)
            trained.append(path[depths])
            # The token before a trained one on the path, whose state predicts it. Where branches part, that
            # is not the token before it in the sequence.
            before.append(path[depths - 1])

        # Number the trained tokens by their places in the pack. A token that several branches share has
        # several entries in `trained`, which get the same number: its log-prob is made once, and each of the
        # rows takes it from that slot. Padding takes it from slot S, which holds 0.
        places, first, numbers = np.unique(np.concatenate(trained), return_index=True, return_inverse=True)
        counts = np.array([len(of_branch) for of_branch in trained])
        width = max(1, int(counts.max()), int(self.turn_ids[part.order].max()) + 1)
        slots = np.full((len(trained), width), len(places), dtype=np.int64)
        slots[np.arange(width) < counts[:, None]] = numbers
        return Pack(
            input_ids=torch.from_numpy(ids)[None],
            position_ids=torch.from_numpy(layout.positions)[None],
            predicts=torch.from_numpy(np.concatenate(before)[first]),
            targets=torch.from_numpy(ids[places]),
            slots=torch.from_numpy(slots),
            turn_ids=self.turn_ids[part.order, :width],
            advantages=self.advantages[part.order, :width],
            sampled_log_probs=self.sampled_log_probs[part.order, :width],
            layout=layout,
        )


@dataclass(frozen=True, eq=False)
class Pack:
    """One sequence of P tokens: G branches of which S unique tokens are trained. A `MicroBatch`.

    Attributes:
        input_ids: int64[1, P].
        position_ids: int64[1, P], depth in the tree.
        predicts: int64[S], place of the token before each trained token: its state predicts it.
        targets: int64[S], ids of the trained tokens.
        slots: int64[G, T], which of the S log-probs stands where in the rows; S where none does.
        turn_ids: int64[G, T], -1 where not trained.
        advantages: float32[G, T].
        sampled_log_probs: float32[G, T], nats.
        layout: Which token descends from which; stays on the host.
    """

    input_ids: Tensor
    position_ids: Tensor
    predicts: Tensor
    targets: Tensor
    slots: Tensor
    turn_ids: Tensor
    advantages: Tensor
    sampled_log_probs: Tensor
    layout: Layout

    def to(self, device: torch.device | str) -> Self:
        """The same pack on another device; the host does not wait for the transfer."""
        tensors: dict[str, Any] = {
            name: move(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)

    def to_rows(self, per_token: Tensor) -> Tensor:
        """Write a number per trained token, float[S], into the rows, float[G, T]; 0 where none is trained."""
        return torch.nn.functional.pad(per_token, (0, 1))[self.slots]

    def log_probs(self, model: nn.Module, *, temperature: float = 1.0) -> Tensor:
        """Log-probs of the trained tokens, float[G, T]; arguments as `MicroBatch.log_probs`.

        Call it, and the backward pass if the model recomputes activations, within `tree_attention(model)`.

        Raises:
            ConfigError: The model mixes tokens in another way than by attention.
        """
        return self.stats(model, temperature=temperature).log_probs

    def entropies(self, model: nn.Module, *, temperature: float = 1.0) -> Tensor:
        """Entropies of the distributions of the trained tokens, float[G, T] in nats; else as `log_probs`."""
        return self.stats(model, temperature=temperature, with_entropies=True).entropies

    def stats(
        self,
        model: nn.Module,
        *,
        temperature: float = 1.0,
        with_entropies: bool = False,
        linear_head: bool | None = None,
    ) -> TokenStats:
        """Log-probs and entropies from one forward pass.

        Args:
            model: As in `log_probs`.
            temperature: Logits are divided by it; positive.
            with_entropies: Whether entropies are wanted; else they are 0.
            linear_head: Whether log-probs are made straight from the output embedding, without its logits;
                None means where `check_model` found that this is right.

        Returns:
            Both float[G, T] in nats, 0 where not trained.
        """
        if linear_head is None:
            linear_head = check_model(model)
        inputs: dict[str, Any] = {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "use_cache": False,
            "tree_layout": self.layout,
        }
        head = head_of(model)
        if not linear_head or not isinstance(head, nn.Linear):
            logits = logits_at(model, lambda hidden: hidden[:, self.predicts], **inputs)[0]
            found = token_stats(logits, self.targets, temperature=temperature, with_entropies=with_entropies)
        else:
            # The output embedding returns log-probs in the place of logits, and the model passes them on.
            entropies: list[Tensor] = []

            def log_probs(hidden: Tensor) -> Tensor:
                made = linear_log_probs(
                    hidden[0, self.predicts],
                    head.weight,
                    self.targets,
                    bias=head.bias,
                    temperature=temperature,
                    with_entropies=with_entropies,
                )
                entropies.append(made.entropies)
                return made.log_probs

            with exchanged_forward(head, log_probs):
                found = TokenStats(model(**inputs).logits, entropies[0])
        return TokenStats(self.to_rows(found.log_probs), self.to_rows(found.entropies))


_LINEAR_HEAD: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""The models that were examined and are fit for packed trees; see `check_model`."""
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


def check_model(model: nn.Module) -> bool:
    """Find out, once for each model, whether packed log-probs equal those of the plain model, and how.

    Two branches of five tokens that share two are computed both ways. A model that is no transformers model,
    ignores positions, or lets tokens meet elsewhere than in attention (a convolution, a recurrent state)
    fails.

    Returns:
        Whether its logits are nothing but the output embedding times the last hidden state. (Some models cap
        or scale them.)

    Raises:
        ConfigError: It fails; the message says what to set.
    """
    if model in _LINEAR_HEAD:
        return _LINEAR_HEAD[model]
    advice = "set train.packing: rows"
    if head_of(model) is None or not any(isinstance(part, PreTrainedModel) for part in model.modules()):
        raise ConfigError(f"{type(model).__name__} is no causal language model of transformers; {advice}")
    weight = next(model.parameters())
    zeros = np.zeros(5, dtype=np.float32)
    branches = [
        BranchTokens(np.array(ids, dtype=np.int64), np.arange(-1, 4), zeros, zeros)
        for ids in ([3, 1, 4, 1, 2], [3, 1, 2, 0, 4])
    ]
    ((order, pack),) = pack_branches(branches).micro_batches(100)
    ids = torch.from_numpy(np.stack([branches[index].ids for index in order])).to(weight.device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            with attention_implementation(model, "eager"):
                logits = model(input_ids=ids, use_cache=False).logits
            expected = token_stats(logits[:, :-1], ids[:, 1:]).log_probs
            tolerance = _TOLERANCE.get(expected.dtype, 1e-3) * (1.0 + float(expected.abs().max()))
            if weight.dtype not in _TOLERANCE:
                tolerance *= 100.0  # half precision
            for linear_head in (True, False):
                with tree_attention(model):
                    got = pack.to(weight.device).stats(model, linear_head=linear_head).log_probs
                if bool(((got - expected).abs() <= tolerance).all()):
                    _LINEAR_HEAD[model] = linear_head
                    return linear_head
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{type(model).__name__} cannot be trained on packed trees ({error}); {advice}"
        ) from error
    finally:
        model.train(training)
    raise ConfigError(
        f"{type(model).__name__} gives other log-probs for a packed tree than for its branches: it mixes "
        f"tokens in another way than by attention, or ignores positions; {advice}"
    )
