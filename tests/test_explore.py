"""The panel without a browser: what it writes against `ivl.generate`, heads dropped and added, and movements that overtake each other."""

from __future__ import annotations

import asyncio
import html
import math
from itertools import pairwise, product

import pandas as pd
import pytest
import torch

import ivlens as ivl
from ivlens.models import backend_of
from ivlens.models.head import Head
from ivlens.patching.effects import HeadEffects
from ivlens.running.reading import unembedded
from ivlens.steering.exploration import Exploration, Setting
from ivlens.steering.generate import Generations
from tests.test_steering import hooks_left

pytestmark = pytest.mark.model

HEADS = [Head(0, 1), Head(1, 0), Head(2, 3)]
PROMPT = "Q: walk\nA:"


@pytest.fixture
def vectors(model, task, other_task):
    options = {"shots": 2, "n_prompts": 6}
    found = {t.name: ivl.extract_vector(model, t, HEADS, **options) for t in (task, other_task)}
    return {name: v / v.norm() for name, v in found.items()}


@pytest.fixture
def made(model, task):
    """A vector just as it was extracted."""
    return ivl.extract_vector(model, task, HEADS, shots=2, n_prompts=6)


@pytest.fixture
def effects():
    values = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(0))
    return HeadEffects(values, torch.zeros(4), ("past",) * 4)


def setting(**changes) -> Setting:
    return Setting(**{"prompt": PROMPT, "names": ("past",), "layer": 1, "scale": 20.0, "positions": "last", **changes})


# -- what is written ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
@pytest.mark.parametrize("positions", ["last", "generated", "all"])
def test_the_last_of_what_is_written_is_what_generate_writes(load, task, name, positions):
    model = load(name)
    vector = ivl.extract_vector(model, task, HEADS, shots=2, n_prompts=6)
    at = setting(positions=positions, scale=3.0)
    seen = list(Exploration(model, vector).write(at, 6))
    expected = ivl.generate(model, PROMPT, vector=vector, layer=1, scale=3.0, positions=positions, max_new_tokens=6)
    assert seen[-1][0] == expected and list(seen[-1][0].texts) == list(expected.texts)
    assert len(set(map(tuple, expected.texts.values()))) > 1, "the vector does something"
    grown = [said["+ vector"][0] for said, _ in seen]
    assert all(b.startswith(a) for a, b in pairwise(grown)) and grown[0] != grown[-1]
    assert not hooks_left(model)


def test_several_vectors_act_together(model, vectors):
    exploration, at = Exploration(model, vectors), setting(names=("past", "plural"))
    *_, (said, _) = exploration.write(at, 6)
    together = ivl.generate(model, PROMPT, vector=exploration.vectors_at(at), max_new_tokens=6)
    summed = ivl.generate(
        model, PROMPT, vector=vectors["past"] + vectors["plural"], layer=1, scale=20.0, max_new_tokens=6
    )
    assert said == together == summed
    assert said != ivl.generate(model, PROMPT, vector=vectors["past"], layer=1, scale=20.0, max_new_tokens=6)


def test_without_a_vector_there_is_one_column(model, vectors):
    *_, (said, tokens) = Exploration(model, vectors).write(setting(names=()), 4)
    assert said == ivl.generate(model, PROMPT, max_new_tokens=4) and list(tokens) == ["no vector"]


def test_a_chat_prompt_keeps_its_template_and_length(model, vectors, task):
    told = ivl.build_prompts(task, style="chat", n=1, instruction=True)[0]
    at = setting(prompt=told).asking("jump")
    assert at.prompt.query.input == "jump" and at.prompt.instruction == told.instruction and not at.prompt.query.output
    *_, (said, _) = Exploration(model, vectors).write(at)
    options = {"vector": vectors["past"], "layer": 1, "scale": 20.0}
    assert said == ivl.generate(model, [at.prompt], **options) and "jump" in said.prompts[0]


@torch.no_grad()
def test_probabilities_are_those_of_a_full_forward_pass(model, vectors):
    *_, (_, found) = Exploration(model, vectors).write(setting(), 3)
    tokens = model.to_tokens(PROMPT)
    expected = {"no vector": model(tokens)[0, -1].softmax(-1)}
    for name, sign in (("+ vector", 1), ("− vector", -1)):
        with vectors["past"].inject(model, layer=1, scale=sign * 20.0):
            expected[name] = model(tokens)[0, -1].softmax(-1)
    vocabulary = {repr(model.tokenizer.decode([i])): i for i in range(200)}
    for name, p in expected.items():
        for token, mine in found[name].items():
            assert mine == pytest.approx(p[vocabulary[token]].item(), abs=1e-5)
        assert repr(model.tokenizer.decode([p.argmax()])) in found.index


