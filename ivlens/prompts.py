"""How instruction, demonstrations and query become text and tokens, and how the instruction is destroyed again.

A `Prompt` keeps its parts, so that a counterfactual can change one of them; `render` turns it into text, `tokenize` into
token numbers as the model's own `to_tokens` would (one BOS where the model wants it, never two).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ivlens.tasks.task import Example, Task

if TYPE_CHECKING:
    from ivlens.models.backends import Backend

__all__ = [
    "COUNTERFACTUALS",
    "STYLES",
    "Prompt",
    "TokenizedPrompt",
    "build_prompts",
    "common_stop",
    "counterfactual",
    "fill_right",
    "pad_left",
    "tokenize",
]

STYLES = ("plain", "qa", "chat")


@dataclass(frozen=True)
class Prompt:
    """One query with what comes before it.

    Attributes
    ----------
    query
        The example asked about; `answer` is its output.
    demonstrations
        Solved examples shown first.
    instruction
        The instruction c of the paper, or None for the bare query.
    style
        `qa` ("Q: …\\nA: …"), `plain` (lines only) or `chat` (the tokenizer's own template).
    task
        Name of the task it was built from.
    """

    query: Example
    demonstrations: tuple[Example, ...] = ()
    instruction: str | None = None
    style: str = "qa"
    task: str = ""

    @property
    def answer(self) -> str:
        """The answer as it continues the rendered prompt (with its leading space in style `qa`)."""
        return f" {self.query.output}" if self.style == "qa" else self.query.output

    def render(self, tokenizer: Any = None) -> str:
        """The prompt as text, up to where the answer begins.

        Examples
        --------
        >>> Prompt(Example("go", "went"), (Example("walk", "walked"),)).render()
        'Q: walk\\nA: walked\\n\\nQ: go\\nA:'
        """
        if self.style == "chat":
            return self._render_chat(tokenizer)
        head = [self.instruction] if self.instruction else []
        if self.style == "qa":
            shown = [f"Q: {x.input}\nA: {x.output}" for x in self.demonstrations]
            return "\n\n".join([*head, *shown, f"Q: {self.query.input}\nA:"])
        shown = [f"{x.input}\n{x.output}" for x in self.demonstrations]
        return "\n\n".join([*head, *shown, f"{self.query.input}\n"])

    def _render_chat(self, tokenizer: Any) -> str:
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                "style='chat' needs a tokenizer with a chat template; use style='qa' or 'plain' for this model"
            )
        turns: list[dict[str, str]] = []
        lead = f"{self.instruction}\n\n" if self.instruction else ""
        for example in self.demonstrations:
            turns.append({"role": "user", "content": lead + example.input})
            turns.append({"role": "assistant", "content": example.output})
            lead = ""
        turns.append({"role": "user", "content": lead + self.query.input})
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


@dataclass(frozen=True)
class TokenizedPrompt:
    """Token numbers of a prompt and of the answer that continues it."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...] = ()


def common_stop(prompts: Sequence[Prompt]) -> str | None:
    """The text that ends generated answers: a line's end, or None, where the model says so, if some have several lines."""
    return None if any("\n" in prompt.query.output.strip() for prompt in prompts) else "\n"


def build_prompts(
    task: Task,
    *,
    n: int | None = None,
    shots: int = 0,
    instruction: bool | str | int = False,
    style: str = "qa",
    split: str = "train",
    seed: int = 0,
) -> list[Prompt]:
    """Prompts of a task: queries from `split`, demonstrations from the training split, never the query itself.

    Parameters
    ----------
    n
        How many; None takes every example of the split once. More than there are reuses queries with new demonstrations.
    instruction
        False for the bare query, True for a paraphrase drawn per prompt, a number for that paraphrase, or your own text.

    Raises
    ------
    ValueError
        If the split is empty, or the task has fewer training examples than `shots` + 1.
    """
    if style not in STYLES:
        raise ValueError(f"style={style!r} is unknown; choose one of {', '.join(STYLES)}")
    queries = list(task.split(split))
    if not queries:
        raise ValueError(f"task {task.name!r} has no examples in its {split!r} split; give the task more records")
    if shots and len(task.train) < shots + 1:
        raise ValueError(
            f"shots={shots} needs at least {shots + 1} training examples, but task {task.name!r} has {len(task.train)}; "
            "use fewer shots or give the task more records"
        )
    rng = random.Random(f"{seed}/{task.name}/{split}")
    if n is not None:
        order = list(queries)
        rng.shuffle(order)
        queries = [order[i % len(order)] for i in range(n)]
    prompts = []
    for query in queries:
        others = [x for x in task.train if x != query]
        text = _instruction(task, instruction, rng)
        prompts.append(Prompt(query, tuple(rng.sample(others, shots)), text, style, task.name))
    return prompts


def _instruction(task: Task, choice: bool | str | int, rng: random.Random) -> str | None:
    if isinstance(choice, str):
        return choice
    if choice is False or choice is None:
        return None
    if choice is True:
        return rng.choice(task.instructions)
    return task.instructions[choice]


# -- counterfactuals: the same query, with the instruction's information destroyed (method: step 2 of locating heads) ------


def shuffled_labels(prompt: Prompt, rng: random.Random, others: Sequence[Task], tokenizer: Any) -> Prompt:
    """Demonstrations with permuted outputs (Function Vectors, arXiv 2310.15213; needs two demonstrations or more)."""
    if len(prompt.demonstrations) < 2:
        raise ValueError(
            "counterfactual='shuffled_labels' needs shots >= 2; use 'no_instruction' or 'random_text' instead"
        )
    told = [x.output for x in prompt.demonstrations]
    outputs = list(told)
    while outputs == told and len(set(told)) > 1:  # of two demonstrations, every other shuffle changes nothing
        rng.shuffle(outputs)
    return replace(prompt, demonstrations=tuple(replace(x, output=y) for x, y in zip(prompt.demonstrations, outputs)))


def no_instruction(prompt: Prompt, rng: random.Random, others: Sequence[Task], tokenizer: Any) -> Prompt:
    """The bare query: no instruction, no demonstrations (as the code of arXiv 2502.11019 does)."""
    return replace(prompt, demonstrations=(), instruction=None)


def other_instruction(prompt: Prompt, rng: random.Random, others: Sequence[Task], tokenizer: Any) -> Prompt:
    """Another task's instruction, demonstrations left out (arXiv 2505.12075)."""
    names = [task for task in others if task.name != prompt.task]
    if not names:
        raise ValueError("counterfactual='other_instruction' needs at least two tasks; pass more tasks")
    return replace(prompt, demonstrations=(), instruction=rng.choice(rng.choice(names).instructions))


_RANDOM_TEXT = (
    "The river bends twice before it reaches the mill, and in spring the lower path is under water for a week. My aunt "
    "kept bees on the slope behind her house, where the wind was weak and the lavender grew without much care. Trains "
    "stop at the small station only on Sundays now; the waiting room has a stove, two benches and a clock that runs late. "
    "In the evening the shutters are closed one after another, and someone always forgets the one beside the bakery."
)


def random_text(prompt: Prompt, rng: random.Random, others: Sequence[Task], tokenizer: Any) -> Prompt:
    """Real text of the same token length in the instruction's place, demonstrations left out (arXiv 2505.12075).

    The demonstrations count as part of the instruction: they are replaced by text too.
    """
    told = replace(prompt, style="qa").render() if prompt.style == "chat" else prompt.render()
    bare = replace(
        prompt, demonstrations=(), instruction=None, style="qa" if prompt.style == "chat" else prompt.style
    ).render()
    length = len(tokenizer.encode(told[: len(told) - len(bare)], add_special_tokens=False))
    ids = tokenizer.encode(_RANDOM_TEXT, add_special_tokens=False)
    start = rng.randrange(len(ids))
    text = tokenizer.decode([ids[(start + i) % len(ids)] for i in range(max(length - 1, 1))]).strip()
    return replace(prompt, demonstrations=(), instruction=text)


COUNTERFACTUALS: dict[str, Callable[[Prompt, random.Random, Sequence[Task], Any], Prompt]] = {
    f.__name__: f for f in (shuffled_labels, no_instruction, other_instruction, random_text)
}


def counterfactual(
    prompts: Sequence[Prompt], kind: str, *, tasks: Sequence[Task] = (), tokenizer: Any = None, seed: int = 0
) -> list[Prompt]:
    """The same queries with the instruction's information destroyed.

    Parameters
    ----------
    kind
        One of `shuffled_labels`, `no_instruction`, `other_instruction`, `random_text`.
    tasks
        Where `other_instruction` takes instructions from.
    """
    if kind not in COUNTERFACTUALS:
        raise ValueError(f"counterfactual={kind!r} is unknown; choose one of {', '.join(COUNTERFACTUALS)}")
    return [COUNTERFACTUALS[kind](p, random.Random(f"{seed}/{i}"), tasks, tokenizer) for i, p in enumerate(prompts)]


# -- tokens -----------------------------------------------------------------------------------------------------------


def tokenize(
    backend: Backend, prompts: Sequence[Prompt | str | Tensor], answers: Sequence[str] | None = None
) -> list[TokenizedPrompt]:
    """Token numbers of prompts and answers.

    Parameters
    ----------
    prompts
        `Prompt` objects, texts, or 1-D tensors of token numbers (taken as they are).
    answers
        Texts that continue the prompts exactly as given (mind the leading space). For `Prompt` objects, their own answers.

    Raises
    ------
    ValueError
        If a prompt or answer is empty or tokenizes to nothing, numbers don't match, or it is longer than the context.
    """
    if not len(prompts):
        raise ValueError("no prompts given; pass at least one")
    if answers is None and all(isinstance(p, Prompt) for p in prompts):
        answers = [p.answer for p in prompts]
    if answers is not None and len(answers) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(answers)} answers; give one answer per prompt")
    out = []
    for i, prompt in enumerate(prompts):
        ids = _encode_prompt(backend, prompt)
        answer = () if answers is None else _encode_answer(backend, prompt, ids, answers[i])
        # " 7" may be a space token and a digit: the answer's first token should be one that says something.
        while isinstance(prompt, Prompt) and len(answer) > 1 and not backend.tokenizer.decode([answer[0]]).strip():
            ids, answer = ids + answer[:1], answer[1:]
        if not ids:
            raise ValueError(f"prompt {i} tokenizes to nothing; give it some text")
        if answers is not None and not answer:
            raise ValueError(
                f"answer {i} ({answers[i]!r}) tokenizes to nothing; give every prompt an answer with text in it"
            )
        if backend.n_ctx and len(ids) + len(answer) > backend.n_ctx:
            raise ValueError(
                f"prompt {i} has {len(ids)} tokens and its answer {len(answer)}, but {backend.name} has a context of "
                f"{backend.n_ctx}; use fewer shots or shorter inputs (nothing is ever cut off)"
            )
        out.append(TokenizedPrompt(ids, answer))
    return out


