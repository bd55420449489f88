"""Choosing layer and scale of an injection on the validation split."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ivlens.common.processes import hidden
from ivlens.models.backend import Backend
from ivlens.models.backends import backend_of
from ivlens.models.comparison import without_training
from ivlens.patching.residual import Edit, edit_effects
from ivlens.running.continuing import Reader
from ivlens.running.injection import POSITIONS, Injection
from ivlens.running.scores import measure
from ivlens.running.tokens import TokenizedPrompt, fill_right, tokenize
from ivlens.steering.compliance import Unsteered, balance, check_told, told_by, written
from ivlens.steering.controls import random_vector
from ivlens.steering.search import InjectionSearch
from ivlens.tasks.checks import passes
from ivlens.tasks.prompts import Prompt, build_prompts
from ivlens.tasks.task import Task
from ivlens.vectors.vector import InstructionVector

__all__ = ["layers_tried", "tune_injection"]

BAR = "trying layers and scales"
SCALES_OF_FREE = {"last": (1.0, 2.0, 4.0), **dict.fromkeys(("generated", "all"), (0.5, 0.75, 1.0, 1.5, 2.0))}


def tune_injection(
    model: Any,
    task: Task,
    vector: InstructionVector | Sequence[InstructionVector],
    *,
    layers: Sequence[int] | None = None,
    scales: Sequence[float] | None = None,
    goal: str = "induce",
    shots: int = 0,
    instruction: bool | str | int = False,
    style: str = "qa",
    template: Mapping[str, Any] | None = None,
    n_prompts: int | None = None,
    split: str = "valid",
    method: str = "auto",
    max_rows: int | None = None,
    positions: str | None = None,
    how: str | None = None,
    max_new_tokens: int = 40,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> InjectionSearch:
    """Try every layer and scale on validation prompts; all of them in one replay of each prompt's last token.

    At other positions each takes forward passes of its own. Where answers are free they are written, for every layer and scale, and
    the harmonic mean of `Evaluation.balance` decides.

    Parameters
    ----------
    model
        A hooked model, such as `load_model` gives.
    task
        The one that the vector is for.
    vector
        One, or several of which each is tried at its own layer (residual differences), whatever `layers` says.
    layers, scales
        Default: every layer; 0.5 to 4 times what the heads write (negative for `goal="suppress"`). Of free answers: five layers in
        the middle third, 0.5 to 2 times, while the answer is generated; five in the later half, 1 to 4 times, at the last prompt
        token. A warning says where the best stands at the edge, or is no better than no vector or a random one.
    goal
        `induce` the skill in prompts that don't ask for it, or `suppress` it in prompts that do.
    shots, instruction, style, template
        How the prompts look; see `build_prompts`. Of free answers, `instruction` is that of the told ones beside bare questions.
    n_prompts
        Prompts per task; None for the whole split.
    split
        `train`, `valid` or `test`: where the prompts' queries come from.
    method, max_rows
        How layers and scales are tried at the last prompt token, and in how much memory; see `head_effects`.
    positions
        Where the vector is added, as in `inject`, kept with the best vector; for a program that steers every token, `all`. Default:
        the vector's own, else `last`. Of free answers, both while the answer is generated and at the last prompt token only, of which
        the better is kept: what is decided word by word (a language) needs the former, what is decided as the answer begins (a title)
        the latter.
    how, max_new_tokens
        Of free answers: as in `inject`, kept with the best vector; and how long answers may be, in tokens.
    batch_size
        Prompts per forward pass; None for as many as there is room for. Halved where memory runs out. Of free answers, and at other
        positions than `last`.
    seed
        Of all that is drawn at random; global random states are left alone.
    progress
        Show a progress bar.
    """
    if task.is_checked:
        if (goal, method, max_rows) != ("induce", "auto", None):
            given = f"goal={goal!r}, method={method!r} and max_rows={max_rows}"
            raise ValueError(
                f"{given}: the answers of {task.name!r} are free, so vectors only induce, and are decoded; leave them out"
            )
        look = {"shots": shots, "style": style, "template": template, "seed": seed, "n": n_prompts, "split": split}
        asked = [build_prompts(task, **look, instruction=x) for x in (False, told_by(instruction))]
        lengths = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        search = _tune_free(model, asked, vector, layers, scales, positions, how, lengths, seed, progress)
        _warn(search)
        return search
    if how is not None:
        raise ValueError(f"how={how!r} is tried with free answers; where one answer is right, the vector is added")
    if goal not in ("induce", "suppress"):
        raise ValueError(f"goal={goal!r} is unknown; choose 'induce' or 'suppress'")
    backend = backend_of(model)
    layers, candidates = _placed(backend, vector, range(backend.n_layers) if layers is None else layers)
    for one in candidates:
        one.check_model(model)
    candidates, at = _acting_at(candidates, positions)
    sign = 1.0 if goal == "induce" else -1.0
    scales = tuple(sign * s for s in (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)) if scales is None else tuple(scales)
    look = {"shots": shots, "instruction": instruction, "style": style, "template": template, "seed": seed}
    prompts = build_prompts(task, n=n_prompts, split=split, **look)
    both = [(one, random_vector(one, seed=seed)) for one in candidates]
    tries = [{layer: scale * v.vector} for (layer, pair), scale in product(zip(layers, both), scales) for v in pair]
    rows, options = tokenize(backend, prompts), {"metric": "accuracy", "method": method, "max_rows": max_rows}
    with tqdm(total=len(prompts), desc=BAR, disable=hidden(progress)) as bar:
        if at == "last":
            values, baseline = edit_effects(backend, rows, [Edit(x) for x in tries], bar=bar, **options)
        else:
            values, baseline = _accuracies(backend, rows, [Injection(x, at) for x in tries], batch_size, bar)
    found = values.mean(0).unflatten(0, (len(layers), len(scales), 2))
    n = len({prompt.query for prompt in prompts})
    means = found[..., 0], found[..., 1], baseline.mean().item()
    search = InjectionSearch(candidates[0], *means, layers, scales, n, goal, candidates)
    _warn(search)
    return search


def layers_tried(n_layers: int, positions: str) -> Sequence[int]:
    """Where vectors of free answers are tried: at the last prompt token, in the later half; else, in the middle third."""
    if positions == "last":
        return range(n_layers // 2, n_layers - 1, max(n_layers // 10, 1))
    return range(n_layers // 3, 2 * n_layers // 3 + 1, max(n_layers // 12, 1))


def _acting_at(
    vectors: Sequence[InstructionVector], positions: str | None
) -> tuple[tuple[InstructionVector, ...], str]:
    """Where they act, all at the same positions, and the vectors that say so."""
    own = {v.metadata.get("positions", "last") for v in vectors}
    if positions is None and len(own) > 1:
        raise ValueError(f"the vectors act at {' and '.join(sorted(own))}; pass positions=")
    at = own.pop() if positions is None else positions
    if not isinstance(at, str) or at not in POSITIONS:
        raise ValueError(f"positions={at!r} is unknown; choose one of {', '.join(POSITIONS)}")
    kept = {} if positions is None else {"positions": at}
    return tuple(replace(v, metadata={**v.metadata, **kept}) for v in vectors), at


@without_training
@torch.inference_mode()
def _accuracies(
    backend: Backend,
    rows: Sequence[TokenizedPrompt],
    injections: Sequence[Injection],
    batch_size: int | None,
    bar: tqdm,
) -> tuple[Float[Tensor, "prompt injection"], Float[Tensor, " prompt"]]:
    """1 where the whole answer is ranked first, teacher-forced, under every injection, and under none."""
    reader, values = Reader(backend, rows), torch.empty(len(rows), len(injections) + 1)

    def work(index: list[int], tokens: Tensor, mask: Tensor) -> Tensor:
        plain, columns = reader.read(tokens, mask), []
        answers, counted = fill_right([rows[i].answer for i in index], backend.device)
        for injection in (*injections, None):
            logits = reader.runs(tokens, mask, plain, injection)().along(answers)
            columns.append(measure("accuracy", logits[:, None], answers, counted)[:, 0].cpu())
        return torch.stack(columns, dim=1)

    for index, found in reader.in_batches(batch_size, work, "trying", injections):
        values[index] = found
        bar.update(len(index))
    return values[:, :-1], values[:, -1]


def _placed(
    backend: Backend, vector: InstructionVector | Sequence[InstructionVector], layers: Sequence[int]
) -> tuple[tuple[int, ...], tuple[InstructionVector, ...]]:
    """Layers, and the vector to try at each; several vectors have their own, each another."""
    if isinstance(vector, InstructionVector):
        layers = tuple(backend.check_layer(x) for x in layers)
        return layers, (vector,) * len(layers)
    if not vector or any(v.layer is None for v in vector) or len({v.layer for v in vector}) < len(vector):
        raise ValueError(
            f"vector holds vectors of layers {[v.layer for v in vector]}; give one or more, each with a layer of its own"
        )
    return tuple(backend.check_layer(v.layer) for v in vector), tuple(vector)


def _tune_free(
    model: Any,
    asked: Sequence[Sequence[Prompt]],
    vector: InstructionVector | Sequence[InstructionVector],
    layers: Sequence[int] | None,
    scales: Sequence[float] | None,
    positions: str | None,
    how: str | None,
    lengths: Mapping[str, int],
    seed: int,
    progress: bool,
) -> InjectionSearch:
    if positions is not None and (not isinstance(positions, str) or positions not in SCALES_OF_FREE):
        raise ValueError(f"positions={positions!r} is unknown; choose one of {', '.join(SCALES_OF_FREE)}")
    backend, (bare, told) = backend_of(model), asked
    unsteered = Unsteered(backend, bare, **lengths)
    told_texts = written(backend, told, {0: None}, **lengths)[0]
    reached, nothing = map(_means, unsteered.scores(told_texts, unsteered.answers))
    check_told(reached, told[0].task)
    baseline = float(balance(nothing, reached)["balance"])

    def balanced(tries: Sequence[tuple[InstructionVector, int, float]]) -> list[float]:
        each = [Injection.of(backend, v, layer=layer, scale=scale) for v, layer, scale in tries]
        with tqdm(total=len(each) * len(bare), desc=BAR, leave=False, disable=hidden(progress)) as bar:
            texts = _all_at_once(backend, bare, each, lengths, bar)
        # Where nothing keeps to the constraint, the balance is 0 whatever else is scored.
        some = [i for i, x in enumerate(texts) if any(passes(p.query.check, text) for p, text in zip(bare, x))]
        scored = dict(zip(some, unsteered.scores(*(texts[i] for i in some)))) if some else {}
        reach = {i: float(balance(_means(scores), reached)["balance"]) for i, scores in scored.items()}
        return [reach.get(i, 0.0) for i in range(len(tries))]

    def search(positions: str) -> InjectionSearch:
        own = layers_tried(backend.n_layers, positions) if layers is None else layers
        places, candidates = _placed(backend, vector, own)
        chosen = {"positions": positions} | ({} if how is None else {"how": how})  # the best keeps them
        candidates = tuple(replace(v, metadata={**v.metadata, **chosen}) for v in candidates)
        sizes = tuple(SCALES_OF_FREE[positions] if scales is None else scales)
        tries = [(v, layer, scale) for v, layer in zip(candidates, places) for scale in sizes]
        found = torch.tensor(balanced(tries)).view(len(places), len(sizes))
        control = torch.full(found.shape, torch.nan)
        about = (len({prompt.query for prompt in bare}), "induce", candidates, "balance")
        result = InjectionSearch(candidates[0], found, control, baseline, places, sizes, *about)
        best = result.best
        at = (places.index(best.layer), sizes.index(best.scale))
        control[at] = balanced([(random_vector(best, seed=seed), best.layer, best.scale)])[0]
        return result

    searches = [search(at) for at in (("generated", "last") if positions is None else (positions,))]
    best = max(searches, key=lambda x: x.accuracy.max().item())
    return replace(best, others=tuple(x for x in searches if x is not best))


def _all_at_once(
    backend: Backend, prompts: Sequence[Prompt], injections: Sequence[Injection], lengths: Mapping[str, int], bar: tqdm
) -> list[list[str]]:
    """Answers under each injection, all at the same positions: where these only add, as the rows of one batch, each with its own."""
    if any(x.targets for x in injections):
        return [written(backend, prompts, {0: injection}, **lengths, bar=bar)[0] for injection in injections]
    nothing, n = torch.zeros(backend.d_model), len(prompts)
    additions = {
        layer: torch.stack([x.additions.get(layer, nothing) for x in injections]).repeat_interleave(n, dim=0)
        for layer in sorted({layer for x in injections for layer in x.additions})
    }
    texts = written(
        backend, [*prompts] * len(injections), {0: Injection(additions, injections[0].positions)}, **lengths, bar=bar
    )[0]
    return [texts[i : i + n] for i in range(0, len(texts), n)]


def _means(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in scores) / len(scores) for name in scores[0]}


def _warn(search: InjectionSearch) -> None:
    """Of a best that better ones may lie beyond, or that is none."""
    best, sign = search.best, 1 if search.goal == "induce" else -1
    layer, scale = at = search.layers.index(best.layer), search.scales.index(best.scale)
    row, sizes = [round(sign * x, 6) for x in search.accuracy[layer].tolist()], sorted(map(abs, search.scales))
    others = row[:scale] + row[scale + 1 :]
    if row[scale] <= round(sign * search.baseline, 6):
        said = f"nothing tried is better than no vector ({search!r}); try other heads, more scales, or mode='heads' in inject"
    elif row[scale] <= round(sign * search.control[at].item(), 6):
        said = f"the best tried is no better than a random vector of its length ({search!r}); try other heads"
    elif abs(best.scale) in (sizes[0], sizes[-1]) and row[scale] > max(others, default=row[scale]):
        said = f"the best scale stands at the edge of those tried ({search!r}); pass scales beyond it"
    else:
        return
    warnings.warn(said, stacklevel=3)
