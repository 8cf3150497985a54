import ast
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

import at2po_agent
from at2po_agent.config.loading import config_text, find_config, flatten, load_config, shipped_configs
from at2po_agent.config.sections import Config
from at2po_agent.environments import make_training_env
from at2po_agent.run import plan_run
from at2po_env.errors import ConfigError
from at2po_env.retrieval.base import Passage
from at2po_env.retrieval.bm25.retriever import Bm25Retriever
from at2po_env.retrieval.server.running import serving

PUBLISHED_SHAPES = {  # parameters, as the models' cards count them
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen2.5-7b": 7_615_616_512,
}


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def sections(parent: type[BaseModel] = Config, prefix: str = "") -> dict[str, type[BaseModel]]:
    """Groups of settings by dotted name, groups within groups included."""
    found: dict[str, type[BaseModel]] = {}
    for name, field in parent.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):  # X, and X of `X | None`
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found |= {f"{prefix}{name}": kind}
                found |= sections(kind, f"{prefix}{name}.")
    return found


def test_groups_within_groups_are_found():
    assert {"model", "model.chat", "model.lora", "rollout", "rollout.thinking"} <= sections().keys()


def test_every_field_has_a_help_text():
    for section in [Config, *sections().values()]:
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
            assert field.description.endswith((".", ")")), f"{section.__name__}.{name}"


def test_every_field_is_read_somewhere():
    read: set[str] = set()
    for path in Path(at2po_agent.__file__).parent.rglob("*.py"):
        if path.name == "sections.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    unread = [
        f"{name}.{field}"
        for name, section in sections().items()
        for field in section.model_fields
        if field not in read
    ]
    assert unread == []
    assert "no_such_field" not in read


@pytest.mark.parametrize(
    "name",
    [
        "quickstart",
        "hotpotqa-tiny",
        "at2po-search",
        *(f"{model}-{task}" for model in PUBLISHED_SHAPES for task in ("multihop", "singlehop")),
        "qwen3-4b-webshop",
        "qwen3-4b-household",
    ],
)
def test_shipped_configurations_are_valid(name):
    assert name in shipped_configs()
    assert load_config(name).run.name == name


@pytest.mark.parametrize("model", PUBLISHED_SHAPES)
@pytest.mark.parametrize(
    ("task", "env", "splits"),
    [("multihop", "HotpotQA", ("train", "dev")), ("singlehop", "NaturalQuestions", ("train", "test"))],
)
def test_the_published_settings_are_the_published_ones(model, task, env, splits):
    config = load_config(f"{model}-{task}")
    assert config.env.id == f"at2po/{env}-v0"
    assert (config.env.kwargs["split"], config.eval.kwargs["split"]) == splits
    # 6 searches and an answer; the best 3 passages of E5 over wiki-18, which a server has
    assert (config.env.kwargs["max_turns"], config.env.kwargs["topk"]) == (7, 3)
    assert config.env.kwargs["retriever"] == "http://localhost:8000"
    assert (config.algorithm.preset, config.algorithm.keep, config.rollout.expansion) == (
        "at2po",
        "all",
        "entropy",
    )
    assert (config.rollout.alpha, config.rollout.temperature, config.rollout.top_p) == (0.05, 1.0, 1.0)
    assert (config.algorithm.loss, config.algorithm.kl_weight, config.train.epochs) == ("atpo", 0.0, 1)
    assert (config.rollout.chains, config.rollout.forks, config.rollout.rounds) == (10, 6, 2)
    assert config.algorithm.loss_options == {"clip_low": 3e-3, "clip_high": 4e-3}
    assert config.algorithm.credit_options == {"value_mode": "child_softmax", "advantage_mode": "node_value"}
    assert (config.train.questions, config.train.minibatch_questions, config.train.steps) == (64, 8, 240)
    assert config.train.old_log_probs == "recompute"
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (1e-6, 0.01)
    assert (config.optimizer.schedule, config.optimizer.warmup_steps) == ("constant", 0)
    assert config.optimizer.max_grad_norm == 1.0
    assert (config.rollout.max_prompt_tokens, config.rollout.max_response_tokens) == (2000, 6192)


@pytest.mark.parametrize(("model", "parameters"), PUBLISHED_SHAPES.items())
def test_the_shapes_are_those_of_the_published_models(model, parameters):
    assert plan_run(load_config(f"{model}-multihop"))["parameters"] == parameters


