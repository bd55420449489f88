"""What a panel shows: continuations as they are made, the next token with and without, and the heads behind the vector."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ivlens.common.tables import table_html
from ivlens.models.backends import backend_of
from ivlens.models.head import Head
from ivlens.patching.effects import HeadEffects
from ivlens.running.decoding import stream
from ivlens.running.injection import Injection
from ivlens.running.reading import unembedded
from ivlens.running.tokens import tokenize
from ivlens.steering.generate import Generations, as_asked, limits
from ivlens.tasks.examples import Example
from ivlens.tasks.prompts import Prompt, build_prompts
from ivlens.tasks.suite import TaskSuite, load_tasks
from ivlens.tasks.task import Task
from ivlens.vectors.extraction import extract_vector
from ivlens.vectors.vector import InstructionVector

__all__ = ["Exploration", "Setting", "View"]

CONDITIONS = ("no vector", "+ vector", "− vector")
N_TOKENS = 5  # of each condition's likeliest, and of what a head writes
SAID = "what it writes, read through the unembedding: numbers to look at, no proof"
HOW_MADE = ("way", "shots", "instruction", "style", "template", "n_prompts", "only_correct", "seed")


@dataclass(frozen=True)
class Setting:
    """What is asked for: a prompt, which vectors (by name), after which layer, how strongly and at which positions."""

    prompt: str | Prompt
    names: tuple[str, ...]
    layer: int
    scale: float
    positions: str

    def asking(self, text: str) -> Setting:
        """The same with another text in the prompt's place, or in that of what its user says."""
        if isinstance(self.prompt, str):
            return replace(self, prompt=text)
        return replace(self, prompt=replace(self.prompt, query=Example(text, "", check=self.prompt.query.check)))


@dataclass(frozen=True)
class View:
    """What vectors do to one prompt. Shows as tables in Jupyter.

    Attributes
    ----------
    generations
        Greedy continuations side by side, as `ivl.generate` gives them.
    next_tokens
        The likeliest next tokens and their probabilities, a column per condition.
    heads
        A row per vector and head: its effect (NaN where no effects were given), its share (the part of the vector's length that it
        makes up) and the tokens that it writes, read through the unembedding.
    """

    generations: Generations
    next_tokens: pd.DataFrame
    heads: pd.DataFrame

    def _repr_html_(self) -> str:
        probabilities = self.next_tokens.map("{:.1%}".format).reset_index()
        parts = [
            self.generations._repr_html_(),
            table_html(probabilities, title="Next token: probability", index=False),
            table_html(self._readable(), title=f"Heads: effect, share, and {SAID}", index=False),
        ]
        return "".join(parts)

    def __repr__(self) -> str:
        tables = self.next_tokens.map("{:.1%}".format).to_string(), self._readable().to_string(index=False)
        return "\n\n".join([repr(self.generations), *tables])

    def _readable(self) -> pd.DataFrame:
        return self.heads.assign(head=self.heads["head"].map(str)).round(3)


