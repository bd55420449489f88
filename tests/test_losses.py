"""Loss terms against a few lines of obvious arithmetic; padding is shown not to count."""

from __future__ import annotations

import pytest
import torch

from ivlens.training.guidance import KL, PRESETS, Guidance, SplitKL
from ivlens.training.losses import answer_positions, head_consistency, kl_divergence, last_prompt_positions, lm_loss
from ivlens.training.teacher import TopK, guided_divergence, kept_divergence, split_divergence

#                    prompt prompt answer answer pad    /  pad prompt prompt prompt answer
LABELS = torch.tensor([[-100, -100, 7, 3, -100], [-100, -100, -100, -100, 5]])


def logits(seed=0):
    return torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(seed))


def test_positions_are_those_before_the_answer_on_either_side_of_padding():
    assert last_prompt_positions(LABELS).tolist() == [1, 3]
    assert answer_positions(LABELS).nonzero().tolist() == [[0, 1], [0, 2], [1, 3]]
    for bad in ([[-100, -100]], [[4, 5]]):
        with pytest.raises(ValueError, match="no prompt or no answer"):
            last_prompt_positions(torch.tensor(bad))


def test_the_language_model_loss_is_the_mean_over_answer_tokens():
    x = logits()
    chances = [x[r, p].softmax(-1)[t] for r, p, t in ((0, 1, 7), (0, 2, 3), (1, 3, 5))]
    torch.testing.assert_close(lm_loss(x, LABELS), -torch.stack(chances).log().mean())
    torch.testing.assert_close(lm_loss(x, LABELS, 6), -torch.stack(chances).log().sum() / 6)


def test_padding_does_not_count():
    x = logits()
    y = x.clone()
    y[0, 3:], y[1, :3] = 99.0, -99.0
    torch.testing.assert_close(lm_loss(x, LABELS), lm_loss(y, LABELS))
    where = answer_positions(LABELS)
    torch.testing.assert_close(kl_divergence(x[where], logits(1)[where]), kl_divergence(y[where], logits(1)[where]))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergences_in_both_directions(temperature):
    student, teacher = logits(0)[0], logits(1)[0]
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    forward, backward = (p * (p / q).log()).sum(-1), (q * (q / p).log()).sum(-1)
    torch.testing.assert_close(kl_divergence(student, teacher, temperature=temperature), forward)
    options = {"direction": "student_teacher", "temperature": temperature}
    torch.testing.assert_close(kl_divergence(student, teacher, **options), backward)


