"""The report says what happened, also when that is nothing, or not what was hoped for."""

import math

import pytest

from gapo_trainer.report import findings, render_table, summarise_pairs, write_plots


def record(step, index, gap, weight, is_flipped):
    return {"step": step, "index": index, "gap": gap, "weight": weight, "is_flipped": is_flipped}


def visits(clean, flipped):
    """One visit of each pair, with these weights."""
    weights = [(w, False) for w in clean] + [(w, True) for w in flipped]
    return [record(1, i, 2 - w, w, f) for i, (w, f) in enumerate(weights)]


def entry(step, accuracy, margin=0.0):
    return {"step": step, "loss": 1.0, "accuracy": accuracy, "margin": margin}


def test_summary_takes_each_pairs_first_and_last_visit():
    records = [
        record(1, 0, 0.1, 1.0, False),
        record(1, 1, 0.3, 3.0, False),
        record(2, 2, 0.5, 5.0, True),
        record(3, 0, 0.7, 7.0, False),
        record(3, 2, 0.9, 9.0, True),
    ]
    summary = summarise_pairs(records)
    assert summary["first_visit"]["clean"] == pytest.approx({"pairs": 2, "gap": 0.2, "weight": 2.0})
    assert summary["last_visit"]["clean"] == pytest.approx({"pairs": 2, "gap": 0.5, "weight": 5.0})
    assert summary["first_visit"]["flipped"] == {"pairs": 1, "gap": 0.5, "weight": 5.0}
    assert summary["last_visit"]["flipped"] == {"pairs": 1, "gap": 0.9, "weight": 9.0}
    assert summary["last_visit"]["weight_difference"] is None, "one flipped pair has no spread"


def test_difference_has_the_right_sign_and_standard_error():
    visit = summarise_pairs(visits([1.0, 2.0, 3.0], [1.0, 1.5]))["last_visit"]
    assert visit["weight_difference"] == pytest.approx(1.25 - 2.0)
    assert visit["standard_error"] == pytest.approx(math.sqrt(1 / 3 + 0.125 / 2))


@pytest.mark.parametrize(
    "clean, flipped, words",
    [
        ([1.0, 1.1, 1.0], [0.5, 0.4, 0.5], "Flipped pairs got a smaller weight than clean ones"),
        ([1.0, 1.3, 1.0], [1.0, 1.2, 1.0], "less than two standard errors"),
        ([0.5, 0.4], [1.0, 1.1], "Flipped pairs did NOT get a smaller weight"),
        ([1.0, 1.0], [1.0, 1.0], "did NOT get a smaller weight than clean ones: the means are equal"),
        ([1.0, math.nan], [1.0, 1.0], "cannot be compared: some are not a number"),
        ([0.5, 0.4], [], "cannot be compared: 2 clean and 0 flipped pairs"),
        ([], [0.5], "cannot be compared: 0 clean and 1 flipped pairs"),
    ],
)
def test_weights_in_words(clean, flipped, words):
    (sentence,) = findings({"pairs": summarise_pairs(visits(clean, flipped))})
    assert words in sentence


@pytest.mark.parametrize(
    "after, words",
    [
        (entry(9, 14 / 24), "rose from 12/24 to 14/24"),
        (entry(9, 0.5, margin=0.1), "did NOT improve: it stayed at 12/24 (the mean held-out margin rose)"),
        (
            entry(9, 10 / 24, margin=-0.1),
            "did NOT improve: it fell from 12/24 to 10/24 (the mean held-out margin did not",
        ),
    ],
)
def test_accuracy_in_words(after, words):
    metrics = {"heldout": [entry(0, 0.5), entry(4, 1.0), after], "data": {"heldout_pairs": 24}, "planned_steps": 9}
    (sentence,) = findings(metrics)
    assert words in sentence


def test_early_ends_in_words():
    interrupted = {"interrupted": True, "stage": "training", "heldout": [entry(0, 0.5)], "planned_steps": 9}
    first, second = findings(interrupted)
    assert "interrupted while training" in first
    assert "not measured both before and after" in second
    (late,) = findings({"out_of_time": True, "steps": 3, "planned_steps": 9, "heldout": []})[:1]
    assert "after 3 of 9 steps" in late


def test_table_shows_the_numbers():
    metrics = {
        "steps": 9,
        "planned_steps": 9,
        "data": {"train_pairs": 5, "flipped_pairs": 2, "heldout_pairs": 24},
        "training": [{"step": 1, "loss": 0.9, "margin": -0.2}, {"step": 9, "loss": 0.8, "margin": 0.3}],
        "heldout": [entry(0, 0.5, -0.1), entry(9, 0.625, 0.2)],
        "pairs": summarise_pairs(visits([1.0, 1.1, 1.2], [0.5, 0.7])),
        "findings": ["A sentence."],
    }
    table = render_table(metrics)
    for text in ("9 of 9", "5, of which 2 flipped", "0.9000 -> 0.8000", "-0.2000 -> +0.3000", "50.0 %", "62.5 %"):
        assert text in table
    assert "+0.9000, 1.1000 (3 pairs)" in table and "+1.4000, 0.6000 (2 pairs)" in table
    assert table.endswith("A sentence.")


def test_nothing_recorded(tmp_path):
    assert summarise_pairs([]) == {}
    assert findings({}) == []
    assert "0 of 0" in render_table({})
    assert write_plots({}, tmp_path) == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flipped", [[], [0.5]], ids=["no flipped pairs", "one flipped pair"])
def test_plots_are_written(tmp_path, flipped):
    metrics = {"training": [], "heldout": [entry(0, 0.5)], "pair_records": visits([1.0, 1.2], flipped)}
    names = [path.name for path in write_plots(metrics, tmp_path)]
    assert names == ["loss_and_accuracy.png", "weight_against_gap.png"]
    for name in names:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
