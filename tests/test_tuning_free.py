"""Choosing layer and scale where answers are free, against writing and scoring the answers of every setting by hand."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

import ivlens as ivl
from ivlens.steering.controls import random_vector
from ivlens.steering.search import InjectionSearch
from ivlens.steering.tuning import _warn, layers_tried
from ivlens.vectors.vector import InstructionVector
from tests import by_hand, tiny

pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("ignore")]
TOKENS = 5
ALONG = {"positions": "generated", "max_new_tokens": TOKENS}


def vector(seed=5, layer=None, **about):
    values = 4 * torch.randn(32, generator=torch.Generator().manual_seed(seed))
    about = {"positions": "generated", "task": "free", "projections": [1.0, 4.0, 2.0], **about}
    return InstructionVector(values, layer=layer, metadata=about)


@pytest.fixture(scope="module")
def free():
    task = tiny.free_task(instruction="Be brief.")
    return replace(task, valid=task.test)  # more of them, so that balances differ


class Tried:
    """The balance of one setting at a time, on the validation split."""

    def __init__(self, model, task, wording="Be brief."):
        self.model, self.check = model, task.check
        self.asked = [f"Q: {x.input}\nA:" for x in task.valid]
        self.bare = [by_hand.greedy(model, q, TOKENS) for q in self.asked]
        self.told = self.scores([by_hand.greedy(model, f"{wording}\n\n{q}", TOKENS) for q in self.asked])

    def scores(self, texts):
        return by_hand.scores(self.model, self.check, self.asked, self.bare, texts)

    def balance(self, layer=0, change=None):
        texts = [by_hand.greedy(self.model, q, TOKENS, layer, change) for q in self.asked]
        return by_hand.balance(self.scores(texts), self.told)

    def added(self, v, layer, scale):
        return self.balance(layer, lambda x: x + scale * v.vector)

    def set_to(self, v, layer, scale):
        unit, target = v.vector / v.vector.norm(), scale * v.metadata["projections"][layer]
        return self.balance(layer, lambda x: x + (target - x @ unit)[..., None] * unit)


def check(search, tried, way, layers, scales, vectors):
    for i, (layer, v) in enumerate(zip(layers, vectors)):
        for j, scale in enumerate(scales):
            assert search.accuracy[i, j].item() == pytest.approx(getattr(tried, way)(v, layer, scale), abs=1e-5)
    assert search.baseline == pytest.approx(tried.balance(), abs=1e-5) and search.measure == "balance"
    best = search.best
    at = layers.index(best.layer), scales.index(best.scale)
    assert search.accuracy[at] == search.accuracy.max()
    noise = random_vector(best, seed=3)
    assert search.control[at].item() == pytest.approx(getattr(tried, way)(noise, best.layer, best.scale), abs=1e-5)
    assert search.control.isnan().sum() == search.control.numel() - 1


@pytest.mark.parametrize(("how", "way"), [("add", "added"), ("set", "set_to")])
@pytest.mark.slow
def test_the_search_equals_trying_every_setting_by_hand(model, free, how, way):
    layers, scales = (2, 0), (0.5, -1.0, 2.0)
    v = vector()
    search = ivl.tune_injection(model, free, v, layers=layers, scales=scales, how=how, **ALONG, seed=3)
    check(search, Tried(model, free), way, layers, scales, [v, v])
    assert len(set(search.accuracy.flatten().tolist())) > 3 and search.n == len(free.valid)


@pytest.mark.slow
def test_several_vectors_are_tried_each_at_its_own_layer(model, free):
    vectors, scales = [vector(7, 2), vector(8, 0), vector(9, 1)], (1.0, 1.5)
    search = ivl.tune_injection(model, free, vectors, scales=scales, **ALONG, seed=3)
    check(search, Tried(model, free), "added", (2, 0, 1), scales, vectors)
    best = search.best
    assert torch.equal(best.vector, next(v.vector for v in vectors if v.layer == best.layer))


@pytest.mark.slow
def test_both_positions_are_tried_and_the_better_is_kept(model, free):
    """Each as it comes out alone; the other stays beside it."""
    options, kept = {"layers": [0, 1], "scales": [1.0, 2.0], "max_new_tokens": TOKENS}, set()
    for seed in range(12):
        both = ivl.tune_injection(model, free, vector(seed), **options)
        alone = {
            at: ivl.tune_injection(model, free, vector(seed), positions=at, **options) for at in ("generated", "last")
        }
        found = {at: search.accuracy.max().item() for at, search in alone.items()}
        where = both.best.metadata["positions"]
        assert found[where] == max(found.values()) and f"positions {where}" in repr(both)
        assert torch.equal(both.accuracy, alone[where].accuracy) and alone[where].others == ()
        (other,) = both.others
        assert torch.equal(other.accuracy, alone[other.best.metadata["positions"]].accuracy)
        kept.add(where)
        if len(kept) == 2:
            break
    assert kept == {"generated", "last"}


def test_equal_but_for_rounding_is_no_better():
    for baseline, control, said in ((2 / 3, 0.1, "nothing tried is better"), (0.1, 2 / 3, "no better than a random")):
        given = (
            torch.tensor([[2 / 3]]),
            torch.tensor([[control]]),
            baseline,
        )  # a little more than 2 / 3 in single precision
        with pytest.warns(UserWarning, match=said):
            _warn(InjectionSearch(vector(), *given, (1,), (1.0,), 4))


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.slow
def test_batches_of_any_size_give_the_same(model, free, batch_size):
    options = {"layers": [0, 2], "scales": [1.0, 2.0], **ALONG}
    one, other = (ivl.tune_injection(model, free, vector(), batch_size=n, **options) for n in (batch_size, 256))
    torch.testing.assert_close(one.accuracy, other.accuracy, atol=1e-5, rtol=1e-4)


def test_told_questions_state_the_instruction_that_is_given(model, free):
    options = {"layers": [1], "scales": [1.0], **ALONG}
    search = ivl.tune_injection(model, free, vector(), instruction="Go on!", **options)
    assert search.accuracy.item() == pytest.approx(Tried(model, free, "Go on!").added(vector(), 1, 1.0), abs=1e-5)


def test_the_middle_third_and_the_later_half_are_tried_by_default(model, free):
    search = ivl.tune_injection(model, free, vector(), scales=[1.0], max_new_tokens=2)
    tried = {x.best.metadata["positions"]: x.layers for x in (search, *search.others)}
    assert tried == {"generated": (1, 2), "last": (1,)}
    assert [len(layers_tried(n, "generated")) for n in (12, 24, 30, 32)] == [5, 5, 6, 6]
    assert [len(layers_tried(n, "last")) for n in (12, 24, 30, 32)] == [5, 6, 5, 5]


def test_what_free_answers_have_no_use_for_is_refused(model, free, task):
    for more in ({"goal": "suppress"}, {"method": "full"}, {"max_rows": 64}):
        with pytest.raises(ValueError, match=r"the answers of 'free' are free, so vectors only induce"):
            ivl.tune_injection(model, free, vector(), **more)
    with pytest.raises(ValueError, match="is tried with free answers; where one answer is right"):
        ivl.tune_injection(model, task, vector(), how="set")
    for unknown in ("first", torch.tensor([1])):
        for asked in (free, task):
            with pytest.raises(ValueError, match="is unknown; choose one of last, generated, all"):
                ivl.tune_injection(model, asked, vector(), positions=unknown)
    for several in ([], [vector()], [vector(1, 2), vector(2, 2)]):
        with pytest.raises(ValueError, match=r"give one or more, each with a layer of its own"):
            ivl.tune_injection(model, free, several)


@pytest.mark.slow
def test_a_best_that_is_none_or_stands_at_the_edge_is_said(model, free):
    tried, options = Tried(model, free), {"layers": [1], **ALONG}

    def said(v, scales):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            search = ivl.tune_injection(model, free, v, scales=scales, **options)
        (warning,) = [w for w in caught if issubclass(w.category, UserWarning)] or [None]
        assert warning is None or warning.filename == __file__, "it points at the caller"
        return search, "" if warning is None else str(warning.message)

    search, text = said(vector(), [0.0])  # nothing is added
    assert search.accuracy.item() == pytest.approx(search.baseline) and "nothing tried is better than no vector" in text
    kinds = set()
    for seed in range(12):
        v = vector(seed)
        found = [tried.added(v, 1, scale) for scale in (1.0, 2.0, 3.0)]
        search, text = said(v, [1.0, 2.0, 3.0])
        best, at = max(found), found.index(max(found))
        noise = tried.added(random_vector(replace(v, layer=1)), 1, (1.0, 2.0, 3.0)[at])
        if best <= search.baseline + 1e-6:
            kinds.add(kind := "nothing tried is better")
        elif best <= noise + 1e-6:
            kinds.add(kind := "no better than a random vector")
        elif at != 1 and best > sorted(found)[-2] + 1e-6:
            kinds.add(kind := "stands at the edge")
        else:
            kinds.add(kind := "")
        assert kind in text and bool(kind) == bool(text)
        if len(kinds) == 3:
            break
    assert {"nothing tried is better", "stands at the edge"} <= kinds
