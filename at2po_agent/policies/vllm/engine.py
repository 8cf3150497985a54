"""One engine of vLLM in this process: requests in, finished generations out, a step at a time.

Stop strings are found here, between steps, in the ids that the engine gives: nothing is tokenised again, and
no token is computed after the one that ends a generation. Counters are the engine's own.

Names of vLLM's interface were read in 0.32. Nothing of it is imported before an engine is made.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from at2po_agent.policies.base import Intervention, PolicyStats, Request
from at2po_agent.policies.sampling import ActiveRequest
from at2po_agent.policies.stops import StopTable
from at2po_agent.policies.vllm.spec import EngineSpec, Limits, make_engine
from at2po_agent.policies.vllm.weights import FileWeight, load_file, reload_weights
from at2po_agent.transcripts.tokenizer import Tokenizer
from at2po_agent.types import Generation, StopReason
from at2po_env.errors import PolicyError

if TYPE_CHECKING:
    from at2po_agent.policies.vllm.logits_processor import Report

_keys = itertools.count(1)


@dataclass(kw_only=True, eq=False, slots=True)
class _Open(ActiveRequest):
    """A request under way; its version is -1 until it has a token.

    Attributes:
        ticket: Its name outside.
        key: Its name inside, unique within the process.
    """

    ticket: int
    key: int


@dataclass(frozen=True)
class Finished:
    """A generation, and the state of its intervention (the object itself where nothing was copied)."""

    ticket: int
    generation: Generation
    rule: Intervention | None = None


class Engine:
    """Decodes in this process.

    Args:
        spec: The engine to run.
        tokenizer: Decodes ids when stop strings are looked for.

    Attributes:
        version: Of the weights.
    """

    def __init__(self, spec: EngineSpec, tokenizer: Tokenizer) -> None:
        self.version = 0
        self._engine, self._counters = make_engine(spec)
        config = self._engine.model_config
        vocabulary = int(config.get_vocab_size())
        block_size = int(self._engine.vllm_config.cache_config.block_size)
        self.limits = Limits(vocabulary, int(config.max_model_len), block_size)
        self._stops = StopTable(tokenizer, vocabulary, spec.eos_ids)
        self._eos_ids = [token for token in spec.eos_ids if token < vocabulary]
        self._open: dict[str, _Open] = {}
        self._watched = 0
        self._failed: list[Exception] = []
        self._ready: list[Finished] = []
        self._adapter: Any = None
        self._result: Any = None

    @property
    def idle(self) -> bool:
        """True if no request is under way."""
        return not self._open

    @property
    def tickets(self) -> set[int]:
        """Requests that were not given back yet."""
        return {one.ticket for one in self._open.values()} | {one.ticket for one in self._ready}

    def counted(self) -> PolicyStats:
        """Counts of all that was computed, by the engine's own counters."""
        return self._counters.stats

    def add(self, ticket: int, request: Request) -> None:
        """Take a request that fits the model."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        from at2po_agent.policies.vllm.logits_processor import ARGUMENT

        stop = self._stops.number(request.stop)
        one = _Open(ticket=ticket, key=next(_keys), request=request, stop=stop, version=-1)
        order = (one.key, replace(request, prefix_ids=(0,)))  # the processor needs no prefix
        parameters = SamplingParams(
            temperature=0.0,
            max_tokens=request.max_tokens,
            logprobs=0,
            flat_logprobs=True,
            stop_token_ids=self._eos_ids,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={ARGUMENT: order},
            skip_clone=True,
        )
        prompt = {"type": "token", "prompt_token_ids": list(request.prefix_ids)}
        self._engine.add_request(str(one.key), prompt, parameters, lora_request=self._adapter)
        self._open[str(one.key)] = one
        self._watched += request.intervention is not None

    def collect(self) -> list[Finished]:
        """Generate one token for every sequence that decodes; what ended.

        Raises:
            PolicyError: The model's log-probs are not finite, and all requests are dropped; or an
                intervention failed, and its request is: the others go on.
        """
        ended: list[tuple[_Open, StopReason]] = []
        surplus: list[str] = []
        # Where the model is not compiled, neither is anything else in a step.
        eager = self._engine.model_config.enforce_eager
        with torch.compiler.set_stance("force_eager") if eager else contextlib.nullcontext():
            outputs = list(self._engine.step())
        for output in outputs:
            one = self._open.get(output.request_id)
            if one is None:
                continue
            reason = self._accept(one, output.outputs[0])
            if reason is not None:
                ended.append((one, reason))
                if not output.finished:
                    surplus.append(output.request_id)
        self._engine.abort_request(surplus)
        self._ready += self._finish(ended)
        if self._failed:
            error = self._failed.pop(0)
            if isinstance(error, PolicyError):
                raise error
            raise PolicyError(f"an intervention raised {error!r}; its request is dropped") from error
        finished, self._ready = self._ready, []
        return finished

    def remove(self, ticket: int) -> Finished | None:
        """Take a request out; what it generated so far, None when it is not here."""
        one = next((one for one in self._open.values() if one.ticket == ticket), None)
        if one is None:
            return None
        self._engine.abort_request([str(one.key)])
        finished = self._finish([(one, "abort")])
        return finished[0] if finished else None

    def discard(self, ticket: int) -> None:
        """Forget a request."""
        self.remove(ticket)

    def drop_all(self) -> None:
        """Forget every request."""
        self._engine.abort_request(list(self._open))
        self._finish([(one, "abort") for one in self._open.values()])

    # Weights, adapters and memory ------------------------------------------------------------------------

    def run_in_workers(
        self, function: Callable[..., Any] | str, *arguments: Any, **keywords: Any
    ) -> list[Any]:
        """Call a function (of the worker first) or a method in every worker."""
        results: list[Any] = self._engine.collective_rpc(function, args=arguments, kwargs=keywords)
        return results

    def reload(self) -> None:
        """Read the weights from their folder again."""
        self.run_in_workers(reload_weights, None)

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace weights in place by tensors of this process, where the worker is too."""
        self.run_in_workers(reload_weights, iter(weights))

    def load_file(self, path: str, size: int, layout: Sequence[FileWeight]) -> None:
        """Replace weights in place by those of a shared file."""
        self.run_in_workers(load_file, path, size, layout)

    def begin(self, method: str, *arguments: Any) -> None:
        """Call a method by name, as engines of other processes are called."""
        self._result = getattr(self, method)(*arguments)

    def end(self) -> Any:
        """Return the result of the call."""
        return self._result

    def weights_changed(self, version: int) -> None:
        """Forget all keys and values; requests under way go on, theirs computed afresh."""
        self._engine.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
        self.version = version
        self._engine.set_weight_version(str(version))

    def use_adapter(self, number: int, path: str | None) -> None:
        """Let new requests use an adapter, numbered afresh each time (None: the model alone)."""
        from vllm.lora.request import LoRARequest

        if self._adapter is not None:
            self._engine.remove_lora(self._adapter.lora_int_id)
        self._adapter = None if path is None else LoRARequest(f"adapter-{number}", number, path)
        if self._adapter is not None:
            self._engine.add_lora(self._adapter)

    def sleep(self, level: int) -> None:
        """Give GPU memory back: 1 keeps the weights in CPU memory, 2 forgets them."""
        self._engine.sleep(level)

    def wake(self, tags: list[str] | None = None) -> None:
        """Take GPU memory again: all of it, or that of "weights" or "kv_cache"."""
        self._engine.wake_up(tags)

    def close(self) -> None:
        """End the engine and its workers."""
        self._engine.engine_core.shutdown()

    # Parts of a step -------------------------------------------------------------------------------------

    def _accept(self, one: _Open, completion: Any) -> StopReason | None:
        """Append what the engine gave; how it ends the request."""
        if one.version < 0:
            one.version = self.version
        for token, log_prob in zip(completion.token_ids, completion.logprobs.logprobs, strict=True):
            if not math.isfinite(log_prob):
                self.drop_all()
                raise PolicyError(
                    "the model's log-probs are not finite; its weights hold nan; "
                    "all requests under way are dropped"
                )
            one.ids.append(int(token))
            one.log_probs.append(log_prob)
            may_end = self._stops.candidates[one.stop, token]
            reason = self._stops.ends(one.stop, one.ids) if may_end else None
            if reason is not None:
                return reason
        if len(one.ids) >= one.request.max_tokens:
            return "length"
        return "abort" if completion.finish_reason is not None else None

    def _finish(self, ended: Sequence[tuple[_Open, StopReason]]) -> list[Finished]:
        """Close requests, and learn from the workers what interventions did."""
        reports: dict[int, Report] = {}
        if self._watched:
            from at2po_agent.policies.vllm.logits_processor import take_reports

            reports = self.run_in_workers(take_reports, [one.key for one, _ in ended])[0]
        for key, report in reports.items():
            if report.error is not None:
                self._failed.append(report.error)
                self._engine.abort_request([str(key)])
                self._forget(key)
        failed = {key for key, report in reports.items() if report.error is not None}
        finished = []
        for one, reason in ended:
            if one.key not in failed:
                self._forget(one.key)
                if one.version < 0:
                    one.version = self.version
                known = reports.get(one.key)
                if known is not None:  # the worker may be a token ahead of what was accepted
                    one.forced = [place for place in known.forced if place < len(one.ids)]
                rule = None if known is None else known.rule
                finished.append(Finished(one.ticket, one.generation(reason), rule))
        return finished

    def _forget(self, key: int) -> None:
        one = self._open.pop(str(key), None)
        self._watched -= one is not None and one.request.intervention is not None
