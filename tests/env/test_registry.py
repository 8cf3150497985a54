"""Ids: registered at import, specs as JSON, tool environments of users, plug-ins of third parties."""

import importlib
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest

import at2po_env
from at2po_env.errors import ConfigError, EnvError, ToolError
from at2po_env.registry import SEARCH_QA, make_tool_env

ROOT = Path(__file__).parents[2]
IDS = [f"at2po/{name}-v0" for name in SEARCH_QA]


def double(x: int) -> int:
    """Double a number."""
    return 2 * x


TASKS = [{"question": "2 + 2?", "golden_answers": ["4"]}]


@pytest.fixture
def own_id() -> Iterator[str]:
    yield "test/Own-v0"
    gymnasium.registry.pop("test/Own-v0", None)


def test_the_eight_ids() -> None:
    assert IDS == [
        "at2po/HotpotQA-v0",
        "at2po/2WikiMultihopQA-v0",
        "at2po/MuSiQue-v0",
        "at2po/Bamboogle-v0",
        "at2po/NaturalQuestions-v0",
        "at2po/TriviaQA-v0",
        "at2po/PopQA-v0",
        "at2po/MiniWiki-v0",
    ]
    assert set(IDS) <= set(gymnasium.registry)


@pytest.mark.parametrize("env_id", IDS)
def test_specs_go_through_json(env_id: str) -> None:
    spec = gymnasium.spec(env_id)
    assert gymnasium.envs.registration.EnvSpec.from_json(spec.to_json()) == spec
    assert spec.max_episode_steps is None


def test_ids_work_without_an_import_and_nothing_is_opened_at_import() -> None:
    code = (
        "import sys, gymnasium\n"
        "env = gymnasium.make('at2po_env:at2po/MiniWiki-v0')\n"
        "print(env.reset(seed=0)[1]['task_id'].startswith('miniwiki'), 'torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "True False\n"
    code = "import sys, at2po_env; print('at2po_envs' in sys.modules, 'at2po_agent' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "False False\n"


def test_a_tool_environment_of_typed_functions_and_dicts(own_id: str) -> None:
    at2po_env.register_tool_env(own_id, tools=[double], tasks=TASKS, max_turns=3)
    env = gymnasium.make(own_id)
    prompt, info = env.reset(seed=0)
    assert "- <double> x </double>: Double a number." in prompt
    assert info["max_turns"] == 3
    assert "\n4\n" in env.step("<think>t</think><double>2</double>")[0]
    assert env.step("<answer>4</answer>")[1:3] == (1.0, True)
    at2po_env.check_env(gymnasium.make(own_id, render_mode="ansi"))


def test_make_overrides_what_was_registered(own_id: str) -> None:
    at2po_env.register_tool_env(own_id, tools=[double], tasks=TASKS, max_turns=3, reward="tag")
    env = gymnasium.make(own_id, max_turns=1, reward="boxed", protocol="hermes")
    assert env.reset(seed=0)[1]["stop"] == ("</tool_call>", "</answer>")
    assert env.step("<answer>4</answer>")[1] == -1.0


def test_make_vec_works(own_id: str) -> None:
    at2po_env.register_tool_env(own_id, tools=[double], tasks=TASKS)
    envs = gymnasium.make_vec(own_id, num_envs=3, max_turns=2)
    assert isinstance(envs, at2po_env.TextVectorEnv)
    envs.reset(seed=0)
    observations, rewards, terminated, truncated, _ = envs.step(
        ["<double>2</double>", "<answer>4</answer>", "nonsense"]
    )
    assert "\n4\n" in observations[0]
    assert rewards.tolist() == [0.0, 1.0, 0.0]
    assert terminated.tolist() == [False, True, True]
    assert not truncated.any()
    envs.close()


def test_tasks_are_read_at_the_first_make_and_shared(own_id: str) -> None:
    calls: list[int] = []

    def tasks() -> at2po_env.TaskSource:
        calls.append(1)
        return at2po_env.TaskList([at2po_env.Task("a", "b?")])

    at2po_env.register_tool_env(own_id, tools=[double], tasks=tasks)
    assert calls == []
    one, two = gymnasium.make(own_id), gymnasium.make(own_id)
    assert calls == [1]
    assert one.unwrapped.tasks is two.unwrapped.tasks  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"tools": [lambda x: x]}, ToolError),
        ({"tools": []}, ConfigError),
        ({"reward": "bleu"}, ConfigError),
        ({"max_turns": 0}, ConfigError),
        ({"max_turn": 3}, TypeError),
    ],
)
def test_what_cannot_work_is_refused_at_registration(
    own_id: str, options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        at2po_env.register_tool_env(own_id, **{"tools": [double], "tasks": TASKS, **options})
    assert own_id not in gymnasium.registry


MODULE = """
import at2po_env

@at2po_env.tool
def f(x: int) -> int:
    "Do."
    return x

at2po_env.register_tool_env("module/Env-v0", tools=[f], tasks=[{"question": "q"}])
"""


def test_a_module_that_registers_works_in_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "at2po_test_module.py").write_text(MODULE, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("at2po_test_module")
    spec = gymnasium.spec("module/Env-v0")
    assert gymnasium.envs.registration.EnvSpec.from_json(spec.to_json()) == spec
    at2po_env.check_env(gymnasium.make("module/Env-v0", render_mode="ansi"), process=True)
    gymnasium.registry.pop("module/Env-v0")


def test_what_no_other_process_can_repeat_does_not_claim_to_be_portable(own_id: str) -> None:
    at2po_env.register_tool_env(own_id, tools=[double], tasks=TASKS)
    assert not isinstance(gymnasium.spec(own_id).entry_point, str)


def test_an_id_of_another_process_says_what_to_import() -> None:
    with pytest.raises(EnvError, match="import the module that calls register_tool_env first"):
        make_tool_env(recipe="nosuch/Env-v0")


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "custom_tool_env.py"), run_name="example")
    env = gymnasium.make("examples/Warehouse-v0")
    env.reset(options={"index": 0})
    assert "tea: 4" in env.step("<count>tea</count>")[0]
    assert env.step("<count>gold</count>")[4]["outcome"] == "tool_error"
    env.step("<count>rice</count>")
    env.step("<count>tea</count>")
    assert env.step("<answer>11</answer>")[1] == 0.75  # right, with one count too many
    gymnasium.registry.pop("examples/Warehouse-v0")
    assert capsys.readouterr().err == ""