def test_the_published_configurations_search_at_their_server(tmp_path):
    (tmp_path / "nq.jsonl").write_text('{"id": "0", "question": "Who?", "golden_answers": ["Ada"]}\n')
    with serving(Bm25Retriever.from_passages([Passage("0", "Ada", "Ada wrote the first program.")])) as url:
        data = f"dataset={tmp_path / 'nq.jsonl'}"
        env = make_training_env(load_config("qwen2.5-7b-singlehop", [f"env.kwargs.retriever={url}", data]))
        env.reset(options={"index": 0})
        shown, *_ = env.step("<think> Who? </think><search> Ada </search>")
    assert "first program" in shown


def test_the_command_line_goes_before_the_file(tmp_path):
    path = write(tmp_path, "train: {steps: 3, questions: 9}\n")
    config = load_config(path, ["train.steps=5", "run.name=x", "env.kwargs.hops=[1,3]"])
    assert (config.train.steps, config.train.questions, config.run.name) == (5, 9, "x")
    assert config.env.kwargs == {"hops": [1, 3]}


@pytest.mark.parametrize(
    "order",
    [["algorithm=grpo", "algorithm.loss=atpo"], ["algorithm.loss=atpo", "algorithm=grpo"]],
)
def test_a_preset_comes_before_single_parts_in_any_order(order):
    config = load_config("quickstart", order)
    assert config.algorithm.preset == "grpo"
    assert config.algorithm.credit == "group"
    assert config.algorithm.loss == "atpo"
    assert config.algorithm.loss_options == {}  # GRPO's clip of 0.2 does not become ATPO's
    assert config.rollout.expansion == "chains"


def test_a_preset_brings_its_published_shape_unless_the_file_has_one(tmp_path):
    assert load_config(write(tmp_path, "algorithm: grpo\n")).rollout.leaves == 16
    shaped = load_config("quickstart", ["algorithm=grpo"]).rollout
    assert shaped.leaves == load_config("quickstart").rollout.leaves == 12


def test_a_preset_on_the_command_line_replaces_the_parts_of_the_file(tmp_path):
    path = write(tmp_path, "algorithm: {preset: at2po, loss: sapo}\nrollout: {expansion: random}\n")
    assert (load_config(path).algorithm.loss, load_config(path).rollout.expansion) == ("sapo", "random")
    config = load_config(path, ["algorithm=at2po"])
    assert (config.algorithm.loss, config.rollout.expansion) == ("atpo", "entropy")


def test_single_options_keep_the_other_options_of_the_preset():
    config = load_config("quickstart", ["algorithm.loss_options.clip_high=0.1"])
    assert config.algorithm.loss_options == {"clip_low": 3e-3, "clip_high": 0.1}


def test_a_share_of_clipped_tokens_needs_bounds():
    assert load_config("quickstart", ["algorithm.clip_share=0.05"]).algorithm.clip_share == 0.05
    with pytest.raises(ConfigError, match=r"clip_share.*'sapo' has no clip_low"):
        load_config("quickstart", ["algorithm.clip_share=0.05", "algorithm.loss=sapo"])


def test_all_problems_are_said_at_once(tmp_path):
    path = write(
        tmp_path, "optimizer: {lr: -1, learning_rate: 3}\ntrain: {stps: 3}\nalgorithm: {loss: atpoo}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["train.questions=abc", "rollout.expansion=entropi"])
    text = str(caught.value)
    assert text.startswith(f"{path}: 6 problems")
    for part in (
        "optimizer.lr: got -1, expected",
        "optimizer.learning_rate: unknown key",
        "train.stps: unknown key (got 3); did you mean steps",
        "train.questions (command line): got 'abc', expected",
        "algorithm.loss: no part named 'atpoo'; did you mean atpo",
        "rollout.expansion (command line): no part named 'entropi'; did you mean entropy",
    ):
        assert part in text


def test_values_that_do_not_go_together_are_refused(tmp_path):
    path = write(tmp_path, "train: {questions: 4, minibatch_questions: 8}\n")
    with pytest.raises(ConfigError, match=r"train: minibatch_questions \(8\) exceeds questions \(4\)"):
        load_config(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quickstrt", "did you mean quickstart"),
        ("/no/such/file.yaml", "neither a file"),
    ],
)
def test_an_unknown_configuration_is_named(name, message):
    with pytest.raises(ConfigError, match=message):
        load_config(name)


