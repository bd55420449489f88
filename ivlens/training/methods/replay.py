"""Experience replay."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ivlens.common.storage import read_json, write_json
from ivlens.training.methods.method import Method
from ivlens.training.methods.stage import Stage, sample_rows

if TYPE_CHECKING:
    import datasets

__all__ = ["Replay", "reservoir"]

KIND, FILE = "replay buffer", "buffer.json"


@dataclass(frozen=True)
class Replay(Method):
    """Experience replay: examples of earlier stages are trained on again, from a buffer filled by reservoir sampling (arXiv 1902.10486).

    They take the place of new ones, so that a stage costs what it costs without. The first stage has none.

    Attributes
    ----------
    share
        Fraction of the rows that comes from the buffer.
    size
        Examples that the buffer holds.
    """

    changes: ClassVar[frozenset[str]] = frozenset({"rows"})
    keeps: ClassVar[bool] = True
    share: float = 0.25
    size: int = 200

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or self.size < 1:
            raise ValueError(f"share={self.share} must be between 0 and 1, and size={self.size} at least 1")

    def data(self, stage: Stage) -> datasets.Dataset:
        import datasets

        path = stage.remembered(FILE)
        if path is None:
            return stage.dataset
        rng = random.Random(stage.seed)
        old = read_json(path, KIND)["rows"]
        n_old = round(self.share * len(stage.dataset))
        new = sample_rows(stage.dataset, len(stage.dataset) - n_old, stage.seed)
        rows = [*new, *(rng.choice(old) for _ in range(n_old))]
        rng.shuffle(rows)
        return datasets.Dataset.from_list(rows)

    def finish(self, stage: Stage) -> None:
        path = stage.remembered(FILE)
        kept = {"seen": 0, "rows": []} if path is None else read_json(path, KIND)
        distinct = {tuple(row["input_ids"]): row for row in stage.dataset}
        rows, seen = reservoir(kept["rows"], kept["seen"], list(distinct.values()), self.size, stage.seed)
        write_json(stage.memory(FILE), KIND, {"seen": seen, "rows": rows})


def reservoir(rows: list[Any], seen: int, new: list[Any], size: int, seed: int) -> tuple[list[Any], int]:
    """A uniform sample of everything seen so far, and how much that is (Vitter 1985, algorithm R).

    Examples
    --------
    >>> reservoir([1, 2], 2, [3], size=3, seed=0)
    ([1, 2, 3], 3)
    """
    rng = random.Random(f"{seed}/{seen}")
    rows = list(rows)
    for row in new:
        seen += 1
        if len(rows) < size:
            rows.append(row)
        elif (place := rng.randrange(seen)) < size:
            rows[place] = row
    return rows, seen
