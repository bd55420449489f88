"""Injections that set a projection, act on some prompts only, or are several: against hooks written by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import ivlens as ivl
from ivlens.models import backend_of
from ivlens.running.decoding import complete
from ivlens.running.injection import Injection
from ivlens.running.tokens import TokenizedPrompt, tokenize
from ivlens.steering.gate import Gate, fit_gate
from ivlens.vectors.vector import InstructionVector
from tests import tiny

pytestmark = pytest.mark.model
V = 3 * torch.randn(32, generator=torch.Generator().manual_seed(0))
W = 3 * torch.randn(32, generator=torch.Generator().manual_seed(1))


def vector(values=V, layer=1, **about):
    return InstructionVector(values, layer=layer, metadata={"projections": [1.0, 5.0, 2.0], **about})


def by_hand(model, tokens, changes):
    """Logits with `change(x)` applied after a layer, for pairs of both."""

    def hook_for(change):
        return lambda x, hook: change(x.clone())

    hooks = [(f"blocks.{layer}.hook_resid_post", hook_for(change)) for layer, change in changes]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        return model(tokens)


def set_from(first, v, target):
    unit = v / v.norm()

    def change(x):
        some = x[:, first:]
        x[:, first:] = some + (target - some @ unit)[..., None] * unit
        return x

    return change


def added_from(first, v):
    def change(x):
        x[:, first:] += v
        return x

    return change


def residual(model, tokens, layer):
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    return cache[f"blocks.{layer}.hook_resid_post"][:, -1]


def gate_between(model, opened, shut, layer=0):
    a, b = (residual(model, x, layer)[0] for x in (opened, shut))
    return Gate(a - b, (a + b) / 2, layer, 0.0)


@pytest.fixture
def prompts():
    return [x[None] for x in tiny.tokens(7, 7)]


# -- set ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scale", [1.0, 0.5, -1.0])
def test_set_moves_the_projection_to_that_of_the_prompts_behind_the_vector(model, prompts, scale):
    with torch.no_grad(), ivl.inject(model, vector(), how="set", scale=scale):
        found = model(prompts[0])
    expected = by_hand(model, prompts[0], [(1, set_from(6, V, 5.0 * scale))])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert (found - model(prompts[0]))[:, -1].abs().max() > 1e-3


def test_set_while_decoding_is_the_same_with_and_without_a_cache(model, prompts):
    rows = [TokenizedPrompt(tuple(p[0].tolist())) for p in prompts]
    injection = Injection.of(backend_of(model), vector(positions="generated", how="set"))
    assert injection.positions == "generated" and injection.targets == {1: 5.0}
    found = complete(backend_of(model), rows, {0: injection}, max_new_tokens=5, stop=None)[0].texts
    for prompt, text in zip(prompts, found):
        whole = prompt
        for _ in range(5):
            logits = by_hand(model, whole, [(1, set_from(prompt.shape[1] - 1, V, 5.0))])
            whole = torch.cat([whole, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        written = whole[0, prompt.shape[1] :].tolist()
        ends = [i for i, token in enumerate(written) if token in backend_of(model).end_tokens]
        assert text == model.tokenizer.decode(written[: ends[0]] if ends else written)


def test_set_needs_a_direction_and_a_known_projection(model):
    for wrong, said in (
        (vector(torch.zeros(32)), "zero vector has no direction"),
        (-vector(), "doesn't"),
        (vector() + vector(W), "doesn't"),
        (V, "doesn't"),
        (torch.stack([V, W]), "one vector"),
    ):
        with pytest.raises(ValueError, match=said):
            ivl.inject(model, wrong, layer=1, how="set")
    assert (2 * vector()).metadata["projections"] == [1.0, 5.0, 2.0]
    with pytest.raises(ValueError, match="how='sett' is unknown"):
        ivl.inject(model, vector(), how="sett")


# -- several ------------------------------------------------------------------------------------------------------------
def test_several_vectors_act_each_at_its_own_layer(model, prompts):
    with torch.no_grad(), ivl.inject(model, [vector(), vector(W, 2), vector(W)]):
        found = model(prompts[0])
    changes = [(1, added_from(6, V)), (1, added_from(6, W)), (2, added_from(6, W))]
    torch.testing.assert_close(found, by_hand(model, prompts[0], changes), atol=1e-4, rtol=1e-4)
    together = ivl.generate(model, "Q: go", vector=[vector(), vector(W, 2)], max_new_tokens=4)
    with ivl.inject(model, vector(W, 2)):
        assert ivl.generate(model, "Q: go", vector=vector(), max_new_tokens=4)["+ vector"] == together["+ vector"]


@pytest.mark.parametrize("pair", [("last", "generated"), ("generated", "last"), ("all", "last"), ("generated", "all")])
def test_several_vectors_act_each_at_its_own_positions(model, prompts, pair):
    """As one inject nested in another, which each know nothing of the other's positions; written, scored, and in plain passes."""
    one, two = vector(positions=pair[0]), vector(W, 2, positions=pair[1])
    asked = ["Q: go", "Q: walk on\nA:", "Q: run"]
    together = ivl.generate(model, asked, vector=[one, two], max_new_tokens=4)["+ vector"]
    with ivl.inject(model, two):
        nested = ivl.generate(model, asked, vector=one, max_new_tokens=4)["+ vector"]
    assert together == nested
    rows = tokenize(backend_of(model), asked, ["went", "walked on", "ran"])
    several, first, second = (Injection.of(backend_of(model), x) for x in ([one, two], one, two))
    scored = {
        i: x.log_probability
        for i, x in complete(backend_of(model), rows, dict(enumerate((several, first, second)))).items()
    }
    with ivl.inject(model, two):
        expected = complete(backend_of(model), rows, {0: first})[0].log_probability
    assert scored[0] == pytest.approx(expected, abs=1e-4)
    assert all(scored[0] != pytest.approx(scored[i], abs=1e-2) for i in (1, 2)), "both act"
    with torch.no_grad(), ivl.inject(model, [one, two]):
        found = model(prompts[0])
    with torch.no_grad(), ivl.inject(model, one), ivl.inject(model, two):
        torch.testing.assert_close(found, model(prompts[0]), atol=1e-4, rtol=1e-4)


