import gymnasium
import pytest

from at2po_agent.config.sections import Config
from at2po_agent.environments import EnvCounters, TaskOrder, make_eval_env, make_training_env, split_tasks
from at2po_env import register_tool_env, tool
from at2po_env.errors import ConfigError
from at2po_env.retrieval.counters import count


@tool()
def look(word: str) -> str:
    """Look a word up.

    Args:
        word: Anything.
    """
    return word


def tasks(*numbers: int) -> list[dict[str, object]]:
    return [{"id": f"q{number}", "question": f"{number}?", "golden_answers": ["x"]} for number in numbers]


register_tool_env("own/List-v0", tools=[look], tasks=tasks(*range(50)))
register_tool_env(
    "own/Splits-v0",
    tools=[look],
    tasks={"train": tasks(*range(10)), "dev": tasks(8, 9, 10), "odd": tasks(99)},
)


def shared_out(env_id: str, *, count: int = 200, held_out: float = 0.1, **kwargs):
    config = Config.model_validate(
        {
            "env": {"id": env_id, "held_out": held_out},
            "eval": {"questions": count, "kwargs": kwargs},
        }
    )
    return split_tasks(config, make_training_env(config), make_eval_env(config))


def indices(split) -> list[int]:
    return [options["index"] for options in split.evaluation]


def test_own_tasks_are_trained_on_or_asked_and_never_both():
    split = shared_out("own/List-v0")
    assert 1 <= len(split.evaluation) < 15  # about a tenth of 50
    assert sorted([*split.training, *indices(split)]) == list(range(50))
    assert split.seen == 0
    order = TaskOrder(split.training, seed=0)
    assert {one["index"] for one in order.options(0, len(split.training))} == set(split.training)


def test_a_question_stays_on_its_side_when_others_are_added():
    register_tool_env("own/More-v0", tools=[look], tasks=tasks(*range(100)))
    before, after = indices(shared_out("own/List-v0")), indices(shared_out("own/More-v0"))
    assert before == [index for index in after if index < 50]


def test_few_questions_leave_one_on_either_side():
    register_tool_env("own/Two-v0", tools=[look], tasks=tasks(0, 1))
    for share in (0.001, 0.999):
        split = shared_out("own/Two-v0", held_out=share)
        assert sorted([*split.training, *indices(split)]) == [0, 1]
        assert len(split.training) == 1
    register_tool_env("own/One-v0", tools=[look], tasks=tasks(0))
    assert shared_out("own/One-v0").seen == 1


def test_without_a_held_out_share_the_overlap_is_counted():
    split = shared_out("own/List-v0", held_out=0.0, count=20)
    assert (len(split.training), len(split.evaluation), split.seen) == (50, 20, 20)


def test_given_splits_are_taken_and_their_overlap_is_counted():
    split = shared_out("own/Splits-v0")  # no test split, so dev: 8 and 9 are trained on, too
    assert (list(split.training), indices(split), split.seen) == (list(range(10)), [0, 1, 2], 2)
    assert shared_out("own/Splits-v0", split="odd").seen == 0
    assert len(gymnasium.make("own/Splits-v0").get_wrapper_attr("tasks")) == 10
    with pytest.raises(ConfigError, match=r"no split 'test'\. It has 'train', 'dev', 'odd'"):
        gymnasium.make("own/Splits-v0", split="test")
    with pytest.raises(ConfigError, match=r"no split 'test'\. It has none"):
        gymnasium.make("own/List-v0", split="test")


def test_questions_of_one_id_that_differ_are_different_questions():
    others = [{"id": f"q{number}", "question": f"Another {number}?"} for number in range(50)]
    register_tool_env("own/Files-v0", tools=[look], tasks={"train": tasks(*range(50)), "test": others})
    assert shared_out("own/Files-v0").seen == 0


class _WithoutTasks(gymnasium.Wrapper):
    def has_wrapper_attr(self, name: str) -> bool:
        return name != "tasks" and super().has_wrapper_attr(name)


def test_of_questions_that_are_drawn_by_seed_nothing_is_known():
    config = Config()
    env = make_training_env(config)
    drawn = _WithoutTasks(env)
    split = split_tasks(config, drawn, env)
    assert split.training is None
    assert split.seen is None
    assert split_tasks(config, None, env).seen is None


def test_counters_show_what_rose_since_they_were_made():
    count(requests=10, queries=12, retries=1)
    counters = EnvCounters()
    assert counters.figures() == {}
    count(requests=4, queries=8)
    assert counters.figures()["retrieval/failures"] == 0
    count(failures=2, circuit_open=1)
    assert counters.figures() == {
        "retrieval/requests": 4,
        "retrieval/queries": 8,
        "retrieval/failures": 2,
        "retrieval/circuit_open": 1,
    }
    assert EnvCounters().figures() == {}


def test_the_hit_rate_is_that_of_the_step_alone():
    count(cache_hits=100)
    counters = EnvCounters()
    count(cache_hits=3, cache_misses=1)
    assert counters.figures()["retrieval/cache_hit_rate"] == pytest.approx(0.75)
    counters = EnvCounters()
    count(cache_misses=2)
    assert counters.figures()["retrieval/cache_hit_rate"] == 0.0
    counters = EnvCounters()
    count(requests=1)
    assert "retrieval/cache_hit_rate" not in counters.figures()


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("no_such_module:Env-v0", "env.id: got .*, but No module named 'no_such_module'.*PYTHONPATH"),
        ("at2po/HotpotQB-v0", "env.id: .*`at2po envs` lists"),
        ("not an id", "env.id: .*`at2po envs` lists"),
    ],
)
def test_an_id_that_cannot_be_found_is_one_clear_error(env_id, message):
    with pytest.raises(ConfigError, match=message):
        make_training_env(Config.model_validate({"env": {"id": env_id}}))
