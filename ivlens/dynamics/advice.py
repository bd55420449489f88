"""What to do about skills that a fine-tune cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ivlens.common.statistics import bootstrap_difference
from ivlens.dynamics.recovery import AFTER, BEFORE, OLD, RANDOM

if TYPE_CHECKING:
    from ivlens.dynamics.diagnosis import Checkup

__all__ = ["advice"]


def advice(found: Checkup) -> list[str]:
    """A paragraph each: put a vector back where that was measured to help, else train again; nothing where nothing fell."""
    if not found.fell:
        return []
    table = found.to_dataframe().set_index("skill")
    helps = [skill for skill in found.fell if _helps(found, skill)]
    told = [_put_back(found, skill, table.loc[skill]) for skill in helps]
    for skill in found.fell:
        row, why = table.loc[skill], found.metadata["skills"][skill].get("not_looked_at", "")
        if skill not in helps and not why and row["verdict"] == "overlaid":
            told.append(
                f"{skill}: overlaid, but adding its old vector to prompts that ask for it doesn't help ({row['after']:.0%} → "
                f"{row['put_back']:.0%}); it works on prompts that ask for nothing."
            )
        elif row["verdict"] == "unclear" and skill not in helps:
            told.append(
                f"{skill}: {why or 'its vector tells too little in the base model, or between half and nothing'}."
            )
    rest = [skill for skill in found.fell if skill not in helps]
    base = found.metadata.get("before", "smollm2")
    whom = f"For {', '.join(rest)}" if rest and helps else "To lose less"
    told.append(
        f"{whom}: train again with model averaging, `ivlens train --file YOUR.jsonl --model {base} --method averaging`, or guided, "
        f"`ivlens train --file YOUR.jsonl --model {base} --method iv --vectors vectors`, where the new task's vector does "
        "much of it in the base model."
    )
    return told


def _helps(found: Checkup, skill: str) -> bool:
    """Whether the old vector beside the request is better than nothing, and than a random one, both intervals clear of 0."""
    old, queries = found.hits(skill, AFTER, True, OLD)
    others = [found.hits(skill, AFTER, True, added)[0] for added in ("", RANDOM)]
    if not len(old):
        return False
    return all(bootstrap_difference([np.subtract(old, other)], [queries])[0] > 0 for other in others)


def _put_back(found: Checkup, skill: str, row: object) -> str:
    before, after = (found.metadata.get(name) for name in (BEFORE, AFTER))
    adapter = f"{before!r}, adapter={after!r}" if found.metadata.get("adapter") else repr(after)
    vector = found.metadata["skills"][skill].get("vector") or "FOLDER OF ITS VECTOR"
    change = f"{row['before']:.0%} before, {row['after']:.0%} after, {row['put_back']:.0%} with it"
    return (
        f"{skill}: put its old vector back ({change}): model = ivl.load_model({adapter}); iv = ivl.InstructionVector.load({vector!r}); "
        "with iv.inject(model): …"
    )