def test_head_consistency_sums_the_heads_mean_squared_distances():
    a, b = (torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    expected = sum(((a[:, h] - b[:, h]) ** 2).mean() for h in range(2))
    torch.testing.assert_close(head_consistency(a, b), expected)


def test_strength_fades_from_one_to_nothing_at_the_fraction_given():
    linear, cosine = Guidance(until=0.5), Guidance(until=0.5, schedule="cosine")
    assert [linear.strength(s, 20) for s in (0, 5, 10, 19)] == [1.0, 0.5, 0.0, 0.0]
    assert [round(cosine.strength(s, 20), 6) for s in (0, 5, 10, 25)] == [1.0, 0.5, 0.0, 0.0]
    assert Guidance(progressive=False).strength(0, 20) == 0.0


def test_options_that_make_no_sense_are_refused():
    for make, message in (
        (lambda: KL(weight=-1), "weight=-1 is negative"),
        (lambda: KL(temperature=0), "temperature=0 must be above 0"),
        (lambda: KL(direction="up"), "direction='up' is unknown; choose one of teacher_student"),
        (lambda: KL(positions="first"), "positions='first' is unknown"),
        (lambda: Guidance(heads_weight=-0.1), r"heads_weight=-0\.1 is negative"),
        (lambda: Guidance(until=1.5), r"until=1\.5 is outside"),
        (lambda: Guidance(schedule="step"), "schedule='step' is unknown"),
        (lambda: SplitKL(gate="open"), "gate='open' is unknown; choose one of right, probability, none"),
        (lambda: SplitKL(right=-1.0), r"right=-1\.0 must be 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    assert PRESETS["fvg-code"].heads_weight == 1.0 and not PRESETS["fvg-code"].progressive


@pytest.mark.parametrize("direction", ["teacher_student", "student_teacher"])
def test_a_divergence_from_the_kept_tokens_falls_short_by_the_remainders_part(direction):
    student, teacher = logits(0)[0] * 2, logits(1)[0] * 2
    options = {"direction": direction, "temperature": 1.5}
    full = kl_divergence(student, teacher, **options)
    torch.testing.assert_close(kept_divergence(student, TopK.of(teacher, 11, 1.5), **options), full)
    top = TopK.of(teacher, 4, 1.5)
    kept = kept_divergence(student, top, **options)
    p, q = (teacher / 1.5).softmax(-1), (student / 1.5).softmax(-1)
    if direction == "student_teacher":
        p, q = q, p
    rest = torch.ones_like(p).scatter(1, top.indices.long(), 0.0).bool()
    for i in range(len(p)):
        a, b = p[i][rest[i]], q[i][rest[i]]
        missing = a.sum() * ((a / a.sum()) * ((a / a.sum()) / (b / b.sum())).log()).sum()
        torch.testing.assert_close(full[i] - kept[i], missing, atol=1e-5, rtol=1e-4)
    assert (kept <= full + 1e-6).all() and (kept >= -1e-6).all()


def split_by_hand(student, teacher, right, gate):
    """Each position by itself, from probabilities."""
    others, of_right = [], []
    for p, q, y in zip(teacher.softmax(-1), student.softmax(-1), right):
        keep = torch.arange(len(p)) != y
        a, b = p[keep] / (1 - p[y]), q[keep] / (1 - q[y])
        others.append((1 - p[y]) * (a * (a / b).log()).sum())
        g = {"right": float(p.argmax() == y), "probability": p[y], "none": 1.0}[gate]
        of_right.append(g * (p[y] * (p[y] / q[y]).log() + (1 - p[y]) * ((1 - p[y]) / (1 - q[y])).log()))
    return torch.stack(others), torch.stack(of_right)


@pytest.mark.parametrize("gate", ["right", "probability", "none"])
def test_a_divergence_is_split_at_the_right_token(gate):
    student, teacher = logits(0)[0] * 2, logits(1)[0] * 2
    right = teacher.argmax(-1)
    right[::2] = (right[::2] + 3) % teacher.shape[-1]  # every other one is a token that the teacher doesn't rank first
    expected = split_by_hand(student, teacher, right, gate)
    everything = TopK.of(teacher, teacher.shape[-1], 1.0, right)
    for kept in (teacher, everything):
        for found, wanted in zip(split_divergence(student, kept, right, gate), expected):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    if gate == "none":
        torch.testing.assert_close(sum(expected), kl_divergence(student, teacher), atol=1e-5, rtol=1e-4)
    few = TopK.of(teacher, 3, 1.0, right)
    assert (few.indices == right[:, None]).sum(-1).tolist() == [1] * len(right)
    others, of_right = split_divergence(student, few, right, gate)
    torch.testing.assert_close(of_right, expected[1], atol=1e-5, rtol=1e-4)  # whatever is kept
    assert (others <= expected[0] + 1e-6).all() and (others > 0).any()


def test_the_part_beside_the_right_token_never_moves_it():
    student, teacher = (logits(0)[0] * 2).requires_grad_(), logits(1)[0] * 2
    right = torch.arange(len(teacher))
    others, of_right = split_divergence(student, TopK.of(teacher, 5, 1.0, right), right, "none")
    (moved,) = torch.autograd.grad(others.sum(), student, retain_graph=True)
    assert (moved.gather(1, right[:, None]) == 0).all() and moved.abs().max() > 1e-3
    (moved,) = torch.autograd.grad(of_right.sum(), student)
    assert (moved.gather(1, right[:, None]) != 0).all()
    sure = torch.full_like(teacher, -50.0).scatter(
        1, right[:, None], 50.0
    )  # a teacher that is sure, of the right token
    assert all(torch.isfinite(part).all() for part in split_divergence(student, sure, right, "right"))
    found = guided_divergence(SplitKL(0.5, 2.0, "none"), student, teacher, right)
    torch.testing.assert_close(
        found, sum(w * x for w, x in zip((0.5, 2.0), split_by_hand(student, teacher, right, "none")))
    )


def test_a_constant_schedule_keeps_the_vector_on():
    assert {Guidance(schedule="constant").strength(step, 8) for step in range(9)} == {1.0}
