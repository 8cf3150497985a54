"""Cold start: supervised learning on demonstrations, so that a model from nothing can act at all.

Only the expert's own tokens are trained (invariant 2). What makes a model of half a million parameters copy
names it has never seen is the optimiser: Muon on the matrices, and AdamW with a high rate on the tied
embeddings. At 1e-2 instead of 3e-3 the loss after 300 steps is half as high.
"""

import math
from collections.abc import Generator, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from at2po_agent.agents.expert import CommandExpertConfig, ExpertConfig, demonstrate, follow
from at2po_agent.config.sections import ColdStartConfig
from at2po_agent.runs.progress import Progress
from at2po_agent.transcripts.inline import InlineTranscript, Transcript
from at2po_agent.transcripts.tokenizer import Tokenizer
from at2po_env import CommandEnv
from at2po_env.data.tasks import Task

PHASE = "cold start"
_WARMUP_STEPS = 20
_IGNORED = -100


class Demonstration(NamedTuple):
    """One sequence of the expert: an episode, or under a window transcript one turn.

    Attributes:
        ids: int64[T], prompt, actions and observations as the policy would see them.
        trained: bool[T], True on the tokens of actions.
    """

    ids: NDArray[np.int64]
    trained: NDArray[np.bool_]


class Script(Protocol):
    """An expert: plays one task, yielding actions and being sent observations."""

    def __call__(self, task: Task, *, rng: np.random.Generator) -> Generator[str, str, None]:
        """Begin an episode of `task`; `rng` draws what the expert leaves to chance."""


def record_demonstrations(
    env: gymnasium.Env[str, str],
    tokenizer: Tokenizer,
    config: ColdStartConfig,
    *,
    rng: np.random.Generator,
    progress: Progress | None = None,
    script: Script | None = None,
    transcript: Transcript | None = None,
) -> list[Demonstration]:
    """Let an expert play `config.demonstrations` episodes.

    Args:
        env: Environment with a task source `tasks`, as every tool environment has.
        tokenizer: Encodes actions and, by itself or through the transcript, what the environment shows.
        config: How many, and the shipped expert's faults.
        rng: Draws tasks and faults.
        progress: Listener.
        script: Another expert: a generator that yields actions and is sent observations.
        transcript: Turns what the environment shows into ids; None encodes it as it is.

    Returns:
        The sequences of all episodes, in order.
    """
    progress = progress or Progress()
    transcript = transcript or InlineTranscript(tokenizer)
    if script is None:
        world = env.unwrapped
        if isinstance(world, CommandEnv):
            script = partial(follow, env=world, config=CommandExpertConfig.model_validate(config.expert))
        else:
            script = partial(demonstrate, config=ExpertConfig.model_validate(config.expert))
    progress.start("demonstrations", config.demonstrations)
    demonstrations: list[Demonstration] = []
    for _ in range(config.demonstrations):
        demonstrations += _play(env, tokenizer, transcript, script, rng)
        progress.advance("demonstrations")
    progress.finish("demonstrations")
    return demonstrations


def cold_start(
    model: torch.nn.Module,
    demonstrations: Sequence[Demonstration],
    config: ColdStartConfig,
    *,
    rng: np.random.Generator,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Train a causal language model on the actions of demonstrations; the model is changed in place.

    Args:
        model: Transformers causal LM whose `forward` takes `input_ids` and `logits_to_keep`.
        demonstrations: At least one.
        config: Steps, batch size, learning rates.
        rng: Draws the batches.
        progress: Listener.

    Returns:
        `loss` (mean over the last tenth of the steps, nats per trained token) and `tokens` (trained upon).
    """
    progress = progress or Progress()
    optimizers = _optimizers(model, config)
    device = next(model.parameters()).device
    order: list[int] = []  # indices of demonstrations, in a new random order each time they are used up
    losses: list[float] = []
    tokens = 0
    model.train()
    progress.start(PHASE, config.steps)
    for step in range(config.steps):
        while len(order) < config.batch_size:
            order += rng.permutation(len(demonstrations)).tolist()
        ids, labels = _batch([demonstrations[index] for index in order[: config.batch_size]])
        del order[: config.batch_size]
        tokens += ids.numel()
        # A linear warmup over the first steps, then a half cosine to zero.
        cosine = 0.5 * (1.0 + math.cos(math.pi * step / config.steps))
        scale = min(1.0, (step + 1) / _WARMUP_STEPS) * cosine
        for optimizer, base in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = base * scale
        # The logits are computed only where the next token is trained.
        hidden = model.get_submodule("model")(input_ids=ids.to(device)).last_hidden_state[:, :-1]
        targets = labels[:, 1:].to(device)
        trained = targets != _IGNORED
        logits = model.get_submodule("lm_head")(hidden[trained])
        loss = functional.cross_entropy(logits.float(), targets[trained])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        progress.advance(PHASE, loss=losses[-1])
    progress.finish(PHASE)
    model.eval()
    recent = losses[-max(1, len(losses) // 10) :]
    return {"loss": float(np.mean(recent)) if recent else math.nan, "tokens": float(tokens)}


def _play(
    env: gymnasium.Env[str, str],
    tokenizer: Tokenizer,
    transcript: Transcript,
    script: Script,
    rng: np.random.Generator,
) -> list[Demonstration]:
    prompt, info = env.reset(seed=int(rng.integers(2**31)))
    expert = script(env.get_wrapper_attr("tasks").by_id(info["task_id"]), rng=rng)
    stop = info.get("stop", ())
    shown = transcript.first(prompt, info)
    sequences: list[list[tuple[Sequence[int], bool]]] = []  # of pieces, and whether these are trained
    action, ended = next(expert), False
    while not ended:
        observation, _, terminated, truncated, info = env.step(action)
        # An action that completes no stop string ends with the end of sequence, as a policy would have had to
        # sample it; or it would never learn to stop there.
        closed = not any(mark in action for mark in stop)
        if shown.fresh:
            sequences.append([])
        sequences[-1] += [
            (shown.ids, False),
            ([*tokenizer.encode(action), *[tokenizer.eos_id] * closed], True),
        ]
        ended = terminated or truncated
        if not ended:
            shown = transcript.next(shown, action, observation, info, closed=closed)
            action = expert.send(observation)
    return [
        Demonstration(
            np.array([token for ids, _ in pieces for token in ids], dtype=np.int64),
            np.array([trained for ids, trained in pieces for _ in ids], dtype=np.bool_),
        )
        for pieces in sequences
    ]


def _batch(rows: Sequence[Demonstration]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded `ids` and `labels` int64[B, T]; a label is ignored where the token is not trained."""
    length = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), _IGNORED)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.from_numpy(row.ids)
        labels[index, : len(row.ids)] = torch.from_numpy(np.where(row.trained, row.ids, _IGNORED))
    return ids, labels


def _optimizers(model: torch.nn.Module, config: ColdStartConfig) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms, each with its peak rate."""
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        inner = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (matrices if inner else rest).append(parameter)
    return [
        (torch.optim.Muon(matrices, lr=config.muon_lr, momentum=0.95, weight_decay=0.0), config.muon_lr),
        (torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0), config.lr),
    ]