def test_whoever_reads_may_stop_anywhere_and_nothing_stays_on_the_model(model, vectors):
    expected = ivl.generate(model, PROMPT, max_new_tokens=6)
    model.train()
    for n in range(1, 8):
        steps = Exploration(model, vectors).write(setting(positions="all"), 6)
        for _ in range(n):
            next(steps)
            assert not hooks_left(model) and model.training
        if n % 2:
            steps.close()
    model.eval()
    assert ivl.generate(model, PROMPT, max_new_tokens=6) == expected


# -- heads --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_tokens_are_those_of_a_share_through_norm_and_unembedding(model):
    directions = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    gain = model.ln_final.w if hasattr(model.ln_final, "w") else model.ln_final.weight
    expected = directions / directions.square().mean(-1, keepdim=True).sqrt() * gain @ model.W_U
    found = unembedded(backend_of(model), directions)
    torch.testing.assert_close(found, expected - expected.mean(-1, keepdim=True), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(unembedded(backend_of(model), 7 * directions), found, atol=1e-4, rtol=1e-4)
    assert not hooks_left(model)


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_biases_are_no_tokens_of_a_head(load, name):
    """Opposite directions say opposite things: what the norm and the unembedding add by themselves is taken off."""
    backend, direction = backend_of(load(name)), torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(unembedded(backend, direction), -unembedded(backend, -direction), atol=1e-3, rtol=1e-3)


def test_a_head_is_dropped_and_added_again(model, made):
    exploration = Exploration(model, made)
    exploration.toggle(HEADS[1], ["past"])
    (less,) = exploration.vectors_at(setting())
    assert less.heads == (HEADS[0], HEADS[2])
    torch.testing.assert_close(less.vector, made.shares[0] + made.shares[2])
    assert "projections" not in less.metadata and (less.layer, less.scale) == (1, 20.0)
    *_, (said, _) = exploration.write(setting(), 5)
    assert said == ivl.generate(model, PROMPT, vector=less, max_new_tokens=5)
    exploration.toggle(HEADS[1], ["past"])
    (whole,) = exploration.vectors_at(setting())
    assert torch.equal(whole.vector, made.vector) and whole.heads == made.heads


def test_without_a_head_left_a_vector_does_nothing(model, made):
    exploration = Exploration(model, made)
    for head in HEADS:
        exploration.toggle(head, ["past"])
    said = exploration.view(setting(), 5).generations
    assert said["+ vector"] == said["- vector"] == said["no vector"] and exploration.shares("past") == {}
    exploration.toggle(HEADS[0], ["past"])
    (one,) = exploration.vectors_at(setting())
    torch.testing.assert_close(one.vector, made.shares[0])


def test_a_further_head_is_read_on_the_prompts_that_the_vector_was_made_of(model, made, task):
    exploration = Exploration(model, made, tasks={"past": task})
    exploration.toggle(Head(1, 3), ["past"])
    (more,) = exploration.vectors_at(setting())
    expected = ivl.extract_vector(model, task, [*HEADS, Head(1, 3)], shots=2, n_prompts=6)
    torch.testing.assert_close(more.vector, expected.vector)
    assert more.heads == expected.heads


def test_a_head_that_cannot_be_read_is_refused_and_changes_nothing(model, made, task, vectors):
    with pytest.raises(ValueError, match=r"other heads write on the prompts of 'past' isn't known; pass tasks="):
        Exploration(model, made).toggle(Head(1, 3), ["past"])
    exploration = Exploration(model, vectors["past"], tasks={"past": task})  # scaled: no longer as its prompts make it
    with pytest.raises(ValueError, match="its heads now write something else; extract it again"):
        exploration.toggle(Head(1, 3), ["past"])
    assert exploration.vectors_at(setting())[0].heads == tuple(HEADS)
    with pytest.raises(ValueError, match="head=9 is out of range"):
        exploration.toggle(Head(1, 9), ["past"])


def test_a_click_on_a_head_that_only_one_of_two_vectors_has_adds_it(model, vectors):
    exploration = Exploration(model, vectors)
    exploration.toggle(HEADS[0], ["past"])
    exploration.toggle(HEADS[0], ["past", "plural"])
    assert exploration.heads == dict.fromkeys(("past", "plural"), tuple(HEADS))
    exploration.toggle(HEADS[0], ["past", "plural"])
    assert exploration.heads == dict.fromkeys(("past", "plural"), tuple(HEADS[1:]))


def test_what_is_said_of_heads(model, made, effects):
    exploration = Exploration(model, made, effects=effects)
    found = exploration.about_heads(setting(), more=[Head(2, 0)])
    assert found["share"][:3].sum() == pytest.approx(1) and found["share"][:3].is_monotonic_decreasing
    assert list(found["head"])[3] == Head(2, 0) and math.isnan(found["share"][3]) and found["tokens"][3] == ""
    for row in found.itertuples():
        assert row.effect == pytest.approx(effects.mean()[row.head].item())
    first = found["head"][0]
    share = made.shares[made.heads.index(first)]
    assert found["share"][0] == pytest.approx((share @ made.vector / made.vector.norm() ** 2).item())
    best = unembedded(backend_of(model), share[None])[0].topk(1)
    assert found["tokens"][0].startswith(f"{model.tokenizer.decode(best.indices)!r} {best.values.item():+.1f}, ")


def test_what_does_not_fit_is_refused(model, made, effects):
    with pytest.raises(ValueError, match="no vectors given"):
        ivl.explore(model, {})
    wrong = HeadEffects(effects.values[:, :2], effects.baseline, effects.tasks)
    with pytest.raises(ValueError, match=r"effects are of 2 × 4 heads, but .* has 3 × 4"):
        ivl.explore(model, made, effects=wrong)


# -- shown --------------------------------------------------------------------------------------------------------------


def test_outside_a_notebook_there_is_a_still_view(model, made, effects):
    view = ivl.explore(model, made, effects=effects, prompt=PROMPT, max_new_tokens=4)
    assert view.generations == ivl.generate(model, PROMPT, vector=made, layer=1, max_new_tokens=4)
    page = view._repr_html_()
    assert "Next token: probability" in page and "L0H1" in page and "no proof" in page and "L0H1" in repr(view)


def test_the_panel_shows_the_newest_movement_and_drops_older_ones(model, vectors, effects):
    pytest.importorskip("ipywidgets")
    pytest.importorskip("anywidget")
    from ivlens.explore import Panel

    begun, ended = [], []

    class Watched(Exploration):
        def write(self, at, *args):
            begun.append(at.scale)
            yield from super().write(at, *args)
            ended.append(at.scale)

    async def moved() -> Panel:
        exploration = Watched(model, vectors, effects=effects)
        panel = Panel(exploration, setting(), 8)
        while not panel._said.value:
            await asyncio.sleep(0)
        assert not ended, "the first answer is under way"
        for scale in (3.0, 5.0, 7.0):
            panel._scale.value = scale
        assert not hooks_left(model)
        await panel._task
        assert begun == [20.0, 7.0] and ended == [7.0]
        return panel

    async def used() -> None:
        panel = await moved()
        for change in (
            lambda: setattr(panel._layer, "value", 2),
            lambda: setattr(panel._positions, "value", "generated"),
            lambda: setattr(panel._text, "value", "Q: jump\nA:"),
            lambda: setattr(panel._names["plural"], "value", True),
            lambda: click(panel, HEADS[0]),
        ):
            change()
            await asyncio.sleep(0)
            await panel._task
            expected = ivl.generate(model, panel.prompt, vector=panel.vectors, max_new_tokens=8)
            for text in expected.texts.values():
                assert html.escape(text[0]) in panel._said.value
        assert [v.heads for v in panel.vectors] == [tuple(HEADS[1:])] * 2 and panel._map.content["outlined"] == [
            [1, 0],
            [2, 3],
        ]
        assert [v.metadata["positions"] for v in panel.vectors] == ["generated"] * 2
        click(panel, Head(2, 0))  # what it writes isn't known
        await asyncio.sleep(0)
        await panel._task
        assert "isn&#x27;t known" in panel._about.value and "L2H0" in panel._heads.value
        panel._text.value = "walk " * 200
        await asyncio.sleep(0)
        await panel._task
        assert "TooLongError" in panel._about.value

    asyncio.run(used())


def test_the_map_shows_effects_or_shares_by_colour(model, made, effects):
    from ivlens.explore import _map

    drawn = _map(Exploration(model, made, effects=effects), setting())
    largest = divmod(int(effects.mean().abs().argmax()), 4)
    ends = {"rgb(178, 24, 43)", "rgb(33, 102, 172)"}
    assert [at for at in product(range(3), range(4)) if drawn["colours"][at[0]][at[1]] in ends] == [largest]
    assert drawn["outlined"] == [[0, 1], [1, 0], [2, 3]] and drawn["hover"][2][3].startswith("L2H3  ")
    shares = _map(Exploration(model, made), setting())
    assert [
        at for at in product(range(3), range(4)) if shares["colours"][at[0]][at[1]] != "rgb(247, 247, 247)"
    ] == HEADS
    assert shares["caption"][0] == "Share of each head" and drawn["caption"][0] == "Effect of each head"


def test_what_is_written_is_text_not_html():
    from ivlens.explore import _heads, _probabilities, _texts

    ugly = "<script>x</script>"
    likely = pd.DataFrame({ugly: [0.5]}, index=[ugly])
    about = pd.DataFrame(
        {"vector": [ugly], "head": [Head(0, 1)], "effect": [math.nan], "share": [-0.25], "tokens": [ugly]}
    )
    for page in (
        _texts(Generations(["x"], {ugly: [ugly]}), setting()),
        _probabilities(likely),
        found := _heads(about, Head(0, 1)),
    ):
        assert "<script" not in page and "&lt;script&gt;" in page
    assert ">–<" in found and ">−25.0%<" in found and "bold" in found and ">L0H1<" in found


def click(panel, head: Head) -> None:
    """As the front end reports it."""
    panel._map.clicked = [*head, 0 if not panel._map.clicked else panel._map.clicked[2] + 1]
