"""Engines of vLLM as a policy, with the contract of `HFPolicy`.

Log-probs are those of the model at the request's temperature (a greedy request: at temperature 1) before
top-p, in nats. Token t is drawn with uniform t of Philox(seed) by `logits_processor`, whatever the platform,
so in exact arithmetic the tokens are those of `HFPolicy`; rounding differs, as it depends on the batch.

A fork's prefix is found to its last token (`exact_prefixes`), so each request computes what is new in it, one
token at least.

This module knows no environment, no tree and no training, and imports without vLLM.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from multiprocessing.connection import wait
from pathlib import Path

import torch
from torch import Tensor, nn

from at2po_agent.policies.base import Intervention, PolicyStats, Request, SteppingPolicy, check_fits
from at2po_agent.policies.vllm.config import VLLMConfig
from at2po_agent.policies.vllm.engine import Engine, Finished
from at2po_agent.policies.vllm.process import RemoteEngine
from at2po_agent.policies.vllm.routing import Router
from at2po_agent.policies.vllm.spec import EngineSpec, Limits, place_engines
from at2po_agent.policies.vllm.weights import SharedSender, TransferSender, call_all, save_model
from at2po_agent.policies.weights import check_weights, is_adapted, merged_weights, named_weights
from at2po_agent.transcripts.inline import InlineTranscript, Transcript
from at2po_agent.transcripts.tokenizer import Tokenizer
from at2po_agent.types import Generation
from at2po_env.errors import PolicyError, require

_POLL_S = 0.01


class VLLMPolicy(SteppingPolicy):
    """Samples with vLLM.

    Args:
        model: The learner's model, or a folder (or a name that the local hub cache holds). With a module,
            `weights_changed` sends its weights to the engines.
        tokenizer: Its tokenizer.
        config: Engines, their memory and their processes.
        path: Folder that holds the weights of `model` as they are now; None writes them into a temporary one.
        slots: Sequences that an engine decodes at the same time; further requests wait.
        eos_ids: Ids that end a generation; None takes the tokenizer's.
        transcript: Turns what the environment shows into ids in rollouts; None encodes it as it is.

    Raises:
        MissingExtraError: vLLM is not installed.
        PolicyError: An engine cannot be started.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        tokenizer: Tokenizer,
        *,
        config: VLLMConfig | None = None,
        path: str | Path | None = None,
        slots: int = 256,
        eos_ids: Collection[int] | None = None,
        transcript: Transcript | None = None,
    ) -> None:
        require("vllm.v1", "vllm")
        super().__init__()
        self.tokenizer = tokenizer
        self.transcript = transcript or InlineTranscript(tokenizer)
        self.model = model if isinstance(model, nn.Module) else None
        self._saved: tempfile.TemporaryDirectory[str] | None = None
        config, device = config or VLLMConfig(), None
        folder = path or model
        if isinstance(model, nn.Module):
            example = next(model.parameters())
            device = example.device
            if config.dtype == "auto":
                dtype = str(example.dtype).removeprefix("torch.")
                config = config.model_copy(update={"dtype": dtype})
            if path is None:
                self._saved = tempfile.TemporaryDirectory(prefix="at2po-model-")
                folder = self._saved.name
                save_model(model, folder)
        self.config = config
        self.specs = [
            EngineSpec(
                model=str(folder),
                config=config,
                max_sequences=slots,
                eos_ids=(tokenizer.eos_id,) if eos_ids is None else tuple(eos_ids),
                shared=gpus.shared,
                devices=gpus.devices,
            )
            for gpus in place_engines(config, device)
        ]
        self._engines: list[Engine | RemoteEngine] = []
        self._router = Router(len(self.specs))
        self._where: dict[int, int] = {}
        self._rules: dict[int, Intervention] = {}
        self._asleep = False
        self._adapters = 0
        self._version = 0
        try:
            self.limits = self._start()
        except BaseException:
            self.close()
            raise

    @property
    def version(self) -> int:
        """Counts weight updates; every generation carries the version that sampled its first token."""
        return self._version

    def count_from(self, version: int) -> None:
        """Set the version of the present weights; the next update counts on from it."""
        self._version = version

    @property
    def stats(self) -> PolicyStats:
        """Counts of all that was computed since the policy was made, by the engines' own counters."""
        total = PolicyStats()
        for one in call_all(self._engines, "counted"):
            for name, count in vars(one).items():
                setattr(total, name, getattr(total, name) + count)
        return total

    @property
    def idle(self) -> bool:
        """True if no request waits or is under way."""
        return not self._where and not self._finished

    def cancel(self, ticket: int) -> None:
        """Forget a request, finished or not; `poll` will not report it."""
        self._finished.pop(ticket, None)
        if ticket in self._where:
            self._engines[self._where[ticket]].discard(ticket)
            self._forget(ticket)

    def abort(self, ticket: int) -> Generation:
        """Stop a request now and return what it generated so far.

        Raises:
            PolicyError: No such request is under way, or the engine has died.
        """
        if ticket in self._where:
            finished = self._engines[self._where[ticket]].remove(ticket)
            if finished is not None:
                self._settle(finished)
        if ticket not in self._finished:
            raise PolicyError(f"no request with ticket {ticket} is under way")
        return self._finished.pop(ticket)

    # Weights and memory ----------------------------------------------------------------------------------

    def update_weights(self, weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Replace the engines' weights in place, by the names of a checkpoint, and count up `version`.

        Raises:
            PolicyError: A name is unknown or a shape does not fit (nothing is sent then), or an engine cannot
                load them.
        """
        new = dict(weights)
        if self.model is not None:
            check_weights(self.model, new)
        self.wake()
        self._send_weights(new)
        self._renew()

    def weights_changed(self) -> None:
        """The learner's weights (or the files of the folder) are new: send them, and count up `version`.

        The engines forget all keys and values; requests under way go on with the new weights, theirs computed
        afresh. Sleeping engines get the weights when they wake.
        """
        if self._asleep:
            self._version += 1
            return
        self._send()
        self._renew()

    def use_adapter(self, path: str | Path | None) -> None:
        """Sample with a LoRA adapter (a folder as peft saves it) from now on; None: with the model alone.

        Raises:
            PolicyError: The engines were started without `lora_rank`, or cannot load it.
        """
        if not self.config.lora_rank:
            raise PolicyError(
                "the engines take no adapters. Fix: model.vllm.lora_rank=N, the largest rank among them"
            )
        self.wake()
        self._send_adapter(path)
        self._renew()

    def rest(self) -> None:
        """Give the memory of a GPU back that the learner shares, until the next request."""
        resting = self.config.sleep and any(spec.shared for spec in self.specs)
        if resting and not self._asleep and self.idle:
            call_all(self._engines, "sleep", 1 if self.model is None else 2)
            self._asleep = True

    def wake(self) -> None:
        """Take that memory again, with the learner's weights as they are now."""
        if not self._asleep:
            return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what the learner's allocator keeps for itself
        if self.model is None:
            call_all(self._engines, "wake")
        else:
            call_all(self._engines, "wake", ["weights"])
            self._send()
            call_all(self._engines, "wake", ["kv_cache"])
        self._asleep = False
        call_all(self._engines, "weights_changed", self._version)
        self._router.forget()

    def close(self) -> None:
        """End the engines; requests under way are lost."""
        for engine in self._engines:
            engine.close()
        self._where.clear()
        if self._saved is not None:
            self._saved.cleanup()

    # Parts -----------------------------------------------------------------------------------------------

    def _start(self) -> Limits:
        """Start the engines, and choose the way of new weights."""
        config = self.config
        self._send_weights: Callable[[Mapping[str, Tensor]], object]
        if config.asynchronous:
            remote = [RemoteEngine(spec, self.tokenizer, number=n) for n, spec in enumerate(self.specs)]
            self._engines = [*remote]
            limits, *_ = [engine.wait_ready() for engine in remote]
        else:
            engine = Engine(self.specs[0], self.tokenizer)
            self._engines, limits = [engine], engine.limits
        dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
        if config.transfer in ("ipc", "nccl"):
            workers = config.tensor_parallel
            self._send_weights = TransferSender(
                self._engines, config.transfer, workers=workers, dtype=dtype
            ).send
        elif config.asynchronous or config.tensor_parallel > 1:
            self._send_weights = SharedSender(self._engines, dtype).send
        else:
            self._send_weights = lambda weights: call_all(self._engines, "load", weights.items())
        return limits

    def _send(self) -> None:
        if self.model is None:
            call_all(self._engines, "reload")
        elif not is_adapted(self.model):
            self._send_weights(named_weights(self.model))
        elif not self.config.lora_rank:
            self._send_weights(merged_weights(self.model))
        else:
            with tempfile.TemporaryDirectory(prefix="at2po-adapter-") as folder:
                self.model.save_pretrained(folder)  # type: ignore[operator]  # peft's
                self._send_adapter(folder)

    def _send_adapter(self, path: str | Path | None) -> None:
        self._adapters += 1
        call_all(self._engines, "use_adapter", self._adapters, None if path is None else str(path))

    def _renew(self) -> None:
        self._version += 1
        call_all(self._engines, "weights_changed", self._version)
        self._router.forget()

    def _advance(self) -> None:
        """Let the engines work until something finishes.

        An engine in this process makes one step; engines in their own go on anyway, and are waited for no
        longer than 10 ms.

        Raises:
            PolicyError: An engine has died, and its requests are lost; or an intervention failed.
        """
        deadline, known = time.monotonic() + _POLL_S, len(self._finished)
        while self._where:
            busy = [self._engines[number] for number in sorted(set(self._where.values()))]
            for engine in busy:
                self._collect(engine)
            remote = [engine.connection for engine in busy if isinstance(engine, RemoteEngine)]
            left = deadline - time.monotonic()
            if len(self._finished) > known or not remote or left <= 0:
                return
            wait(remote, left)

    def _collect(self, engine: Engine | RemoteEngine) -> None:
        try:
            finished = engine.collect()
        except PolicyError:
            for ticket in [t for t, n in self._where.items() if self._engines[n] is engine]:
                if ticket not in engine.tickets:
                    self._forget(ticket)
            raise
        for one in finished:
            self._settle(one)

    def _settle(self, finished: Finished) -> None:
        """Keep a generation, and give the caller's intervention the state that its copy has come to."""
        own = self._rules.get(finished.ticket)
        if own is not None and finished.rule is not None and finished.rule is not own:
            _copy_state(finished.rule, own)
        self._forget(finished.ticket)
        self._finished[finished.ticket] = finished.generation

    def _forget(self, ticket: int) -> None:
        self._rules.pop(ticket, None)
        self._router.done(self._where.pop(ticket))

    def _check(self, request: Request) -> None:
        most = self.limits.max_positions
        limit = (
            f"the engine's {most} positions (model.vllm.max_model_len, or the model's own); "
            "shorten the prefix or max_tokens"
        )
        check_fits(request, self.limits.vocab_size, [(most, limit)])

    def _begin(self, ticket: int, request: Request) -> None:
        self.wake()
        number = self._router.route(request.prefix_ids)
        self._where[ticket] = number
        if request.intervention is not None:
            self._rules[ticket] = request.intervention
        try:
            self._engines[number].add(ticket, request)
        except BaseException:
            self._forget(ticket)
            raise


def _copy_state(source: object, target: object) -> None:
    """Give the target the state of the source, as pickle would restore it."""
    state = source.__getstate__()
    if hasattr(target, "__setstate__"):
        target.__setstate__(state)
        return
    for part in state if isinstance(state, tuple) else (state,):
        for name, value in (part or {}).items():
            object.__setattr__(target, name, value)
