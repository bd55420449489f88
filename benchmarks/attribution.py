"""Exact effects of all heads beside the gradient's approximation of them (attribution patching), on the same prompts.

    python benchmarks/attribution.py                     # SmolLM2, prompts of about 90, 200 and 400 tokens

Prompts are of a built-in task with shuffled labels; a head's output at the last token is replaced by its mean over intact prompts.

1. ours: exact suffix replay
2. the gradient by hand: one forward and one backward pass of all prompts together, logits of the last token only, (mean − z) · ∂m/∂z
3. `transformer_lens.tools.analysis.attribution_patch`: patches towards the intact prompt itself, so its scores are put beside the exact
   effects of that
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from head_sweep import median_time
from torch import Tensor

import ivlens as ivl
from ivlens.models.backends import backend_of
from ivlens.patching import head_effects, mean_head_outputs
from ivlens.running.reading import read_prompts
from ivlens.running.tokens import tokenize
from ivlens.tasks.counterfactuals import counterfactual
from ivlens.tasks.prompts import Prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="present_past")
    parser.add_argument("--shots", type=int, nargs="+", default=[10, 25, 52], help="about 90, 200 and 400 tokens")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model, task = ivl.load_model(backend="bridge"), ivl.load_tasks()[options.task]
    model.requires_grad_(False)
    for shots in options.shots:
        print(pd.DataFrame(compare(model, task, shots, options)).round(3).to_string(index=False), flush=True)


def compare(model: Any, task: ivl.Task, shots: int, options: argparse.Namespace) -> list[dict]:
    intact = ivl.build_prompts(task, shots=shots, n=options.prompts)
    prompts = counterfactual(intact, "shuffled_labels")
    mean = mean_head_outputs(model, intact)
    n_tokens = len(tokenize(backend_of(model), prompts[:1])[0].prompt)
    exact_time, exact = median_time(
        lambda: head_effects(model, prompts, None, mean), options.repeats, torch.device("cpu")
    )
    by_hand = median_time(lambda: gradient(model, prompts, mean), options.repeats, torch.device("cpu"))
    library = median_time(lambda: attribution_patch(model, intact, prompts), 1, torch.device("cpu"))
    own = read_prompts(backend_of(model), tokenize(backend_of(model), intact), z=True).z
    towards = torch.cat([head_effects(model, [p], None, z) for p, z in zip(prompts, own)])
    about = {"tokens": n_tokens, "prompts": len(prompts), "exact (s)": exact_time}
    return [
        {**about, "gradient": "by hand", "(s)": by_hand[0], **beside(exact.mean(0), by_hand[1].mean(0))},
        {**about, "gradient": "transformer_lens", "(s)": library[0], **beside(towards.mean(0), library[1])},
    ]


def gradient(model: Any, prompts: Sequence[Prompt], mean: Tensor) -> Tensor:
    """(mean − z) · ∂p(answer)/∂z at the last token of each prompt: [prompt, layer, head]."""
    rows = tokenize(backend := backend_of(model), prompts)
    length = max(len(row.prompt) for row in rows)
    tokens = torch.tensor([[row.prompt[0]] * (length - len(row.prompt)) + list(row.prompt) for row in rows])
    mask = torch.tensor([[0] * (length - len(row.prompt)) + [1] * len(row.prompt) for row in rows])
    read: list[Tensor] = []

    def kept(z: Tensor, hook: Any) -> Tensor:
        read.append(z)
        return z  # what is given back is what goes on, also where a hook sees a view

    hooks = [("hook_embed", lambda x, hook: x.detach().requires_grad_())]
    hooks += [(backend.z_hook(layer), kept) for layer in range(backend.n_layers)]
    with torch.enable_grad(), model.hooks(fwd_hooks=hooks):
        logits = backend.forward(tokens, mask, keep=1)
        hits = logits[:, -1].float().softmax(-1).gather(1, torch.tensor([[row.answer[0]] for row in rows]))
        slopes = torch.autograd.grad(hits.sum(), read)
    by_head = [((mean[i] - z[:, -1]) * slope[:, -1]).sum(-1).detach() for i, (z, slope) in enumerate(zip(read, slopes))]
    return torch.stack(by_head, dim=1)


def attribution_patch(model: Any, intact: Sequence[Prompt], prompts: Sequence[Prompt]) -> Tensor:
    """The library's estimate of heads at the last token, the mean over the pairs of prompts that are of one length: [layer, head]."""
    from transformer_lens.tools.analysis import attribution_patch

    backend, scores = backend_of(model), []
    model.requires_grad_(True)  # it asks for slopes of what it reads, which need something that is trained before it
    for clean, corrupted in zip(tokenize(backend, intact), tokenize(backend, prompts)):
        if len(clean.prompt) != len(corrupted.prompt):
            raise ValueError("an intact prompt is of another length than its counterfactual; take another task")
        metric = lambda logits, answer=clean.answer[0]: logits[0, -1].float().softmax(-1)[answer]  # noqa: E731
        found = attribution_patch(model, torch.tensor([clean.prompt]), torch.tensor([corrupted.prompt]), metric)
        heads, last = torch.zeros(backend.n_layers, backend.n_heads), len(clean.prompt) - 1
        for node, score in found.node_scores.items():
            if node.kind == "attn_head_out" and node.position == last:
                heads[node.layer, node.head] = score
        scores.append(heads)
    model.requires_grad_(False)
    return torch.stack(scores).mean(0)


def beside(exact: Tensor, estimate: Tensor, top: int = 10) -> dict[str, float]:
    """Of effects [layer, head]: rank correlation, how many of the true strongest are found, and how far the strongest is off."""
    a, b = exact.flatten(), estimate.flatten()
    best = a.argmax()
    return {
        "ρ": np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1],
        f"of the top {top}": len({*a.topk(top).indices.tolist()} & {*b.topk(top).indices.tolist()}),
        "strongest, exact": a[best].item(),
        "its estimate": b[best].item(),
    }


if __name__ == "__main__":
    main()