@pytest.mark.parametrize("text", ["train: [", "- 1\n- 2\n", "run: ${nothing.here}\n"])
def test_a_file_that_is_no_configuration_is_named(tmp_path, text):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        load_config(path)


@pytest.mark.parametrize("override", ["train.steps", "=3", "train.steps=[1", "algorithm=nonsense"])
def test_an_override_that_says_nothing_is_named(override):
    with pytest.raises(ConfigError, match="1 problem"):
        load_config("quickstart", [override])


def test_a_file_holds_only_what_differs_from_its_base(tmp_path):
    (tmp_path / "below.yaml").write_text(
        "algorithm: {preset: grpo, loss: gspo, loss_options: {clip_low: 0.1}}\n"
        "rollout: {chains: 4, expansion_options: {}}\ntrain: {questions: 9}\n"
        "env: {kwargs: {hops: [1], worlds: 2}}\n"
    )
    config = load_config(write(tmp_path, "base: below.yaml\ntrain: {steps: 3}\nenv: {kwargs: {hops: [2]}}\n"))
    assert (config.train.questions, config.train.steps, config.rollout.chains) == (9, 3, 4)
    assert config.env.kwargs == {"hops": [2], "worlds": 2}
    assert (config.algorithm.loss, config.algorithm.loss_options) == ("gspo", {"clip_low": 0.1})
    # The base of a base, the name of a shipped one, and the command line on top.
    (tmp_path / "below.yaml").write_text("base: quickstart\ntrain: {steps: 7}\n")
    config = load_config(tmp_path / "mine.yaml", ["train.questions=5"])
    assert (config.train.steps, config.train.questions, config.model.layers) == (3, 5, 3)


def test_a_part_of_another_base_loses_the_options_of_the_one_that_it_replaces(tmp_path):
    (tmp_path / "below.yaml").write_text(
        "algorithm: {preset: grpo, loss: gspo, loss_options: {clip_low: 0.1}}\n"
        "rollout: {expansion: random, chains: 4, forks: 2, rounds: 1}\n"
    )
    config = load_config(write(tmp_path, "base: below.yaml\nalgorithm: {loss: grpo}\n"))
    assert (config.algorithm.loss, config.algorithm.loss_options) == (
        "grpo",
        {"clip_low": 0.2, "clip_high": 0.2},
    )
    config = load_config(write(tmp_path, "base: below.yaml\nalgorithm: at2po\n"))
    assert (config.algorithm.loss, config.algorithm.loss_options["clip_low"]) == ("atpo", 3e-3)
    assert (config.rollout.expansion, config.rollout.leaves) == ("entropy", 6)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("quickstrt", "base: no configuration 'quickstrt'.*did you mean quickstart"),
        ("mine.yaml", "leads back to itself"),
    ],
)
def test_a_base_that_cannot_be_read_is_named(tmp_path, base, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, f"base: {base}\n"))


def test_an_empty_file_means_defaults(tmp_path):
    assert load_config(write(tmp_path, "")).train == Config().train


