"""Inside the engine: a logits processor of vLLM's V1 sampler that draws by our rule, and intervenes.

vLLM samples with one generator for the whole batch (seeds of requests are not honoured on every platform,
and its log-probs do not follow the contract of `Generation` at other temperatures). So requests reach it as
greedy ones, and this processor decides: it takes the model's logits, asks the request's intervention, draws
uniform t of Philox(seed) from the distribution at the request's temperature and top-p, as `HFPolicy` does,
and leaves one finite logit, at the drawn token, whose value is the token's log-prob. The engine's argmax
then is that token, and `logprobs_mode="processed_logits"` returns that value.

The engine must make each prompt's first token in one step (no chunked prefill), or an intervention would see
distributions of half a prompt. Loaded by name in the engine's process; importing it needs vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor, process_dict_updates

from at2po_agent.policies.base import Intervention, NextToken, Request
from at2po_agent.policies.sampling import ActiveRequest, draw_tokens
from at2po_env.errors import PolicyError

ARGUMENT = "at2po"
"""Key of the request's `extra_args` that holds its key, unique within the process, and the request."""


@dataclass
class Report:
    """Reports what the rule of a request did in the worker: a value that can travel between processes.

    Attributes:
        forced: Places of the generated ids that were forced.
        rule: The intervention, with whatever state it has gathered.
        error: What it raised.
    """

    forced: list[int]
    rule: Any
    error: Exception | None = None


class Guard:
    """An intervention whose failure is kept instead of breaking the step of all other requests.

    Attributes:
        rule: The intervention.
        error: What it raised; it is not asked again.
    """

    def __init__(self, rule: Intervention, vocabulary: int) -> None:
        self.rule = rule
        self.top_log_probs = rule.top_log_probs
        self.error: Exception | None = None
        self._vocabulary = vocabulary

    def __call__(self, coming: NextToken) -> Sequence[int]:
        """Ids to force; none once it has failed."""
        if self.error is not None:
            return ()
        try:
            forced = list(self.rule(coming))
        except Exception as error:  # noqa: BLE001  foreign code; the policy raises what it raised
            self.error = error
            return ()
        if any(not 0 <= token < self._vocabulary for token in forced):
            self.error = PolicyError(f"an intervention forced {forced}; ids lie in 0..{self._vocabulary - 1}")
            return ()
        return forced


_watched: dict[int, ActiveRequest] = {}


class SeededSampling(LogitsProcessor):  # type: ignore[misc]  # vLLM is not there when types are checked
    """Draws the token of every row whose request is ours."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        del device, is_pin_memory
        self._rows: dict[int, ActiveRequest] = {}
        self._vocabulary = int(vllm_config.model_config.get_vocab_size())

    def is_argmax_invariant(self) -> bool:
        """It decides what the argmax is."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the rows of the engine's batch."""
        process_dict_updates(self._rows, batch_update, self._row)

    def apply(self, logits: Tensor) -> Tensor:
        """Draw, and leave the drawn token's log-prob as the only finite logit of its row."""
        if not self._rows:
            return logits
        places = sorted(self._rows)
        rows = [self._rows[place] for place in places]
        for row in rows:
            while len(row.draws) <= len(row.ids):
                row.draws.more()
        index = torch.tensor(places, device=logits.device)
        whole = len(places) == len(logits)
        drawn, forced = draw_tokens(rows, logits if whole else logits[index])
        if forced is not None:
            for row, token in zip(rows, forced, strict=True):
                if token >= 0:
                    row.forced.append(len(row.ids))
        if whole:
            logits.fill_(-torch.inf)
        else:
            logits.index_fill_(0, index, -torch.inf)
        logits[index, drawn.tokens] = drawn.log_probs
        return logits

    def _row(self, params: Any, prompt_ids: list[int] | None, output_ids: list[int]) -> ActiveRequest | None:
        """The row of a request that enters the batch, perhaps again after it was put back."""
        del prompt_ids
        order: tuple[int, Request] | None = (params.extra_args or {}).get(ARGUMENT)
        if order is None:
            return None
        key, request = order
        row = _watched.get(key)
        if row is None and request.intervention is not None:
            guard = Guard(request.intervention, self._vocabulary)
            row = _watched[key] = ActiveRequest(request=replace(request, intervention=guard))
        row = row or ActiveRequest(request=request)
        row.ids = output_ids  # the engine's own list: it grows as tokens are accepted
        return row


def take_reports(worker: Any, ended: Sequence[int]) -> dict[int, Report]:
    """Report on rules of ended and of failed requests, and forget them; the engine runs it in its workers."""
    del worker
    reports = {}
    for key, row in list(_watched.items()):
        guard = row.request.intervention
        assert isinstance(guard, Guard)
        if key in ended or guard.error is not None:
            reports[key] = Report(row.forced, guard.rule, guard.error)
            del _watched[key]
    return reports
