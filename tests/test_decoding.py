"""Greedy decoding and scoring of batches under injections against full forward passes, one prompt at a time."""

from __future__ import annotations

import pytest
import torch

from ivlens.models import backend_of
from ivlens.running.decoding import choose, complete
from ivlens.running.injection import Injection
from ivlens.running.tokens import TokenizedPrompt
from tests import tiny

pytestmark = pytest.mark.model

NAMES = ["gpt2", "gptj", "llama", "mistral", "gemma3", "bloom"]


@pytest.fixture(scope="module")
def injections():
    vector = 4 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    return {"none": None} | {p: Injection({1: vector, 2: -0.5 * vector}, p) for p in ("last", "generated", "all")}


@torch.inference_mode()
def slow_logits(model, row, more, injection):
    """Logits after the prompt and after each of the tokens `more`, by one full forward pass."""
    n = len(row.prompt)
    where = {"last": slice(n - 1, n), "generated": slice(n - 1, None), "all": slice(None)}

    def add(vector):
        def hook_fn(x, hook):
            x = x.clone()
            x[:, where[injection.positions]] += vector
            return x

        return hook_fn

    additions = {} if injection is None else injection.additions
    hooks = [(f"blocks.{layer}.hook_resid_post", add(vector)) for layer, vector in additions.items()]
    return model.run_with_hooks(torch.tensor([[*row.prompt, *more]]), fwd_hooks=hooks)[0, n - 1 :].float()


def slow_greedy(model, row, steps, injection, ends=()):
    written = []
    while len(written) < steps:
        token = int(slow_logits(model, row, written, injection)[-1].argmax())
        if token in ends:
            break
        written.append(token)
    return model.tokenizer.decode(written)


def rows_of(*lengths, answers=None):
    answers = answers or [(7, 8, 9)] * len(lengths)
    return [TokenizedPrompt(tuple(p.tolist()), a) for p, a in zip(tiny.tokens(*lengths), answers)]


@pytest.mark.parametrize("name", NAMES)
def test_decoding_equals_a_slow_greedy_loop_under_every_injection(load, injections, name):
    model, rows = load(name), rows_of(9, 1, 6, 13)
    ends = {model.tokenizer.eos_token_id}
    done = complete(backend_of(model), rows, injections, max_new_tokens=5, stop=None)
    for condition, injection in injections.items():
        expected = [slow_greedy(model, row, 5, injection, ends) for row in rows]
        assert done[condition].texts == expected, condition
    assert len({tuple(d.texts) for d in done.values()}) >= 2, "the injections change the texts"


@pytest.mark.parametrize("name", NAMES)
def test_scores_equal_those_of_full_forward_passes_under_every_injection(load, injections, name):
    model, backend = load(name), backend_of(load(name))
    best = [int(slow_logits(model, row, [], None)[-1].argmax()) for row in rows_of(9, 1, 6, 13)]
    rows = rows_of(9, 1, 6, 13, answers=[(7, 8, 9), (best[1], 5), (4,), (best[3],)])
    done = complete(backend, rows, injections)
    for condition, injection in injections.items():
        for i, row in enumerate(rows):
            chances = slow_logits(model, row, row.answer[:-1], injection).log_softmax(-1)
            expected = sum(chances[j, token].item() for j, token in enumerate(row.answer))
            assert done[condition].log_probability[i] == pytest.approx(expected, abs=2e-4)
            assert done[condition].first_token[i] == float(chances[0].argmax() == row.answer[0])
    assert done["none"].first_token == [0, 1, 0, 1] and done["none"].texts == [""] * 4


def test_batches_of_any_size_and_order_give_the_same(model, injections):
    rows = rows_of(9, 3, 6, 13, 3)
    whole = complete(backend_of(model), rows, injections, max_new_tokens=4, stop=None)
    for size in (1, 2):
        parts = complete(backend_of(model), rows, injections, max_new_tokens=4, stop=None, batch_size=size)
        for condition in injections:
            assert parts[condition].texts == whole[condition].texts
            assert parts[condition].log_probability == pytest.approx(whole[condition].log_probability, abs=1e-4)


def test_a_stop_text_ends_one_continuation_and_not_the_others(model):
    rows = rows_of(9, 6, 13)
    (free,) = complete(backend_of(model), rows, {"": None}, max_new_tokens=8, stop=None).values()
    stop = next(c for c in free.texts[0].lstrip()[1:] if c.strip() and c not in free.texts[0].lstrip()[0])
    (stopped,) = complete(backend_of(model), rows, {"": None}, max_new_tokens=8, stop=stop).values()
    for text, whole in zip(stopped.texts, free.texts):
        lead = whole[: len(whole) - len(whole.lstrip())]
        assert text == lead + whole.lstrip().split(stop)[0]
    assert stopped.texts[0] != free.texts[0]


@pytest.fixture
def end_of_text(model):
    """`end_of_text(token)` makes a token the tokenizer's end of text, for one test."""
    tokenizer, before = model.tokenizer, model.tokenizer.eos_token
    yield lambda token: setattr(tokenizer, "eos_token", tokenizer.convert_ids_to_tokens(token))
    tokenizer.eos_token = before


def test_the_end_of_text_token_ends_a_continuation(model, end_of_text):
    rows = rows_of(9, 6)
    (free,) = complete(backend_of(model), rows, {"": None}, max_new_tokens=6, stop=None).values()
    ids = []
    while len(ids) < 4:
        ids.append(int(slow_logits(model, rows[0], ids, None)[-1].argmax()))
    end = next(t for i, t in enumerate(ids) if i and t not in ids[:i])
    end_of_text(end)
    (ended,) = complete(backend_of(model), rows, {"": None}, max_new_tokens=6, stop=None).values()
    assert ended.texts[0] == model.tokenizer.decode(ids[: ids.index(end)]) != free.texts[0]
    assert ended.texts[1] == slow_greedy(model, rows[1], 6, None, {end})


