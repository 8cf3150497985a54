from helpers.paths import ROOT

from at2po_agent.config.presets import PRESETS, TABLE_BEGIN, TABLE_END, algorithms_table, write_table

PAGE = ROOT / "docs" / "algorithms.md"


def test_the_page_shows_the_presets_as_they_are(tmp_path):
    text = PAGE.read_text(encoding="utf-8")
    assert text.partition(TABLE_BEGIN)[2].partition(TABLE_END)[0].strip() == algorithms_table().strip()
    copy = tmp_path / "algorithms.md"
    copy.write_text(text.replace("`atpo`", "`drifted`", 1), encoding="utf-8")
    write_table(copy)
    assert copy.read_text(encoding="utf-8") == text


def test_a_row_per_algorithm_of_the_field():
    assert set(PRESETS) == {
        *("at2po", "grpo", "dapo", "gspo", "arpo", "aepo", "tree_grpo"),
        *("gigpo", "gigpo+tti", "gigpo+tds", "t2po", "surpo"),
    }
    assert all(f"[`{name}`]" in algorithms_table() for name in PRESETS)


def test_every_preset_differs_from_every_other():
    found = [{**preset.algorithm(), "rollout": preset.rollout} for preset in PRESETS.values()]
    assert all(one != other for number, one in enumerate(found) for other in found[:number])


def test_published_numbers():
    assert PRESETS["at2po"].rollout == {"expansion": "entropy", "chains": 10, "forks": 6, "rounds": 2}
    assert PRESETS["at2po"].loss_options == {"clip_low": 3e-3, "clip_high": 4e-3}
    assert PRESETS["gspo"].loss_options == {"clip_low": 3e-4, "clip_high": 4e-4}
    assert PRESETS["dapo"].loss_options == {"clip_low": 0.2, "clip_high": 0.28}
    assert PRESETS["dapo"].rollout["overlong_share"] * 6192 == 2000
    assert PRESETS["grpo"].kl_weight == PRESETS["tree_grpo"].kl_weight == 1e-3
    assert PRESETS["tree_grpo"].rollout | {"expansion": ""} == {
        **{"expansion": "", "chains": 2, "forks": 4, "rounds": 1},  # M 2, N 2, L 1: 3 leaves a tree
    }
