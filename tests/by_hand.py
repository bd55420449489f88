"""Free answers written and scored the slow way: one prompt, one token and one forward pass at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from ivlens.models import backend_of
from ivlens.tasks.checks import passes


def encode(model: Any, text: str, data: bool = False) -> list[int]:
    """Data is text, also where it looks like a special token."""
    return model.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=data)


def continued(model: Any, before: str, after: str, data: bool = False) -> tuple[list[int], list[int]]:
    """Token numbers of a text, the beginning of sequence before it, and of what follows it: as one text where that can be."""
    ids, together = encode(model, before, data), encode(model, before + after, data)
    fits = together[: len(ids)] == ids and len(together) > len(ids)
    return [model.tokenizer.bos_token_id, *ids], together[len(ids) :] if fits else encode(model, after, True)


@torch.inference_mode()
def per_token(model: Any, prompt: list[int], answer: list[int]) -> float:
    """Mean log-probability of an answer's tokens."""
    logits = model(torch.tensor([[*prompt, *answer]]))[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).mean().item()


@torch.inference_mode()
def greedy(model: Any, text: str, steps: int, layer: int = 0, change: Any = None) -> str:
    """A greedy answer, with `change` applied to the residual stream after a layer from the prompt's last token on."""
    prompt, written = [model.tokenizer.bos_token_id, *encode(model, text)], []

    def hook(x: Any, hook: Any) -> Any:
        x = x.clone()
        x[:, len(prompt) - 1 :] = change(x[:, len(prompt) - 1 :])
        return x

    hooks = [] if change is None else [(f"blocks.{layer}.hook_resid_post", hook)]
    while len(written) < steps:
        token = int(model.run_with_hooks(torch.tensor([[*prompt, *written]]), fwd_hooks=hooks)[0, -1].argmax())
        if token in backend_of(model).end_tokens:
            break
        written.append(token)
    return model.tokenizer.decode(written).strip()


def topic(model: Any, answers: list[str], texts: list[str]) -> list[float]:
    """How much likelier each answer is after its own text than after the next question's."""
    found = []
    for i, answer in enumerate(answers):
        both = texts[i], texts[(i + 1) % len(texts)]
        own, other = (per_token(model, *continued(model, f"{x.strip()}\n\n", answer)) if answer else 0.0 for x in both)
        found.append(own - other)
    return found


def surprise(model: Any, questions: list[str], texts: list[str]) -> list[float]:
    """Minus the log-probability per token of each text after its question in style `qa`; of none, that of the end."""
    found = []
    for question, text in zip(questions, texts):
        prompt, answer = continued(model, question, f" {text.strip()}" if text.strip() else "", data=True)
        while len(answer) > 1 and not model.tokenizer.decode(answer[:1]).strip():  # a space of its own says nothing
            prompt, answer = [*prompt, answer[0]], answer[1:]
        found.append(-per_token(model, prompt, answer or [model.tokenizer.eos_token_id]))
    return found


def scores(
    model: Any, check: str, questions: list[str], answers: list[str], texts: list[str]
) -> list[dict[str, float]]:
    return [
        {
            "met": float(passes(check, text)),
            "met_loose": float(passes(check, text, loose=True)),
            "topic": t,
            "surprise": s,
        }
        for text, t, s in zip(texts, topic(model, answers, texts), surprise(model, questions, texts))
    ]


def balance(of: list[dict[str, float]], told: list[dict[str, float]]) -> float:
    """Harmonic mean of met, of topic beside that of told answers, and of their perplexity over these answers'."""
    mean = lambda rows, name: sum(row[name] for row in rows) / len(rows)  # noqa: E731
    parts = [mean(of, "met"), min(math.exp(mean(told, "surprise")) / math.exp(mean(of, "surprise")), 1)]
    if mean(told, "topic") > 0:
        parts.append(min(max(mean(of, "topic") / mean(told, "topic"), 0), 1))
    return 0.0 if min(parts) == 0 else len(parts) / sum(1 / part for part in parts)


def balance_interval(of: list[dict[str, float]], told: list[dict[str, float]]) -> tuple[float, float]:
    """95 % bootstrap interval over questions, told answers drawn with those beside them; `of` may hold several draws of a control."""
    n = len(told)
    means = [{name: sum(row[name] for row in of[i::n]) / len(of[i::n]) for name in told[0]} for i in range(n)]
    drawn = np.random.default_rng(0).integers(n, size=(2000, n))
    low, high = np.quantile([balance([means[i] for i in x], [told[i] for i in x]) for x in drawn], [0.025, 0.975])
    return low, high