def test_no_hooks_are_left_and_the_prompts_are_read_once_for_all_injections(model, injections, monkeypatch):
    backend, widths = backend_of(model), []
    forward = type(backend).forward

    def counted(self, tokens, mask, **options):
        widths.append(tokens.shape[1])
        return forward(self, tokens, mask, **options)

    monkeypatch.setattr(type(backend), "forward", counted)
    complete(backend, rows_of(9, 9), injections, max_new_tokens=2, stop=None)
    assert [w for w in widths if w > 3] == [8, 8], "once for all, once more for the one that acts on every position"
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def with_beginning(rows, n=12):
    """The same rows behind a common beginning, one of them with nothing but it and a token."""
    beginning = tuple(tiny.tokens(n)[0].tolist())
    return [TokenizedPrompt((*beginning, *row.prompt), row.answer) for row in rows]


@pytest.mark.parametrize("name", NAMES)
def test_a_common_beginning_read_once_changes_nothing(load, injections, name, monkeypatch):
    model, backend = load(name), backend_of(load(name))
    rows = with_beginning(rows_of(9, 1, 6, 13))
    fed = []
    forward = type(backend).forward
    monkeypatch.setattr(
        type(backend), "forward", lambda self, t, *a, **k: (fed.append(t.numel()), forward(self, t, *a, **k))[1]
    )
    done = complete(backend, rows, {"none": None}, batch_size=2)
    assert sum(fed) < 0.8 * sum(len(row.prompt) for row in rows), "the beginning was read for every prompt"
    done = complete(backend, rows, injections, max_new_tokens=4, stop=None, batch_size=3)
    for condition, injection in injections.items():
        for i, row in enumerate(rows):
            chances = slow_logits(model, row, row.answer[:-1], injection).log_softmax(-1)
            expected = sum(chances[j, token].item() for j, token in enumerate(row.answer))
            assert done[condition].log_probability[i] == pytest.approx(expected, abs=3e-4), (condition, i)
            assert done[condition].texts[i] == slow_greedy(model, row, 4, injection, {model.tokenizer.eos_token_id})


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "bloom"])
def test_choices_are_scored_as_by_full_forward_passes(load, name):
    model, backend = load(name), backend_of(load(name))
    choices = [[(7, 8, 9), (4,)], [(5, 6), (7,), (8, 9)], [(3,), (4, 5)], [(11, 12), (13,)]]
    for rows in (rows_of(9, 1, 6, 13), with_beginning(rows_of(9, 1, 6, 13))):
        found = choose(backend, rows, choices, batch_size=3)
        for row, options, values in zip(rows, choices, found):
            assert len(values) == len(options)
            for option, value in zip(options, values):
                chances = slow_logits(model, row, option[:-1], None).log_softmax(-1)
                assert value == pytest.approx(sum(chances[j, t].item() for j, t in enumerate(option)), abs=3e-4)


def test_running_out_of_memory_halves_the_batch_and_gives_the_same(model, injections, monkeypatch):
    rows, choices = rows_of(9, 3, 6, 13, 3), [[(7, 8, 9), (4,)], [(3,)], [(5,), (6,)], [(8,)], [(9, 1), (2,)]]
    backend = backend_of(model)
    texts = complete(backend, rows, injections, max_new_tokens=4, stop=None)
    values = choose(backend, rows, choices)
    forward, sizes, limit = type(backend).forward, [], 2

    def limited(self, tokens, mask, **options):
        sizes.append(len(tokens))
        if len(tokens) > limit:
            raise torch.OutOfMemoryError("no memory left")
        return forward(self, tokens, mask, **options)

    monkeypatch.setattr(type(backend), "forward", limited)
    with pytest.warns(UserWarning, match="out of memory; going on with batch_size=2"):
        again = complete(backend, rows, injections, max_new_tokens=4, stop=None)
    for condition, done in again.items():
        assert done.texts == texts[condition].texts
        assert done.log_probability == pytest.approx(texts[condition].log_probability, abs=1e-4)
    with pytest.warns(UserWarning, match="out of memory"):
        for found, expected in zip(choose(backend, rows, choices), values):
            assert found == pytest.approx(expected, abs=1e-4)
    assert sizes[0] == 5 and sizes[-1] <= limit
    limit = 0
    with pytest.warns(UserWarning, match="out of memory"), pytest.raises(torch.OutOfMemoryError):
        complete(backend, rows, injections, max_new_tokens=4)


def test_where_only_one_text_matters_decoding_ends_once_it_is_out_of_reach(model, monkeypatch):
    rows, backend = rows_of(9, 6, 13), backend_of(model)
    (free,) = complete(backend, rows, {"": None}, max_new_tokens=8, stop=None).values()
    forward, passes = type(backend).forward, []
    monkeypatch.setattr(type(backend), "forward", lambda self, *a, **k: (passes.append(1), forward(self, *a, **k))[1])

    def decoded(*wanted):
        passes.clear()
        (found,) = complete(
            backend, rows, {"": None}, max_new_tokens=8, stop=None, wanted=[[w] for w in wanted]
        ).values()
        return found.texts, len(passes)

    right = [text.strip() for text in free.texts]
    texts, most = decoded(*right)
    assert texts == free.texts
    texts, _ = decoded("nothing", right[1], f"{right[2]} and more")
    assert [text.strip() == r for text, r in zip(texts, right)] == [False, True, True]
    assert free.texts[0].startswith(texts[0])
    _, least = decoded("nothing", "at", "all")
    assert (least, most) == (3, 10), "the prompts, their answers, and one token or eight"
