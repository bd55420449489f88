"""What servers on vLLM are asked for: transformer_lens's interventions, and EasySteer's steering specification."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from ivlens.common.storage import write_text
from ivlens.vectors.control_vector import write_control_vector

__all__ = ["Step", "added", "write_easysteer", "write_interventions"]

# Our positions in EasySteer's words (its api.py of August 2026): a phase that isn't named is left alone.
APPLY: dict[str | int, dict[str, Any]] = {
    "last": {"prompt_positions": [-1]},
    "generated": {"prompt_positions": [-1], "generation": "all"},
    "all": {"prompt": "all", "generation": "all"},
}


class Step(NamedTuple):
    """What happens after a layer: a vector is added, or where there is a target, the projection on it is set to that."""

    layer: int
    positions: str | int
    vector: Float[Tensor, " d_model"]
    target: float | None = None


def added(steps: Sequence[Step]) -> dict[int, Float[Tensor, " d_model"]]:
    """What they add after each layer together."""
    total: dict[int, Tensor] = {}
    for step in steps:
        total[step.layer] = total[step.layer] + step.vector if step.layer in total else step.vector
    return total


def write_interventions(path: Path, steps: Sequence[Step]) -> None:
    """For `intervene=` of a model that `boot_vllm` of transformer_lens loaded."""
    where = {"pos": steps[0].positions} if isinstance(steps[0].positions, int) else {}
    found = {f"blocks.{n}.hook_out": {"op": "add", "value": v.tolist(), **where} for n, v in added(steps).items()}
    write_text(path, json.dumps(found, indent=1) + "\n")


def write_easysteer(path: Path, steps: Sequence[Step], architecture: str) -> None:
    """`steering.json`, and the files of directions that it names. Steps that add one after another at like positions share one."""
    parts: list[tuple[str, Step]] = []
    for step in steps:
        if step.target is None:
            parts.append(("direct", step))
        else:  # the projection on u taken away, then target · u added
            unit = step.vector / step.vector.norm()
            parts += [("erase", step._replace(vector=unit)), ("direct", step._replace(vector=step.target * unit))]
    specs: list[dict[str, Any]] = []
    path.mkdir(parents=True, exist_ok=True)
    for (algorithm, positions), some in groupby(parts, key=lambda part: (part[0], part[1].positions)):
        directions, source = added([step for _, step in some]), path.resolve() / f"directions-{len(specs)}.gguf"
        write_control_vector(source, directions, architecture)
        spec = {"source": str(source), "algorithm": algorithm, "scale": 1.0, "layers": sorted(directions)}
        specs.append({**spec, "apply": APPLY[positions]})
    # Sequential: by default only the first of several vectors acts at a position.
    write_text(path / "steering.json", json.dumps({"vectors": specs, "conflict": "sequential"}, indent=1) + "\n")
