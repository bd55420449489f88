"""Statistics of effects against plain code, on made-up values."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

import ivlens as ivl
from ivlens.models.head import Head
from ivlens.running.scores import measure


@pytest.fixture
def effects():
    """Two tasks with 6 and 3 prompts; head L1H2 has an effect, the others have noise."""
    values = 0.1 * torch.randn(9, 2, 3, generator=torch.Generator().manual_seed(0))
    values[:, 1, 2] += 0.5
    return ivl.HeadEffects(values, torch.full((9,), 0.2), ("a",) * 6 + ("b",) * 3)


def test_mean_is_over_prompts_then_over_tasks_with_equal_weight(effects):
    a = sum(effects.values[:6, 0, 1].tolist()) / 6
    b = sum(effects.values[6:, 0, 1].tolist()) / 3
    assert effects.mean("a")[0, 1].item() == pytest.approx(a)
    assert effects.mean()[0, 1].item() == pytest.approx((a + b) / 2, abs=1e-6)


def test_stderr_is_the_sample_deviation_over_root_n_and_adds_up_over_tasks(effects):
    def plain(x):
        mean = sum(x) / len(x)
        return math.sqrt(sum((v - mean) ** 2 for v in x) / (len(x) - 1) / len(x))

    a, b = plain(effects.values[:6, 1, 0].tolist()), plain(effects.values[6:, 1, 0].tolist())
    assert effects.stderr("b")[1, 0].item() == pytest.approx(b, rel=1e-5)
    assert effects.stderr()[1, 0].item() == pytest.approx(math.sqrt(a * a + b * b) / 2, rel=1e-5)


def test_interval_is_the_percentile_bootstrap_within_tasks(effects):
    low, high = effects.interval(n_bootstrap=4000)
    rng, a, b = random.Random(0), effects.values[:6, 1, 2].tolist(), effects.values[6:, 1, 2].tolist()
    means = sorted((sum(rng.choices(a, k=6)) / 6 + sum(rng.choices(b, k=3)) / 3) / 2 for _ in range(4000))
    assert low[1, 2].item() == pytest.approx(means[100], abs=0.008)
    assert high[1, 2].item() == pytest.approx(means[-100], abs=0.008)
    assert (low <= effects.mean()).all() and (effects.mean() <= high).all()
    narrow = effects.interval(level=0.5)
    assert (narrow[1] - narrow[0] < high - low).all()


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    values = torch.randn(40, 1, 400, generator=torch.Generator().manual_seed(3))  # 400 independent "heads", true mean 0
    low, high = ivl.HeadEffects(values, torch.zeros(40), ("a",) * 40).interval()
    covered = ((low <= 0) & (high >= 0)).float().mean().item()
    assert 0.90 <= covered <= 0.98


def test_pvalue_equals_the_exact_sign_flip_test(effects):
    values = effects.of("a").values[:, 0, 0].tolist()
    flips = [abs(sum(s * v for s, v in zip(signs, values)) / 6) for signs in itertools.product([-1, 1], repeat=6)]
    exact = sum(f >= abs(sum(values) / 6) - 1e-9 for f in flips) / 64
    assert effects.pvalue("a")[0, 0].item() == pytest.approx(exact)
    assert effects.pvalue("a", n_flips=63)[0, 0].item() == pytest.approx(exact, abs=0.2), "drawn where all are too many"
    assert effects.pvalue("a")[1, 2].item() == pytest.approx(2 / 64), "all six effects positive"


def test_pvalues_are_even_where_there_is_no_effect():
    values = torch.randn(20, 1, 500, generator=torch.Generator().manual_seed(5))
    p = ivl.HeadEffects(values, torch.zeros(20), ("a",) * 20).pvalue()
    assert 0.02 <= (p <= 0.05).float().mean() <= 0.09 and p.min() >= 1 / 10_001 - 1e-9


def test_same_seed_same_statistics_and_global_random_state_left_alone(effects):
    state = torch.get_rng_state()
    assert torch.equal(effects.pvalue(), effects.pvalue())
    assert torch.equal(effects.interval()[0], effects.interval()[0])
    assert not torch.equal(effects.interval()[0], effects.interval(seed=1)[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_top_is_strongest_first_over_all_tasks_or_of_one(effects):
    by_hand = sorted(itertools.product(range(2), range(3)), key=lambda at: -effects.mean()[at].item())
    assert effects.top(6) == by_hand and effects.top(1) == [Head(1, 2)] and str(effects.top(1)[0]) == "L1H2"
    assert effects.top(6, task="b") == sorted(by_hand, key=lambda at: -effects.mean("b")[at].item())
    tied = ivl.HeadEffects(torch.zeros(2, 2, 2), torch.zeros(2), ("a", "a"))
    assert tied.top(4) == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize("k", [0, 7])
def test_top_refuses_more_heads_than_there_are(effects, k):
    with pytest.raises(ValueError, match=f"k={k} is out of range: there are 6 heads"):
        effects.top(k)


def test_dataframe_has_a_row_per_head_strongest_first(effects):
    frame = effects.to_dataframe()
    assert list(frame.columns) == [*("layer", "head", "aie", "stderr", "low", "high", "p", "p_corrected", "stability")]
    assert len(frame) == 6
    assert list(zip(frame["layer"], frame["head"])) == effects.top(6)
    assert frame["aie"][0] == pytest.approx(effects.mean()[1, 2].item())


def test_saving_and_loading_keeps_everything(effects, tmp_path):
    about, queries = {"shots": 3, "model": "tiny"}, tuple("abcdefghh")
    effects = ivl.HeadEffects(effects.values, effects.baseline, effects.tasks, "logit", about, queries)
    again = ivl.HeadEffects.load(effects.save(tmp_path / "deep" / "effects.safetensors"))
    assert torch.equal(again.values, effects.values) and torch.equal(again.baseline, effects.baseline)
    assert (again.tasks, again.metric, again.metadata, again.queries) == (effects.tasks, "logit", about, queries)
    assert list(tmp_path.rglob("*partial*")) == []


def test_text_and_html_show_the_strongest_head_and_escape_names(effects):
    named = ivl.HeadEffects(effects.values, effects.baseline, ("<b>",) * 9)
    assert "9 prompts, 2 layers × 3 heads, probability; strongest: L1H2 +0." in repr(effects)
    assert "<b>" not in named._repr_html_() and "&lt;b&gt;" in named._repr_html_()


def test_bad_arguments_are_refused(effects):
    with pytest.raises(KeyError, match="no effects of task 'c'; there are a, b"):
        effects.of("c")
    with pytest.raises(ValueError, match="9 effects, 8 baselines and 9 task names don't match"):
        ivl.HeadEffects(effects.values, effects.baseline[:8], effects.tasks)


def test_metrics_equal_their_definitions():
    logits = torch.randn(2, 3, 2, 5, generator=torch.Generator().manual_seed(0))
    answers, counts = torch.tensor([[1, 4], [2, 2]]), torch.tensor([[True, True], [True, False]])
    chances = logits.softmax(-1)
    wrong = torch.tensor([0, 3])
    found = {m: measure(m, logits, answers, counts, wrong) for m in ivl.patching.METRICS}
    for prompt, copy in itertools.product(range(2), range(3)):
        at = (prompt, copy)
        first, second = answers[prompt].tolist()
        both = prompt == 0
        assert found["probability"][at].item() == pytest.approx(chances[at][0, first].item(), rel=1e-5)
        assert found["logit"][at] == logits[at][0, first]
        assert found["logit_difference"][at] == logits[at][0, first] - logits[at][0, wrong[prompt]]
        together = chances[at][0, first] * (chances[at][1, second] if both else 1)
        assert found["log_probability"][at].exp().item() == pytest.approx(together.item(), rel=1e-5)
        right = logits[at][0].argmax() == first and (not both or logits[at][1].argmax() == second)
        assert found["accuracy"][at] == float(right)