def test_no_vector_is_refused(model):
    with pytest.raises(ValueError, match="at least one"):
        ivl.inject(model, [])


# -- gates --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("where", ["last", "generated"])
@pytest.mark.parametrize("gate_layer", [0, 1])
def test_where_the_gate_is_shut_the_logits_are_those_without(model, prompts, where, gate_layer):
    gate = gate_between(model, *prompts, layer=gate_layer)
    with torch.no_grad():
        plain = model(torch.cat(prompts))
        with ivl.inject(model, vector(), positions=where, when=gate):
            found = model(torch.cat(prompts))
    assert torch.equal(found[1], plain[1])
    torch.testing.assert_close(found[:1], by_hand(model, prompts[0], [(1, added_from(6, V))]), atol=1e-4, rtol=1e-4)
    assert (found[0] - plain[0]).abs().max() > 1e-3


def test_a_gate_stays_as_it_was_at_the_prompt_while_the_answer_is_written(model, prompts):
    gate = gate_between(model, *prompts)
    tokens, options = torch.cat(prompts), {"max_new_tokens": 6, "do_sample": False, "verbose": False}
    always = {}
    with torch.no_grad():
        for name, context in (("plain", None), ("always", {}), ("gated", {"when": gate})):
            if context is None:
                always[name] = model.generate(tokens, **options)
            else:
                with ivl.inject(model, vector(), positions="generated", **context):
                    always[name] = model.generate(tokens, **options)
    assert torch.equal(always["gated"][1], always["plain"][1]) and torch.equal(always["gated"][0], always["always"][0])
    assert not torch.equal(always["always"], always["plain"])
    rows = [TokenizedPrompt(tuple(p[0].tolist())) for p in prompts]
    backend = backend_of(model)
    injections = {
        "plain": None,
        "always": Injection.of(backend, vector(), positions="generated"),
        "gated": Injection.of(backend, vector(), positions="generated", when=gate),
    }
    texts = {k: x.texts for k, x in complete(backend, rows, injections, max_new_tokens=6, stop=None).items()}
    assert texts["gated"] == [texts["always"][0], texts["plain"][1]]


def test_each_of_several_vectors_may_have_its_own_gate(model, prompts):
    backend, (a, b) = backend_of(model), prompts
    first = Injection.of(backend, vector(), when=gate_between(model, a, b))
    second = Injection.of(backend, vector(W), when=gate_between(model, b, a))
    both = replace(first, also=(second,))
    rows = [TokenizedPrompt(tuple(p[0].tolist()), (7, 8)) for p in prompts]
    scores = complete(
        backend, rows, {"both": both, "v": Injection.of(backend, vector()), "w": Injection.of(backend, vector(W))}
    )
    expected = [scores["v"].log_probability[0], scores["w"].log_probability[1]]
    assert scores["both"].log_probability == pytest.approx(expected, abs=1e-4)


def test_a_gate_is_fitted_on_train_and_chosen_on_validation_prompts(model):
    yes, no = [f"Q: {w} now" for w in ("go", "run", "sit", "eat")], [f"Q: {w}" for w in ("go", "run", "sit", "eat")]
    gate = fit_gate(model, yes[:2], no[:2], valid=(yes[2:], no[2:]), layers=[0, 1])
    assert gate.metadata["f1"] == 1.0 and gate.layer == 0 and "F1 1.00 on 4 prompts" in repr(gate)
    assert gate.on(model, yes + no) == [True] * 4 + [False] * 4


def test_gates_are_kept_in_files(model, prompts, tmp_path):
    gate = gate_between(model, *prompts)
    loaded = Gate.load(gate.save(tmp_path / "gate.safetensors"))
    assert torch.equal(loaded.direction, gate.direction) and torch.equal(loaded.center, gate.center)
    assert (loaded.layer, loaded.threshold) == (gate.layer, gate.threshold)


def test_gates_that_cannot_work_are_refused(model, prompts):
    gate = gate_between(model, *prompts, layer=2)
    with pytest.raises(ValueError, match="reads after layer 2, but the vector acts after layer 1"):
        ivl.inject(model, vector(), when=gate)
    with pytest.raises(ValueError, match="'last' or 'generated'"):
        ivl.inject(model, vector(layer=2), when=gate, positions="all")
    with pytest.raises(ValueError, match="unwanted holds no prompts"):
        fit_gate(model, ["Q: go"], [], valid=(["Q: go"], ["Q: sit"]))
    with pytest.raises(ValueError, match="look the same"):
        fit_gate(model, ["Q: go"], ["Q: go"], valid=(["Q: go"], ["Q: sit"]))