class Exploration:
    """Vectors whose heads can be dropped and added, and what they do to a prompt, step by step.

    Parameters
    ----------
    vectors
        One, or several by name; all of the model's own shape.
    effects
        The heads' effects, to look at.
    tasks
        Where the tasks of the vectors are found by name, besides the built-in ones: to read what further heads write.
    """

    def __init__(
        self,
        model: Any,
        vectors: InstructionVector | Mapping[str, InstructionVector],
        *,
        effects: HeadEffects | None = None,
        tasks: TaskSuite | Mapping[str, Task] | None = None,
    ):
        self.model, self.backend = model, backend_of(model)
        self.given = {vectors.name: vectors} if isinstance(vectors, InstructionVector) else dict(vectors)
        if not self.given:
            raise ValueError("no vectors given; pass one, or several by name, such as {'past': iv}")
        for vector in self.given.values():
            vector.check_model(model)
        self.shape = self.backend.n_layers, self.backend.n_heads
        if effects is not None and tuple(effects.values.shape[1:]) != self.shape:
            theirs = " × ".join(map(str, effects.values.shape[1:]))
            said = f"effects are of {theirs} heads, but {self.backend.name} has {' × '.join(map(str, self.shape))}"
            raise ValueError(f"{said}; locate them in this model with ivl.locate_heads")
        self.effects = None if effects is None else effects.mean()
        self.tasks = tasks or {}
        self.heads = {name: vector.heads for name, vector in self.given.items()}
        self.known = dict(self.given)  # with the shares of further heads, once read

    # -- the vectors ------------------------------------------------------------------------------------------------
    def start(self, prompt: str | Prompt | None = None) -> Setting:
        """The first vector as it was tuned, else a third up the layers at scale 1; the prompt, or its task's first test question."""
        name, vector = next(iter(self.given.items()))
        layer = self.backend.n_layers // 3 if vector.layer is None else self.backend.check_layer(vector.layer)
        prompt = self._question(vector) if prompt is None else prompt
        setting = Setting(prompt, (name,), layer, float(vector.scale), vector.metadata.get("positions", "last"))
        return setting if isinstance(prompt, str) else setting.asking(prompt.query.input)

    def vectors_at(self, setting: Setting) -> list[InstructionVector]:
        """The chosen vectors, of the heads that are left in them, with the layer, scale and positions that are set."""
        place = {"layer": setting.layer, "scale": setting.scale}
        found = [self._of_heads(name) for name in setting.names]
        return [replace(v, **place, metadata={**v.metadata, "positions": setting.positions}) for v in found]

    def toggle(self, head: Head, names: Sequence[str]) -> None:
        """Drop a head from the named vectors, or add it where one of them lacks it.

        Raises
        ------
        ValueError
            If what the head writes isn't known and can't be read: the vector doesn't say of which task and prompts it is.
        """
        head = self.backend.check_head(*head)
        everywhere = all(head in self.heads[name] for name in names)
        for name in names:
            if not everywhere and head not in self.known[name].heads:
                self.known[name] = self._with_every_head(name)
        for name in names:
            others = set(self.heads[name]) - {head}
            self.heads[name] = tuple(sorted(others if everywhere else others | {head}))

    def _of_heads(self, name: str) -> InstructionVector:
        given, known, heads = self.given[name], self.known[name], self.heads[name]
        if heads == given.heads:
            return given
        shares = known.shares[[known.heads.index(head) for head in heads]]
        about = {key: value for key, value in given.metadata.items() if key != "projections"}  # on its old direction
        return replace(given, vector=shares.sum(0), heads=heads, shares=shares if heads else None, metadata=about)

    def _with_every_head(self, name: str) -> InstructionVector:
        """The vector with every head's share, on the prompts that it was made of."""
        vector, about = self.given[name], self.given[name].metadata
        task, how = self._task(vector), {key: about[key] for key in HOW_MADE if key in about}
        if not vector.heads:
            raise ValueError(
                f"{name!r} has no heads, being a difference of residual streams, so none can be added to it"
            )
        if task is None or "n_prompts" not in how:
            otherwise = "pass tasks=, or a vector that was extracted over more heads"
            raise ValueError(f"what other heads write on the prompts of {name!r} isn't known; {otherwise}")
        every = [Head(layer, head) for layer in range(self.shape[0]) for head in range(self.shape[1])]
        wide = extract_vector(self.model, task, every, **how)
        own = [every.index(head) for head in vector.heads]
        if (wide.shares[own] - vector.shares).norm() > 1e-3 * vector.shares.norm():
            said = f"on the prompts that {name!r} says it was made of, its heads now write something else"
            raise ValueError(f"{said}; extract it again, over every head that is to be looked at")
        return wide

    def _task(self, vector: InstructionVector) -> Task | None:
        if vector.name in self.tasks:
            return self.tasks[vector.name]
        try:
            return load_tasks(vector.name)[vector.name]
        except KeyError:
            return None

    def _question(self, vector: InstructionVector) -> str | Prompt:
        task = self._task(vector)
        if task is None or not task.test:
            return "Q: walk\nA:"
        asked = build_prompts(task, split="test", style=vector.metadata.get("style", "qa"))[0]
        return asked if asked.style == "chat" else asked.render()

    # -- what they do -----------------------------------------------------------------------------------------------
    def write(self, setting: Setting, max_new_tokens: int | None = None) -> Iterator[tuple[Generations, pd.DataFrame]]:
        """Continuations as they are made and the next token's probabilities; a token more each time, the vector's first.

        The last are those of `ivl.generate` with `vectors_at(setting)`. Whoever reads may stop after any: nothing stays on the model.
        """
        vectors = self.vectors_at(setting)
        plus = Injection.of(self.backend, vectors) if vectors else None
        injections = {"no vector": None} if plus is None else {"+ vector": plus, "no vector": None, "− vector": -plus}
        (row,), (most, stop) = tokenize(self.backend, [setting.prompt]), limits([setting.prompt], max_new_tokens)
        texts: dict[str, str] = {name: "" for name in CONDITIONS if name in injections}
        first: dict[str, Tensor] = {}
        asked = as_asked(setting.prompt, self.backend.tokenizer)
        for name, text, logits in stream(self.backend, row, injections, max_new_tokens=most, stop=stop):
            texts[name] = text
            if name not in first:
                first[name] = logits.float().softmax(-1)
                tokens = self._likeliest(first)
            yield Generations([asked], {k: [v] for k, v in texts.items()}), tokens

    def _likeliest(self, first: Mapping[str, Tensor]) -> pd.DataFrame:
        shown = {int(i): None for p in first.values() for i in p.topk(N_TOKENS).indices}
        columns = {name: [first[name][i].item() for i in shown] for name in CONDITIONS if name in first}
        return pd.DataFrame(columns, index=pd.Index([self._token(i) for i in shown], name="token"))

    def shares(self, name: str) -> dict[Head, float]:
        """The part of the vector's length that each of its heads makes up; they add up to one."""
        vector = self._of_heads(name)
        if not vector.heads:
            return {}
        parts = vector.shares @ vector.vector / vector.vector.square().sum().clamp(min=1e-12)
        return dict(zip(vector.heads, parts.tolist()))

    def about_heads(self, setting: Setting, more: Sequence[Head] = ()) -> pd.DataFrame:
        """Effect, share and tokens of the chosen vectors' heads, the largest share first, and of `more` that aren't in them.

        NaN stands for an effect or a share that there isn't; tokens are empty where what the head writes wasn't read.
        """
        rows, written = [], {}
        for name in setting.names:
            shares, known = self.shares(name), self.known[name]
            for head in dict.fromkeys((*shares, *more)):
                effect = math.nan if self.effects is None else self.effects[head].item()
                if head in known.heads:
                    written[len(rows)] = known.shares[known.heads.index(head)]
                rows.append((name, head, effect, shares.get(head, math.nan)))
        frame = pd.DataFrame(rows, columns=["vector", "head", "effect", "share"]).assign(tokens="")
        if written:
            for i, logits in zip(written, unembedded(self.backend, torch.stack(list(written.values())))):
                frame.loc[i, "tokens"] = self._written(logits)
        return frame.sort_values("share", ascending=False, ignore_index=True)

    def _written(self, logits: Tensor) -> str:
        best = logits.topk(N_TOKENS)
        return ", ".join(f"{self._token(i)} {x:+.1f}" for i, x in zip(best.indices.tolist(), best.values.tolist()))

    def _token(self, number: int) -> str:
        return repr(self.backend.tokenizer.decode([number]))

    def view(self, setting: Setting, max_new_tokens: int | None = None) -> View:
        """All of it, once it is written."""
        *_, (generations, tokens) = self.write(setting, max_new_tokens)
        return View(generations, tokens, self.about_heads(setting))