def _encode_prompt(backend: Backend, prompt: Prompt | str | Tensor) -> tuple[int, ...]:
    if isinstance(prompt, Tensor):
        return tuple(prompt.flatten().tolist())
    tokenizer = backend.tokenizer
    text = prompt.render(tokenizer) if isinstance(prompt, Prompt) else prompt
    ids = tokenizer.encode(text, add_special_tokens=False)
    bos = tokenizer.bos_token_id
    if bos is not None and getattr(backend.model.cfg, "default_prepend_bos", True) and ids[:1] != [bos]:
        ids = [bos, *ids]
    return tuple(ids)


def _encode_answer(backend: Backend, prompt: Any, ids: tuple[int, ...], answer: str) -> tuple[int, ...]:
    alone = tuple(backend.tokenizer.encode(answer, add_special_tokens=False))
    if isinstance(prompt, Tensor) or not alone:
        return alone
    # Tokenized together where that leaves the prompt's tokens alone: some tokenizers add a space to a text's beginning.
    text = prompt.render(backend.tokenizer) if isinstance(prompt, Prompt) else prompt
    together = _encode_prompt(backend, text + answer)
    return together[len(ids) :] if together[: len(ids)] == ids and len(together) > len(ids) else alone


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: Any = None) -> tuple[Tensor, Tensor]:
    """Token rows padded on the left, and their attention mask, both [batch pos]."""
    width = max(map(len, rows))
    tokens = torch.tensor([[pad] * (width - len(r)) + list(r) for r in rows], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
    return tokens, mask


def fill_right(rows: Sequence[Sequence[int]], device: Any = None) -> tuple[Tensor, Tensor]:
    """Answers filled up on the right, where nothing looks back, with their last token; and which tokens count."""
    longest = max(map(len, rows))
    filled = [list(r) + list(r[-1:]) * (longest - len(r)) for r in rows]
    counted = [[j < len(r) for j in range(longest)] for r in rows]
    return torch.tensor(filled, dtype=torch.long, device=device), torch.tensor(counted, dtype=torch.bool, device=device)