def test_a_saved_configuration_reads_back_equal(tmp_path):
    config = load_config(
        "quickstart", ["algorithm=grpo", "algorithm.loss=gspo", "run.name=ö", "dataset=a b.jsonl"]
    )
    (tmp_path / "config.yaml").write_text(config_text(config), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == config
    in_folder = load_config(tmp_path)
    assert in_folder.run.dir == str(tmp_path)
    assert in_folder.run.model_copy(update={"dir": None}) == config.run


def test_the_folder_of_a_run_is_a_configuration(tmp_path):
    (tmp_path / "config.yaml").write_text(config_text(load_config("quickstart")), encoding="utf-8")
    assert find_config(tmp_path) == tmp_path / "config.yaml"
    with pytest.raises(ConfigError, match="no configuration"):
        find_config(tmp_path / "nothing")


def test_flatten_names_every_leaf():
    assert dict(flatten({"a": {"b": 1, "c": {}}, "d": [2]})) == {"a.b": 1, "a.c": {}, "d": [2]}


@pytest.mark.parametrize(("name", "turns", "tokens"), [("webshop", 15, 300), ("household", 50, 500)])
def test_t2po_has_its_published_settings_on_its_worlds(name, turns, tokens):
    config = load_config(f"qwen3-4b-{name}")
    assert (config.train.questions, config.rollout.leaves, config.optimizer.lr) == (16, 8, 1e-6)
    assert (config.env.kwargs["max_turns"], config.rollout.max_turn_tokens) == (turns, tokens)
    assert config.rollout.max_response_tokens == turns * tokens
    assert (config.model.transcript, config.model.window.turns) == ("window", 2)
    assert config.rollout.thinking.enabled
    assert config.rollout.resampling.enabled


# --- what the command line says holds -----------------------------------------------------------------------


def shape(*overrides: str, file: str | Path = "quickstart") -> tuple[tuple[int, int, int], list[str]]:
    """Chains, rounds, forks, and what was noted."""
    notes: list[str] = []
    rollout = load_config(file, overrides, note=notes.append).rollout
    return (rollout.chains, rollout.rounds, rollout.forks), notes


def test_chains_of_the_command_line_are_so_many_chains():
    numbers, notes = shape("algorithm=grpo", "rollout.chains=6")  # the file has 6 + 2 x 3
    assert numbers == (6, 0, 0)
    assert notes == [
        "grpo grows chains and never forks, so that there are 6: rollout.rounds 2 -> 0, rollout.forks 3 -> 0"
    ]
    assert shape("algorithm=at2po", "rollout.chains=4") == ((4, 2, 3), [])


def test_a_preset_that_cannot_take_the_shape_of_the_file_says_what_it_makes_of_it():
    numbers, notes = shape("algorithm=grpo")
    assert numbers == (6, 2, 3)
    assert notes[0].startswith(
        "grpo grows chains and never forks: the 6 + 2 x 3 leaves of the file become 12"
    )
    numbers, notes = shape("algorithm=tree_grpo")  # a third of 12 leaves at the root
    assert numbers == (4, 1, 8)
    assert notes == [
        "tree_grpo starts another share of the 12 leaves at the root, so that there are 12: "
        "rollout.chains 6 -> 4, rollout.rounds 2 -> 1, rollout.forks 3 -> 8"
    ]
    assert shape() == ((6, 2, 3), [])


def test_a_preset_that_forks_says_so_where_nothing_can_be_forked(tmp_path):
    flat = write(tmp_path, "algorithm: grpo\nrollout: {chains: 6, rounds: 0, forks: 0}\n")
    assert "has nothing to fork" in shape("algorithm=at2po", file=flat)[1][0]


# --- values with one meaning or an error --------------------------------------------------------------------


def test_a_mapping_of_free_keys_replaces_that_of_the_file():
    config = load_config("quickstart", ["env.kwargs={}", "eval.kwargs={split: dev, a: 1}", "eval.kwargs.b=2"])
    assert config.env.kwargs == {}
    assert config.eval.kwargs == {"split": "dev", "a": 1, "b": 2}
    assert load_config("quickstart", ["env.kwargs.worlds=3"]).env.kwargs["split"] == "train"
    last = load_config("quickstart", ["env.kwargs.a=1", "env.kwargs={b: 2}"])
    assert last.env.kwargs == {"b": 2}
    assert load_config("quickstart", ["algorithm.loss_options={}"]).algorithm.loss_options == {}
    assert load_config("quickstart", ["rollout={chains: 4}"]).rollout.forks == 3  # a section, not free keys


@pytest.mark.parametrize("name", ["rollout", "train", "algorithm"])
def test_a_section_without_keys_is_an_error_and_an_empty_one_is_none(tmp_path, name):
    for overrides in ([], ["algorithm=grpo"], [f"{name}.x=1"]):
        with pytest.raises(ConfigError, match=f"{name}: got 5, expected keys with values"):
            load_config(write(tmp_path, f"{name}: 5\n"), overrides)
    assert load_config(write(tmp_path, f"{name}:\n")).rollout == load_config(write(tmp_path, "{}\n")).rollout


@pytest.mark.parametrize("word", ["optimizer.lr=1e400", "optimizer.lr=.nan", "rollout.temperature=.inf"])
def test_numbers_have_to_be_finite(word):
    with pytest.raises(ConfigError, match="finite number"):
        load_config("quickstart", [word])
