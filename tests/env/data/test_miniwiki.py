import itertools
import json

import gymnasium
import pytest

from at2po_env.data.miniwiki import (
    COUNTS,
    MiniWikiTasks,
    chains,
    describe,
    in_test_split,
    make_world,
    name_words,
    phrase,
)
from at2po_env.errors import DataError

FIRST_NAMES = ["Gifam Ribur", "Kebi Zaba"]


def test_a_world_is_a_pure_function_of_seed_and_split():
    assert make_world(3, "train") == make_world(3, "train")
    assert make_world(3, "train").passages != make_world(4, "train").passages
    assert make_world(3, "train").passages != make_world(3, "test").passages


def test_a_world_holds_one_passage_per_entity_with_its_name_as_title():
    passages = make_world(0, "train").passages
    assert len(passages) == sum(COUNTS.values()) == 586
    assert len({passage.title for passage in passages}) == 586
    assert all(f" {passage.title} " in passage.text for passage in passages)


def test_training_and_test_worlds_share_words_but_no_name():
    train = {name for seed in range(30) for name in make_world(seed, "train").entities}
    test = {name for seed in range(30) for name in make_world(seed, "test").entities}
    assert not train & test
    assert {word for name in train for word in name.split()} == {
        word for name in test for word in name.split()
    }


@pytest.mark.parametrize("split", ["train", "test"])
def test_namesakes_bear_the_words_of_another_kind_in_the_other_order(split):
    world = make_world(5, split, namesakes=0.3)
    pairs = [
        (entity, world.entities[exchanged])
        for name, entity in world.entities.items()
        if (exchanged := " ".join(reversed(name.split()))) in world.entities
    ]
    assert len(pairs) >= round(0.3 * 586) // 2 * 2
    assert len(world.entities) == 586
    assert sum(one.kind != other.kind for one, other in pairs) >= 174
    words = {word: number for number, word in enumerate(name_words())}
    numbers = [tuple(words[word] for word in name.split()) for name in world.entities]
    assert all(in_test_split(*pair) == (split == "test") for pair in numbers)


def test_a_world_without_namesakes_is_the_same_as_ever():
    assert make_world(3, "train", namesakes=0.0) == make_world(3, "train")
    assert list(make_world(0, "train").entities)[:2] == FIRST_NAMES
    with pytest.raises(DataError, match=r"namesakes=0\.6"):
        make_world(0, "train", namesakes=0.6)


def test_a_search_for_a_name_finds_the_namesake_too():
    env = gymnasium.make("at2po/MiniWiki-v0", namesakes=0.4, topk=2)
    world = make_world(0, "train", namesakes=0.4)
    name = next(name for name in world.entities if " ".join(reversed(name.split())) in world.entities)
    env.reset(options={"index": 0})
    shown, *_ = env.step(f"<think> x </think><search> {name} </search>")
    assert describe(world.entities[name]) in shown
    assert describe(world.entities[" ".join(reversed(name.split()))]) in shown


def test_a_fifth_of_all_names_belongs_to_test_worlds():
    size = len(name_words())
    assert size == 200
    assert sum(in_test_split(i, j) for i in range(size) for j in range(size)) == size * size // 5


def test_chain_types_fit_together():
    # Out-degrees: film 2 (to person, company), person 2 (city, company), company 2 (person, city), city 1,
    # country 1. One hop: 2+2+2+1+1 = 8. Two hops, the sum of the targets' out-degrees: film 2+2, person 1+2,
    # company 2+1, city 1, country 1 = 12.
    assert len(chains(1)) == 8
    assert len(chains(2)) == 12
    assert ("film", "director", "birthplace", "country") in chains(3)


def test_questions_read_as_english():
    assert phrase("film", ["director"], "Velor Tamin") == "Who directed Velor Tamin?"
    assert phrase("film", ["director", "birthplace"], "X Y") == "Where was the director of X Y born?"
    assert (
        phrase("film", ["maker", "founder", "birthplace", "country"], "X Y")
        == "In which country is the birthplace of the founder of the maker of X Y?"
    )


@pytest.mark.parametrize("hops", [1, 2, 3, 4])
def test_bridge_answers_follow_from_the_passages_alone(hops):
    tasks = MiniWikiTasks("test", worlds=2, hops=(hops,))
    for index in range(50):
        task = tasks[index]
        texts = {passage.title: passage.text for passage in tasks.world(task).passages}
        path = task.metadata["path"]
        assert len(set(path)) == len(path) == hops + 1
        assert path[0] in task.question
        for here, there in itertools.pairwise(path):
            assert there in texts[here]
        assert task.golden_answers == (path[-1],)
        assert path[-1] not in task.question


def test_comparisons_name_the_earlier_of_the_two():
    tasks = MiniWikiTasks(hops=("comparison",))
    for index in range(20):
        task = tasks[index]
        first, second = (tasks.world(task).entities[name] for name in task.metadata["path"])
        assert task.golden_answers == ((first if first.year < second.year else second).name,)
        assert str(first.year) in describe(first)


def test_hops_and_worlds_rotate_and_any_question_can_be_found_again():
    tasks = MiniWikiTasks("test", worlds=3, hops=(1, 2))
    assert [tasks[i].metadata["world"] for i in range(4)] == [0, 1, 2, 0]
    assert [tasks[i].metadata["hops"] for i in (0, 2, 3, 5, 6)] == [1, 1, 2, 2, 1]
    task = tasks[len(tasks) - 1]
    assert tasks.by_id(task.id) == task
    json.dumps(dict(task.metadata))


@pytest.mark.parametrize(
    "task_id", ["", "5", "miniwiki-train-0-5", "miniwiki-test-1-5", "miniwiki-test-0-1e3", "x-٣"]
)
def test_an_id_of_another_source_is_unknown(task_id):
    with pytest.raises(KeyError, match="miniwiki-test-0-0"):
        MiniWikiTasks("test", worlds=1).by_id(task_id)


def test_an_index_out_of_range_is_an_index_error():
    tasks = MiniWikiTasks("test", worlds=1)
    with pytest.raises(IndexError):
        tasks[len(tasks)]
    with pytest.raises(IndexError):
        tasks[-1]


@pytest.mark.parametrize(
    "kwargs", [{"hops": ()}, {"hops": (7,)}, {"hops": ("two",)}, {"worlds": 0}, {"first_world": -1}]
)
def test_senseless_sources_are_refused(kwargs):
    with pytest.raises(DataError):
        MiniWikiTasks(**kwargs)
