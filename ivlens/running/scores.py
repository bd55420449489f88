"""What an indirect effect is measured in."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ivlens.tasks.answers import UNSPACED, VOWELS, words_of

__all__ = ["METRICS", "check_finite", "exact_match", "measure", "normalized", "rouge_l", "rouge_scorer", "words"]

WHOLE_ANSWER = ("log_probability", "accuracy")  # the others look at its first token only
METRICS = ("probability", "log_probability", "logit", "logit_difference", "accuracy")


def measure(
    metric: str,
    logits: Float[Tensor, "batch copy answer d_vocab"],
    answers: Int[Tensor, "batch answer"],
    answer_mask: Bool[Tensor, "batch answer"],
    distractors: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch copy"]:
    """Score of each copy's logits for its prompt's answer, computed in float32.

    `probability` and `logit` are of the answer's first token; `logit_difference` is that logit minus the distractor's. Of the
    whole answer, teacher-forced: `log_probability` is summed over its tokens (nats), `accuracy` is 1 where every one of them
    is ranked first, which is where greedy decoding gives the answer.
    """
    index = answers[:, None, :, None].expand(-1, logits.shape[1], -1, 1)
    if metric == "accuracy":
        best = logits.max(-1)
        check_finite(best.values, logits.dtype)
        return ((best.indices == index[..., 0]) | ~answer_mask[:, None]).all(-1).float()
    if metric != "log_probability":
        first = logits[:, :, 0]
        chosen = first.gather(-1, index[:, :, 0])[..., 0].float()
        check_finite(chosen, logits.dtype)
        if metric == "logit":
            return chosen
        if metric == "logit_difference":
            wrong = first.gather(-1, distractors[:, None, None].expand(-1, first.shape[1], 1))[..., 0]
            return chosen - wrong.float()
        return (chosen - _log_normalizer(first)).exp()
    per_token = logits.gather(-1, index)[..., 0].float() - _log_normalizer(logits)
    return torch.where(answer_mask[:, None], per_token, 0.0).sum(-1)


def check_finite(x: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError where something that was computed isn't a number: it would be kept and averaged as if it were one."""
    if not torch.isfinite(x).all():
        said = f"the model gives NaN or infinite numbers in {str(dtype).removeprefix('torch.')}"
        raise ValueError(f"{said}; load it with dtype=torch.float32 (or torch.bfloat16, which reaches as far)")


def _log_normalizer(logits: Float[Tensor, "batch copy *answer d_vocab"]) -> Float[Tensor, "batch copy *answer"]:
    """logsumexp in float32, some copies at a time: temporaries as large as the logits cost more than the sums."""
    found = torch.stack([torch.cat([x.float().logsumexp(-1) for x in row.split(32)]) for row in logits])
    check_finite(found, logits.dtype)
    return found


def check_metric(metric: str) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r} is unknown; choose one of {', '.join(METRICS)}")


# -- by text ------------------------------------------------------------------------------------------------------------


def exact_match(tokenizer: Any, text: str, answers: Sequence[str]) -> float:
    """1 where the text is one of the right answers, but for white space around it."""
    return float(normalized(tokenizer, text) in {normalized(tokenizer, answer) for answer in answers})


def rouge_l(text: str, answers: Sequence[str]) -> float:
    """ROUGE-L (F1) with the nearest of the right answers."""
    scorer = rouge_scorer()
    return max(scorer.score(answer, text)["rougeL"].fmeasure for answer in answers)


def normalized(tokenizer: Any, text: str) -> str:
    """As the tokenizer's own normalization has it, which a model can't undo: composed letters, say, or lower case."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    return (text if normalizer is None else normalizer.normalize_str(text)).strip()


class _Words:
    """Words of any script, for rouge_score."""

    def tokenize(self, text: str) -> list[str]:
        return words_of(text) or text.split()  # of signs only


@cache
def rouge_scorer() -> Any:
    """Gives ROUGE-L, of words as `_Words` has them: those of the library's own tokenizer in English, and in every other script."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())


def words(text: str) -> float:
    """How many words a text has, two characters counting as one in scripts that put no spaces between them."""
    text = "".join(c for c in text if unicodedata.category(c)[0] != "M" and not VOWELS.match(c))
    unspaced = len(UNSPACED.findall(text))
    return len(UNSPACED.sub(" ", text).split()) + unspaced / 2
