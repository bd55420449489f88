"""Scores, controls, intervals and gains."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import ivlens as ivl
from ivlens.common.statistics import bootstrap_mean, wilson
from ivlens.models import backend_of
from ivlens.models.head import Head
from ivlens.steering.controls import CONTROLS, random_vector, with_controls
from ivlens.vectors.vector import InstructionVector
from tests import tiny

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def vectors(model, task, other_task):
    heads = [Head(0, 1), Head(1, 2), Head(2, 0)]
    return {t.name: ivl.extract_vector(model, t, heads, shots=2, n_prompts=6) * 5 for t in (task, other_task)}


@pytest.fixture(scope="module")
def scores(model, task, other_task, vectors):
    options = {"layer": 1, "scale": 1.0, "reference_shots": 2, "progress": False}
    return ivl.evaluate(model, [task, other_task], vectors=vectors, **options)


def test_every_condition_is_scored_on_the_same_prompts_of_the_test_split(scores, task):
    assert scores.conditions == ["no vector", "vector", *CONTROLS, "2 demonstrations"]
    for _, part in scores.scores[scores.scores["task"] == "past"].groupby(["condition", "draw"]):
        assert list(part["input"]) == [x.input for x in task.test]


def test_random_controls_are_drawn_several_times_each_its_own_direction(scores, model):
    draws = scores.scores.groupby("condition")["draw"].nunique()
    assert draws["random vector"] == draws["random heads"] == 2 and draws["vector"] == draws["no vector"] == 1
    frame = scores.to_dataframe()
    assert set(frame[frame["task"] == "past"]["n"]) == {8}  # prompts, not prompts × draws
    vectors = [InstructionVector(torch.ones(32), metadata={"task": name}) for name in ("past", "plural")]
    drawn = [random_vector(v, draw=i) for v in vectors for i in (0, 1)]
    assert all(abs(a.cosine(b)) < 0.9 for a, b in itertools.combinations(drawn, 2))


def test_each_head_at_its_own_layer_has_a_random_control_too(model, task, other_task):
    heads = [ivl.Head(0, 1), ivl.Head(2, 3)]
    vectors = {t.name: ivl.extract_vector(model, t, heads, shots=2, n_prompts=4) for t in (task, other_task)}
    found = ivl.evaluate(model, [task, other_task], vectors=vectors, mode="heads", n_prompts=4, progress=False)
    assert found.conditions == ["no vector", "vector", *CONTROLS]
    control = random_vector(vectors["past"], by_heads=True)
    torch.testing.assert_close(control.shares.norm(dim=1), vectors["past"].shares.norm(dim=1))


@pytest.mark.slow
def test_scores_equal_a_forward_pass_and_greedy_decoding_by_hand(tokenizer):
    model = ivl.load_model(tiny.ending_model(), tokenizer=tokenizer)
    backend = backend_of(model)
    task = tiny.answered_task(model, "past", "Write the past form.", asked=False)
    rows = ivl.evaluate(model, task, progress=False).scores.query("condition == 'no vector'")
    assert all(0 < rows[metric].mean() < 1 for metric in ("first_token", "exact_match"))  # all 0 would equal anything
    for row in rows.itertuples():
        prompt = model.to_tokens(f"Q: {row.input}\nA:")
        answer = torch.tensor([backend.tokenizer.encode(f" {row.answer}", add_special_tokens=False)])
        logits = model(torch.cat([prompt, answer], dim=1))[0, prompt.shape[1] - 1 : -1].float()
        expected = logits.log_softmax(-1).gather(-1, answer.T).sum().exp().item()
        assert row.probability == pytest.approx(expected, rel=1e-3)
        assert row.first_token == float(logits[0].argmax() == answer[0, 0])
        assert row.exact_match == float(row.text.strip() == row.answer)


def test_vector_condition_equals_injecting_by_hand(model, scores, vectors):
    row = scores.scores.query("task == 'past' and condition == 'vector'").iloc[0]
    with vectors["past"].inject(model, layer=1, scale=1.0):
        text = ivl.generate(model, f"Q: {row['input']}\nA:", max_new_tokens=len(row["answer"]) + 2)["no vector"][0]
    assert text.startswith(row["text"]) or row["text"].startswith(text)


def test_table_has_means_intervals_and_n(scores, task):
    table = scores.to_dataframe()
    assert set(table["metric"]) == {"first_token", "exact_match", "rouge_l", "probability"}
    assert (table["low"] <= table["mean"] + 1e-9).all() and (table["mean"] <= table["high"] + 1e-9).all()
    assert set(table["n"]) == {len(task.test)}


def test_gains_are_paired_differences_with_an_average_over_tasks(scores):
    gains = scores.gains("probability").set_index(["task", "condition"])["gain"]
    means = scores.to_dataframe().query("metric == 'probability'").set_index(["task", "condition"])["mean"]
    for task in ("past", "plural"):
        assert gains[task, "vector"] == pytest.approx(means[task, "vector"] - means[task, "no vector"])
    assert gains["average", "vector"] == pytest.approx((gains["past", "vector"] + gains["plural", "vector"]) / 2)


def test_evaluation_comes_back_from_its_file(scores, tmp_path):
    again = type(scores).load(scores.save(tmp_path / "scores.json"))
    assert again.scores.equals(scores.scores) and again.metadata == scores.metadata


def test_broken_evaluation_file_is_named(tmp_path):
    (tmp_path / "scores.json").write_text('{"kind": "eval')
    with pytest.raises(ValueError, match="truncated or not JSON"):
        ivl.Evaluation.load(tmp_path / "scores.json")


def test_unknown_metric_control_and_missing_vector_are_named(model, task, other_task, vectors):
    with pytest.raises(ValueError, match="metric 'f1' is unknown; choose from first_token"):
        ivl.evaluate(model, task, metrics=["f1"])
    with pytest.raises(ValueError, match="control 'noise' is unknown"):
        ivl.evaluate(model, task, controls=["noise"])
    with pytest.raises(ValueError, match="no vector for task\\(s\\) plural"):
        ivl.evaluate(model, [task, other_task], vectors={"past": vectors["past"]})


def test_random_vector_control_has_the_norm_of_the_vector(vectors):
    vector = vectors["past"]
    random = ivl.steering.random_vector(vector, seed=3)
    assert random.norm() == pytest.approx(vector.norm(), rel=1e-5)
    assert abs(random.cosine(vector)) < 0.7


def test_wilson_interval_against_its_formula_solved_by_bisection():
    hits, n, z = 13, 40, 1.959964
    low, high = wilson([1.0] * hits + [0.0] * (n - hits))
    for p in (low, high):
        assert abs(hits / n - p) == pytest.approx(z * math.sqrt(p * (1 - p) / n), rel=1e-6)


def test_bootstrap_interval_is_close_to_the_normal_one_for_many_values():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=4000)
    low, high = bootstrap_mean([values])
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_prompts_of_one_query_count_once_in_tables_and_gains(scores):
    frame = scores.scores
    twice = pd.concat([frame, frame.assign(prompt=frame["prompt"] + 100)], ignore_index=True)
    twice = ivl.Evaluation(twice, scores.metadata)
    for table in ("to_dataframe", "gains"):
        pd.testing.assert_frame_equal(getattr(twice, table)(), getattr(scores, table)())


def test_gains_are_paired_by_prompt_not_by_place(scores):
    frame, columns = scores.scores, ["task", "condition", "gain", "n"]
    mixed = frame.sample(frac=1, random_state=0).sort_values(["condition", "task"], kind="stable")
    one, two = (x.gains("probability")[columns].sort_values(columns[:2]) for x in (scores, ivl.Evaluation(mixed)))
    pd.testing.assert_frame_equal(one.reset_index(drop=True), two.reset_index(drop=True))
    other = frame.copy()
    other.loc[(other["condition"] == "vector") & (other["prompt"] == 0), "query"] = "another"
    with pytest.raises(ValueError, match="'vector' and 'no vector' were not asked the same prompts of task 'past'"):
        ivl.Evaluation(other).gains("probability")


def test_where_no_prompt_differs_there_still_is_an_interval(scores):
    frame = scores.scores.assign(exact_match=0.0)  # of random controls, two draws
    never = ivl.Evaluation(frame, scores.metadata)
    n = len(frame.loc[frame["task"] == "past", "query"].unique())
    edge = wilson([0.0] * n)[1]
    rates = never.to_dataframe().query("metric == 'exact_match' and task == 'past'")
    assert rates["low"].to_numpy() == pytest.approx(0) and rates["high"].to_numpy() == pytest.approx(edge)
    gains = never.gains("exact_match").query("task == 'past'")
    assert gains["low"].to_numpy() == pytest.approx(-edge) and gains["high"].to_numpy() == pytest.approx(edge)
    always = never.scores.assign(exact_match=(frame["condition"] != "no vector").astype(float))
    gains = ivl.Evaluation(always).gains("exact_match").query("task == 'past'")
    assert gains["low"].to_numpy() == pytest.approx(1 - edge) and gains["high"].to_numpy() == pytest.approx(1)


def test_answers_stand_side_by_side(scores):
    shown = scores.answers("plural")
    rows = scores.scores[(scores.scores["task"] == "plural") & (scores.scores["draw"] == 0)]
    assert list(shown.texts) == [name for name in scores.conditions if name in set(rows["condition"])]
    for name, texts in shown.texts.items():
        part = rows[rows["condition"] == name]
        assert texts == part["text"].tolist() and shown.prompts == part["input"].tolist()
    assert scores.answers().prompts == scores.answers("past").prompts


def test_controls_are_injected_as_the_vector_is(model, task, other_task, vectors):
    about = {"past": {"positions": "generated", "how": "set"}, "plural": {"how": "add"}}
    mine = {
        name: replace(v, layer=1 + (name == "plural"), metadata={**v.metadata, **about[name]})
        for name, v in vectors.items()
    }
    for t in (task, other_task):
        drawn = with_controls(model, t, mine, CONTROLS)
        assert list(drawn) == ["vector", *CONTROLS]
        for (one,) in drawn.values():
            assert {k: one.metadata[k] for k in ("positions", "how") if k in one.metadata} == about[t.name]
            assert one.layer == mine[t.name].layer
