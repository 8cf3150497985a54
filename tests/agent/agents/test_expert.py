import numpy as np
import pytest
from helpers.corridor import Corridor

from at2po_agent.agents.expert import CommandExpertConfig, ExpertConfig, demonstrate, follow, plan
from at2po_env.data.tasks import Task
from at2po_env.errors import DataError

TWO_HOPS = Task(
    "t", "Where was the director of Ab Cd born?", ("Ij Kl",),
    {"path": ["Ab Cd", "Ef Gh", "Ij Kl"], "chain": ["director", "birthplace"]},
)  # fmt: skip
FLAWLESS = {"early_stop": 0.0, "half_query": 0.0, "page_title": 0.0}


def play(page: str = "The film Mn Op was made by Qr St.", **faults: float) -> list[str]:
    config = ExpertConfig(**{**FLAWLESS, **faults})
    script = demonstrate(TWO_HOPS, config=config, rng=np.random.default_rng(0))
    actions = [next(script)]
    try:
        while True:
            actions.append(script.send(page))
    except StopIteration:
        return actions


def test_a_flawless_expert_walks_the_path_and_answers():
    assert play() == [
        "<think> director</think><search> Ab Cd</search>",
        "<think> birthplace</think><search> Ef Gh</search>",
        "<think> answer</think><answer>\\boxed{ Ij Kl}</answer>",
    ]


def test_an_expert_that_stops_early_answers_what_the_first_page_says():
    actions = play(early_stop=1.0)
    assert len(actions) == 2
    assert "\\boxed{ Ef Gh}" in actions[-1]


def test_an_expert_that_halves_a_query_answers_a_name_of_the_page_it_gets():
    actions = play(half_query=1.0)
    assert actions[-2].count(" Ab</search>") + actions[-2].count(" Ef</search>") == 1
    assert "\\boxed{ Mn Op}" in actions[-1] or "\\boxed{ Qr St}" in actions[-1]


def test_a_page_without_names_leaves_the_query_as_the_answer():
    actions = play(page="nothing", half_query=1.0)
    assert "\\boxed{ Ab Cd}" in actions[-1] or "\\boxed{ Ef Gh}" in actions[-1]


def test_an_expert_may_answer_the_title_of_the_last_page():
    assert "\\boxed{ Ef Gh}" in play(page_title=1.0)[-1]


def test_an_expert_that_reads_the_wrong_name_goes_on_from_there():
    assert play(page="The film Ab Cd was directed by Ef Gh and made by Qr St.", wrong_hop=1.0) == [
        "<think> director</think><search> Ab Cd</search>",
        "<think> birthplace</think><search> Qr St</search>",  # the only name that was not asked for
        "<think> answer</think><answer>\\boxed{ Ab Cd}</answer>",  # then the first but the title, Qr St
    ]


def test_a_page_that_names_nothing_else_is_read_rightly():
    assert play(page="It was founded in 1950.", wrong_hop=1.0) == play()


def test_only_the_hop_in_the_middle_may_be_uncertain():
    # Of two hops the middle one is the second: the first is read rightly, however often errors happen.
    actions = play(page="Ef Gh, Ij Kl, Qr St", wrong_hop=1.0, uncertain_hops="middle")
    assert actions[1].endswith("<search> Ef Gh</search>")
    assert "\\boxed{ Qr St}" in actions[-1]
    assert "<search> Ef Gh" not in play(page="Ef Gh, Ij Kl, Qr St", wrong_hop=1.0)[1]


def test_thoughts_may_repeat_the_question():
    short, aloud = play(), play(think_aloud=True)
    said = f" {TWO_HOPS.question}</think>"
    assert [action.replace(said, "</think>") for action in aloud] == short
    assert all(said in action for action in aloud)


def test_faults_come_as_often_as_configured():
    config = ExpertConfig(early_stop=0.6, half_query=0.0, page_title=0.0)
    rng = np.random.default_rng(0)
    early = 0
    for _ in range(1000):
        script = demonstrate(TWO_HOPS, config=config, rng=rng)
        next(script)
        early += "answer" in script.send("page")
    assert 550 < early < 650  # 0.6 * 1000, standard deviation 15.5


def test_multi_hop_data_sets_are_demonstrated_by_their_supporting_titles():
    task = Task("t", "q?", ("gold",), {"supporting_facts": {"title": ["A", "A", "B"], "sent_id": [0, 1, 0]}})
    assert plan(task).queries == ("A", "B")
    assert plan(task).findings == ("B", "gold")


def test_a_task_that_tells_no_way_is_refused():
    with pytest.raises(DataError, match="task 't'"):
        plan(Task("t", "q?", ("gold",), {}))


# Worlds of commands


class Guided(Corridor):
    """The corridor with an expert."""

    def expert_commands(self):
        return [*["forward"] * (3 - self.get_state().world), "open door"]


def wandering(wander, seed=0, env=None):
    env = env or Guided()
    _, info = env.reset(options={"task_id": "far"})
    script = follow(
        env.tasks.by_id(info["task_id"]),
        env=env,
        config=CommandExpertConfig(wander=wander),
        rng=np.random.default_rng(seed),
    )
    action, ended, actions = next(script), False, []
    while not ended:
        actions.append(action)
        observation, reward, terminated, truncated, _ = env.step(action)
        ended = terminated or truncated
        if not ended:
            action = script.send(observation)
    return actions, reward


def test_the_expert_of_a_world_is_followed_with_the_next_command_in_mind():
    actions, reward = wandering(wander=0.0)
    assert actions == [
        "<think> forward </think><action> forward </action>",
        "<think> open door </think><action> forward </action>",
        "<think> then </think><action> open door </action>",
    ]
    assert reward == 1.0


def test_an_expert_that_wanders_plans_anew():
    played = [wandering(wander=0.5, seed=seed) for seed in range(30)]
    assert any("<think> maybe </think>" in action for actions, _ in played for action in actions)
    assert {reward for _, reward in played} >= {1.0, -1.0}  # some detours jump, others cost a turn
    assert len({tuple(actions) for actions, _ in played}) > 3


def test_a_world_without_an_expert_says_so():
    class Silent(Corridor):
        def commands(self, state):
            return ["search[...]"] * bool(state)

    with pytest.raises(DataError, match="no expert to demonstrate"):
        wandering(wander=0.0, env=Silent())