def plugin(folder: Path, name: str, value: str, code: str) -> None:
    """Install a distribution that names one entry point."""
    (folder / f"{name}_module.py").write_text(code, "utf-8")
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", "utf-8")
    (info / "entry_points.txt").write_text(f"[at2po.envs]\n{name}_envs = {value}\n", "utf-8")


def test_plugins_are_loaded_and_a_broken_one_is_named(tmp_path: Path) -> None:
    good = (
        "import gymnasium\n"
        "def register():\n"
        "    import at2po_env\n"
        "    def f(x: int) -> int:\n"
        "        'Do.'\n"
        "        return x\n"
        "    at2po_env.register_tool_env('good/Env-v0', tools=[f], tasks=[{'question': 'q'}])\n"
    )
    plugin(tmp_path, "good", "good_module:register", good)
    plugin(tmp_path, "module", "module_module", "import os\nos.environ['LOADED'] = 'yes'\n")
    plugin(tmp_path, "broken", "broken_module:register", "raise RuntimeError('half installed')\n")
    plugin(tmp_path, "gone", "no_such_module:register", "")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import os, warnings, gymnasium\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import at2po_env\n"
        "for warning in sorted(str(w.message) for w in caught if w.category.__name__ == 'PluginWarning'):\n"
        "    print(warning)\n"
        "print(gymnasium.make('good/Env-v0').reset(seed=0)[1]['task_id'], os.environ['LOADED'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    broken, gone, made = done.stdout.splitlines()
    assert broken == (
        "the plug-in 'broken_envs' (broken_module:register) of 'broken' could not be loaded: "
        "RuntimeError: half installed. Its environments are missing"
    )
    assert gone.startswith("the plug-in 'gone_envs' (no_such_module:register) of 'gone' could not be loaded")
    assert made == "0 yes"
