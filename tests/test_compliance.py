"""Free answers scored without a judge, and evaluated under every condition, against writing and scoring them by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch

import ivlens as ivl
from ivlens.models import backend_of
from ivlens.steering.compliance import Unsteered, balance
from ivlens.steering.controls import random_vector
from ivlens.steering.evaluation import FREE, GOLD, Evaluation
from ivlens.tasks.checks import passes
from ivlens.vectors.vector import InstructionVector
from tests import by_hand, tiny

pytestmark = pytest.mark.model
TOKENS = 5
V = InstructionVector(
    4 * torch.randn(32, generator=torch.Generator().manual_seed(5)),
    layer=1,
    scale=1.5,
    metadata={"positions": "generated", "task": "free", "projections": [1.0, 4.0, 2.0]},
)
TEXTS = ["walk", "", "paint the help", "  ", "@", "jump\nlook", "wait wait wait wait wait", "ask"]


@pytest.fixture(scope="module")
def free():
    return tiny.free_task()


@pytest.fixture(scope="module")
def found(model, free, task):
    options = {"vectors": {"free": V, "past": V}, "controls": ["random vector"], "draws": 2, "progress": False}
    return ivl.evaluate(model, [task, free], max_new_tokens=TOKENS, **options)


def questions(task):
    return [f"Q: {x.input}\nA:" for x in task.test]


def added(vector, by):
    return lambda x: x + by * vector.vector


# -- scores -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_topic_and_surprise_are_log_probabilities_by_hand(model, free, batch_size):
    bare = ivl.build_prompts(free, split="test")
    asked = Unsteered(backend_of(model), bare, max_new_tokens=TOKENS, batch_size=batch_size)
    assert asked.answers == [by_hand.greedy(model, q, TOKENS) for q in questions(free)]
    expected = by_hand.scores(model, free.check, questions(free), asked.answers, TEXTS)
    other = by_hand.scores(model, free.check, questions(free), asked.answers, TEXTS[::-1])
    for rows, given in zip((expected, other), asked.scores(TEXTS, TEXTS[::-1])):
        for a, b in zip(rows, given):
            assert b == pytest.approx(a, abs=1e-4)
    assert len({row["surprise"] for row in expected}) > 6 and all(row["topic"] for row in expected)


def test_where_the_unsteered_answer_is_empty_nothing_is_on_topic(model, free):
    asked = Unsteered(backend_of(model), ivl.build_prompts(free, split="test"), max_new_tokens=TOKENS)
    asked.answers = ["", *asked.answers[1:]]
    (rows,) = asked.scores(TEXTS)
    assert rows[0]["topic"] == 0 and by_hand.topic(model, asked.answers, TEXTS) == pytest.approx(
        [row["topic"] for row in rows], abs=1e-4
    )


def test_degenerate_answers_meet_nothing(model, free):
    free = tiny.free_task(check="no_comma")
    asked = Unsteered(backend_of(model), ivl.build_prompts(free, split="test"), max_new_tokens=TOKENS)
    (rows,) = asked.scores(
        ["", "a a a a a a a a", "...", "1 2 3 4 5 6", "hahahahahaha", "\n", "``` ```", "Six words that say a thing"]
    )
    assert [row["met"] for row in rows] == [0.0] * 7 + [1.0]


@pytest.mark.parametrize(
    ("scores", "on_topic", "fluent"),
    [
        ({"met": 0.5, "topic": 1.0, "surprise": 2.0}, 0.5, math.exp(-1)),
        ({"met": 1.0, "topic": 3.0, "surprise": 0.5}, 1.0, 1.0),  # better than told: no more than 1
        ({"met": 1.0, "topic": -1.0, "surprise": 1.0}, 0.0, 1.0),
        ({"met": 0.0, "topic": 1.0, "surprise": 1.0}, 0.5, 1.0),
    ],
)
def test_balance_is_the_harmonic_mean_of_its_parts(scores, on_topic, fluent):
    found = balance(scores, {"met": 0.9, "topic": 2.0, "surprise": 1.0})
    assert (found["met"], found["on_topic"], found["fluent"]) == pytest.approx((scores["met"], on_topic, fluent))
    parts = [scores["met"], on_topic, fluent]
    assert found["balance"] == pytest.approx(0 if 0 in parts else 3 / sum(1 / x for x in parts))


def test_where_told_answers_have_no_topic_it_is_left_out():
    found = balance({"met": 0.5, "topic": 1.0, "surprise": 1.0}, {"met": 1.0, "topic": -0.1, "surprise": 1.0})
    assert math.isnan(found["on_topic"]) and found["balance"] == pytest.approx(2 / (2 + 1))


# -- evaluate -----------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_every_condition_asks_the_test_questions_and_told_ones_the_held_out_wording(model, free, found):
    rows = found.scores[found.scores["task"] == "free"]
    noise = [random_vector(V, draw=i) for i in (0, 1)]
    told = [f"Be very brief now.\n\n{q}" for q in questions(free)]
    expected = {
        ("no vector", 0): (questions(free), None),
        ("vector", 0): (questions(free), added(V, 1.5)),
        **{("random vector", i): (questions(free), added(noise[i], 1.5)) for i in (0, 1)},
        ("told", 0): (told, None),
        ("told + vector", 0): (told, added(V, 1.5)),
        ("told − vector", 0): (told, added(V, -1.5)),
        **{("told − random vector", i): (told, added(noise[i], -1.5)) for i in (0, 1)},
    }
    assert list(dict.fromkeys(zip(rows["condition"], rows["draw"]))) == list(expected)
    unsteered = [by_hand.greedy(model, q, TOKENS) for q in questions(free)]
    for (condition, draw), (asked, change) in expected.items():
        part = rows[(rows["condition"] == condition) & (rows["draw"] == draw)]
        assert part["input"].tolist() == [x.input for x in free.test]
        assert part["text"].tolist() == [by_hand.greedy(model, q, TOKENS, 1, change) for q in asked]
        assert part["answer"].tolist() == unsteered
        scored = by_hand.scores(model, "even_letters", questions(free), unsteered, part["text"].tolist())
        assert part[list(FREE)].to_dict("records") == [pytest.approx(row, abs=1e-4) for row in scored]
    assert rows.groupby("condition")["text"].apply(tuple).nunique() == len(found.conditions), "all differ"


def test_how_set_moves_to_the_opposite_where_it_is_subtracted(model, free):
    options = {"vectors": V, "how": "set", "controls": (), "max_new_tokens": TOKENS, "progress": False}
    rows = ivl.evaluate(model, free, **options).scores
    unit = V.vector / V.vector.norm()
    for condition, target in (("told + vector", 6.0), ("told − vector", -6.0)):
        move = lambda x, target=target: x + (target - x @ unit)[..., None] * unit  # noqa: E731
        asked = [f"Be very brief now.\n\n{q}" for q in questions(free)]
        assert rows[rows["condition"] == condition]["text"].tolist() == [
            by_hand.greedy(model, q, TOKENS, 1, move) for q in asked
        ]


@pytest.mark.parametrize(("instruction", "wording"), [(0, "Write the past form."), (1, "Be brief."), ("Go!", "Go!")])
def test_told_questions_state_the_instruction_that_is_given(model, free, instruction, wording):
    rows = ivl.evaluate(model, free, instruction=instruction, max_new_tokens=TOKENS, progress=False).scores
    expected = [by_hand.greedy(model, f"{wording}\n\n{q}", TOKENS) for q in questions(free)]
    assert rows[rows["condition"] == "told"]["text"].tolist() == expected


def test_another_model_may_give_the_content_and_be_surprised(model, load, free):
    other = load("gpt2")
    result = ivl.evaluate(model, free, reference=other, max_new_tokens=TOKENS, progress=False)
    unsteered = [by_hand.greedy(other, q, TOKENS) for q in questions(free)]
    for _, part in result.scores.groupby("condition"):
        assert part["answer"].tolist() == unsteered
        scored = by_hand.scores(other, "even_letters", questions(free), unsteered, part["text"].tolist())
        assert part[list(FREE)].to_dict("records") == [pytest.approx(row, abs=1e-4) for row in scored]
    assert (result.metadata["reference"], result.metadata["max_new_tokens"]) == (backend_of(other).name, TOKENS)


def test_rows_of_a_file_have_a_check_each(model, free, tmp_path):
    rows = [
        {"input": x.input, "check": ("even_letters", "no_comma", "includes: walk")[i % 3]}
        for i, x in enumerate(free.test)
    ]
    path = tmp_path / "mine.csv"
    pd.DataFrame(rows).assign(split="test").to_csv(path, index=False)
    task = ivl.Task.from_file(path, instruction="Be brief.")
    scores = ivl.evaluate(model, task, max_new_tokens=TOKENS, progress=False).scores
    checks = {row["input"]: row["check"] for row in rows}
    assert scores["met"].tolist() == [float(passes(checks[x.input], x.text)) for x in scores.itertuples()]


# -- what comes of it ---------------------------------------------------------------------------------------------------
def test_each_kind_of_task_has_its_own_metrics_and_gains(found):
    assert found.metrics == [*GOLD, *FREE]
    frame = found.to_dataframe()
    assert set(frame[frame["task"] == "past"]["metric"]) == set(GOLD) and set(
        frame[frame["task"] == "free"]["metric"]
    ) == set(FREE)
    free = found.scores[found.scores["task"] == "free"]
    for metric, tasks in (("first_token", {"past"}), ("met", {"free"}), ("surprise", {"free"})):
        gains = found.gains(metric)
        assert set(gains["task"]) == {*tasks, "average"}
        conditions = found.conditions if "free" in tasks else ["no vector", "vector", "random vector"]
        assert set(gains["condition"]) == set(conditions) - {"no vector"}
        if "free" in tasks:
            means = free.groupby("condition")[metric].mean()
            for row in gains.itertuples():
                assert row.gain == pytest.approx(means[row.condition] - means["no vector"])
    assert found.gains().equals(found.gains("first_token"))
    assert "nan" not in repr(replace(found, scores=free.dropna(axis=1))).lower()
    assert "told − vector" in repr(found) and "surprise" in found._repr_html_()


def test_balance_is_of_the_free_tasks_alone(found, model, task):
    table = found.balance()
    assert set(table["task"]) == {"free"} and table["condition"].tolist() == found.conditions
    rows = {
        c: part[list(FREE)].to_dict("records")
        for c, part in found.scores[found.scores["task"] == "free"].groupby("condition")
    }
    for row in table.itertuples():
        assert row.balance == pytest.approx(by_hand.balance(rows[row.condition], rows["told"]))
        mean = sum(x["surprise"] for x in rows[row.condition]) / len(rows[row.condition])
        assert row.perplexity == pytest.approx(math.exp(mean))
        assert row.n == len(rows["told"]) and row.low <= row.balance <= row.high
        low, high = by_hand.balance_interval(rows[row.condition], rows["told"])
        assert (row.low, row.high) == (pytest.approx(low), pytest.approx(high))
    with pytest.raises(ValueError, match="no free answers were scored; there are first_token"):
        ivl.evaluate(model, task, n_prompts=2, progress=False).balance()


def test_told_answers_that_are_not_on_topic_are_no_yardstick_and_this_is_said(found):
    changed = found.scores.assign(topic=-0.1)
    with pytest.warns(
        UserWarning, match=r"told answers of 'free' .*topic -0\.100 nats.* left out of the balance"
    ) as warned:
        table = replace(found, scores=changed).balance()
    assert table["on_topic"].isna().all() and table["balance"].notna().all() and warned[0].filename == __file__


def test_an_evaluation_with_free_answers_comes_back_from_its_file(found, tmp_path):
    loaded = Evaluation.load(found.save(tmp_path / "e.json"))
    pd.testing.assert_frame_equal(loaded.to_dataframe(), found.to_dataframe())
    pd.testing.assert_frame_equal(loaded.balance(), found.balance())
    pd.testing.assert_frame_equal(loaded.gains("topic"), found.gains("topic"))
    assert loaded.metadata == found.metadata and repr(loaded) == repr(found)


def test_metrics_and_options_of_the_other_kind_are_refused(model, free, task):
    options = {"max_new_tokens": 3, "n_prompts": 2, "progress": False}
    for tasks, more, said in (
        (
            free,
            {"metrics": ["exact_match"]},
            "metric 'exact_match' is unknown; choose from met, met_loose, topic, surprise",
        ),
        (task, {"metrics": ["met"]}, "metric 'met' is unknown; choose from first_token"),
        (free, {"reference_shots": 2}, "reference_shots is for tasks with one right answer"),
        (free, {"shots": 2}, "shots=2, but the answers of task 'free' are free"),
    ):
        with pytest.raises(ValueError, match=said):
            ivl.evaluate(model, tasks, **options, **more)
    assert ivl.evaluate(model, free, metrics=["met"], **options).metrics == list(FREE)
    assert ivl.evaluate(model, [task, free], metrics=["probability", "met"], **options).metrics == [
        "probability",
        *FREE,
    ]
