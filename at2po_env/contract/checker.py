"""Checks an environment: Gymnasium's rules, the fork contract, a round trip through another process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Collection, Sequence
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils import env_checker

from at2po_env.contract.rules import CHECKS, Env, Play, StepResult, build
from at2po_env.errors import ContractError
from at2po_env.forking.base import ForkableEnv, fork, restore, snapshot
from at2po_env.forking.snapshots import Snapshot

PROCESS_TIMEOUT_S = 300.0
GYMNASIUM_WARNING = r"\x1b\[33mWARN: "


def check_env(
    env: Env,
    *,
    actions: Sequence[Any] | None = None,
    seed: int = 123,
    options: dict[str, Any] | None = None,
    ignore_info: Collection[str] = (),
    process: bool | None = None,
) -> None:
    """Raise unless an environment follows Gymnasium's interface and the fork contract.

    Resets and steps the environment many times; leaves it open, somewhere in an episode.

    Args:
        env: The environment, under any wrappers; they are checked too.
        actions: The actions to play, in order, at least one. Default: the environment's own
            `example_actions`; through a wrapper that changes the action space, samples of that space.
        seed: Seed of every reset.
        options: Options of every reset.
        ignore_info: Keys of `info` that may differ between two runs of the same episode, such as clocks.
        process: Also restore a snapshot in another Python process. Default: if the environment can be built
            from its spec there.

    Raises:
        ContractError: With the broken rule, the expected and the actual value, and the likely cause.
        SnapshotError: If a wrapper holds state and does not say how to write it as JSON, or a `Replay` is
            answered differently in another instance.

    Example:
        >>> from at2po_env.contract.testing import PigEnv
        >>> check_env(PigEnv())
    """
    if not isinstance(env, gymnasium.Env) or not isinstance(env.unwrapped, ForkableEnv):
        raise ContractError(
            f"check_env got a {type(getattr(env, 'unwrapped', env)).__name__}. Expected a ForkableEnv under "
            "any wrappers. Fix: derive the environment from at2po_env.ForkableEnv"
        )
    check_gymnasium(env)
    play = play_for(env, actions=actions, seed=seed, options=options, ignore_info=ignore_info)
    for check in CHECKS.values():
        check(env, play)
    check_process(env, play, required=process)


def play_for(
    env: Env,
    *,
    actions: Sequence[Any] | None = None,
    seed: int = 123,
    options: dict[str, Any] | None = None,
    ignore_info: Collection[str] = (),
) -> Play:
    """Choose the actions that the checks play: those given, else examples that fit the action space."""
    if actions is None:
        env.reset(seed=seed, options=options)
        examples = env.unwrapped.example_actions() if isinstance(env.unwrapped, ForkableEnv) else ()
        actions = [action for action in examples if env.action_space.contains(action)]
        if not actions:
            env.action_space.seed(seed)
            actions = [env.action_space.sample() for _ in range(4)]
    if not actions:
        raise ContractError("check_env needs at least one action to play, got none. Fix: pass actions=[...]")
    return Play(tuple(actions), seed, options, tuple(ignore_info))


def check_gymnasium(env: Env) -> None:
    """Run Gymnasium's checker on the environment under the wrappers; its warnings are errors here."""
    base = env.unwrapped
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=GYMNASIUM_WARNING, category=UserWarning)
            env_checker.check_env(base, skip_render_check=base.spec is None and base.render_mode is None)
    except (AssertionError, gymnasium.error.Error, UserWarning) as error:
        if isinstance(error, UserWarning) and not re.match(GYMNASIUM_WARNING, str(error)):
            raise
        raise ContractError(f"Gymnasium's checker refuses {type(base).__name__}: {error}") from error


def check_process(env: Env, play: Play, *, required: bool | None = None) -> None:
    """Restore a snapshot in another Python process, play on there, and compare.

    Args:
        env: The environment.
        play: The actions, the seed and the options.
        required: `True`: an environment that cannot be rebuilt from its spec is an error; `None`: it is
            skipped; `False`: never run.

    Raises:
        ContractError: If the other process fails or plays another episode.
    """
    if required is False:
        return
    spec = _portable_spec(env, play)
    if spec is None:
        if required:
            raise ContractError(
                f"{env} cannot be rebuilt in another process: it needs a spec whose entry point is a string "
                "and whose arguments are JSON, and wrappers that record their arguments"
            )
        return
    play.begin(env, 1)
    text = snapshot(env).to_json()
    job = {"spec": spec, "snapshot": text, "actions": list(play.actions), "ignore": list(play.ignore_info)}
    expected = play.run(fork(env), 1)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from at2po_env.contract.checker import replay_from_stdin; replay_from_stdin()",
        ],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=PROCESS_TIMEOUT_S,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=False,
    )
    if done.returncode != 0:
        raise ContractError(
            "Broken: a snapshot fits an environment in another process\n"
            f"  actual: the process failed with\n{done.stderr[-2000:]}"
        )
    reply = json.loads(done.stdout.splitlines()[-1])
    if reply["digest"] != Snapshot.from_json(text).digest:
        raise ContractError("Broken: a snapshot restored in another process is the same state")
    if reply["steps"] != _portable(expected):
        raise ContractError(
            "Broken: the same actions give the same episode in another process\n"
            f"  expected: {_portable(expected)}\n  actual: {reply['steps']}\n"
            "  likely cause: state that lives in this process only (globals, hash order, open connections)"
        )


def _portable_spec(env: Env, play: Play) -> str | None:
    spec: EnvSpec | None = env.spec
    if spec is None or not isinstance(spec.entry_point, str) or spec.entry_point.startswith("__main__"):
        return None
    try:
        text = spec.to_json()
        json.dumps(list(play.actions))
        return None if build(EnvSpec.from_json(text)) is None else text
    except (TypeError, ValueError, AttributeError):
        return None


def replay_from_stdin() -> None:
    """Rebuild, restore and play in the other process, and write the steps as one line of JSON."""
    job = json.load(sys.stdin)
    env = gymnasium.make(EnvSpec.from_json(job["spec"]))
    restore(env, Snapshot.from_json(job["snapshot"]))
    digest = snapshot(env).digest
    steps = Play(job["actions"], ignore_info=job["ignore"]).run(env, 1)
    sys.stdout.write(json.dumps({"digest": digest, "steps": _portable(steps)}) + "\n")


def _portable(steps: Sequence[StepResult]) -> Any:
    return json.loads(json.dumps(steps, default=repr))
