"""`TrainingRun`: a fine-tuning run in its folder, finished or not."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from ivlens.common.keys import differences
from ivlens.common.storage import write_text
from ivlens.common.tables import table_html
from ivlens.models.adapters import record_base, stack_adapters
from ivlens.models.checkpoints import FINAL, SETTINGS, checkpoints_in

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from ivlens.training.methods import Stage

__all__ = ["LOG", "TrainingRun", "keep_outcome", "settled", "usable_checkpoint"]

LOG = "log.json"
WRITTEN = ("checkpoint-*", FINAL, f"{FINAL}.partial", "memory", LOG, "teacher-*.safetensors")  # in a run's folder


@dataclass(frozen=True)
class TrainingRun:
    """A finished training run in its folder.

    Attributes
    ----------
    folder
        Where everything of it lies.
    settings
        What it was trained with: `base`, `tasks`, `method`, `steps`, `batch_size`, …
    log
        One entry per logged step: `step`, `loss` (mean over answer tokens, nats), `learning_rate`, …
    cost
        `seconds` of training and of what the method does after it (NaN for a run that was interrupted), `teacher_seconds` of
        them before the first step, `trainable` weights, `kept_mb` on disk for the next stage, `peak_mb` of memory (of the GPU,
        else of the process).
    """

    folder: Path
    settings: Mapping[str, Any]
    log: list[dict[str, float]]
    cost: Mapping[str, float]

    @property
    def final(self) -> Path:
        """The adapter, or with full fine-tuning the model, after the last step: `load_model(base, adapter=run.final)`."""
        return self.folder / FINAL

    @property
    def checkpoints(self) -> list[Path]:
        """What was kept on the way, by steps, and the final one."""
        return [*checkpoints_in(self.folder), self.final]

    @classmethod
    def load(cls, folder: str | Path) -> TrainingRun:
        """A finished run from its `folder`."""
        folder = Path(folder)
        if not (folder / LOG).is_file():
            raise FileNotFoundError(
                f"{folder} holds no finished training run; to go on, call fine_tune with this folder"
            )
        settings, done = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (SETTINGS, LOG))
        settings.pop("keys", None)
        return cls(folder, settings, done["log"], done["cost"])

    def to_dataframe(self) -> pd.DataFrame:
        """One row per logged step."""
        return pd.DataFrame(self.log)

    def plot(self) -> go.Figure:
        """Loss over steps."""
        from ivlens.plots import plot_loss

        return plot_loss(self)

    def __repr__(self) -> str:
        s = self.settings
        losses = [f"{self.log[i]['loss']:.3f}" for i in (0, -1)] if self.log else ["?", "?"]
        weights = "" if s["weights"] == "LoRA" else f" on {s['weights']}"
        what = (
            f"{', '.join(s['tasks'])} on {s['base']}, {s['method']}{weights}, {s['steps']} steps of {s['batch_size']}"
        )
        kept = f"{len(self.checkpoints)} checkpoint{'s' if len(self.checkpoints) > 1 else ''} in {self.folder}"
        return f"TrainingRun({what}, loss {losses[0]} → {losses[1]}, {kept})"

    def _repr_html_(self) -> str:
        return table_html(self.to_dataframe(), title=repr(self), index=False)


def settled(folder: Path, record: dict[str, Any]) -> bool:
    """Whether the run with this record (see `ivlens.common.keys.recorded`) is finished already. Notes it where it is new.

    ValueError if the folder holds another run, or files that a run would write but that aren't known to be one's.
    """
    path = folder / SETTINGS
    if path.is_file():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            known = {}
        if "keys" not in known:
            raise ValueError(f"{path} isn't a run's of this version of ivlens; choose another folder")
        if what := differences(known, record):
            raise ValueError(f"{folder} holds another training run ({what}); choose another folder or remove that one")
        return (folder / LOG).is_file()
    if foreign := sorted(p.name for pattern in WRITTEN for p in folder.glob(pattern)):
        raise ValueError(f"{folder} holds {', '.join(foreign)}, which ivlens didn't write there; choose another folder")
    write_text(path, json.dumps(record, indent=1) + "\n")
    return False


def usable_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end."""
    return next(reversed(checkpoints_in(folder)), None)


def keep_outcome(
    stage: Stage,
    trainer: Any,
    below: Path | None,
    record: Mapping[str, str],
    seconds: float,
    weights: dict[str, Tensor] | None,
) -> None:
    """The model after the last step, with the adapters below it stacked into one (in place only once it is whole); log, cost.

    `weights` are its own, where processes have parts of them.
    """
    unfinished = stage.folder / f"{FINAL}.partial"
    shutil.rmtree(unfinished, ignore_errors=True)
    stage.model.save_pretrained(unfinished, **({} if weights is None else {"state_dict": weights}))
    if record:
        record_base(unfinished, **record)
    else:
        stage.tokenizer.save_pretrained(unfinished)
    if below is not None:
        stack_adapters(below, unfinished)
    shutil.rmtree(stage.folder / FINAL, ignore_errors=True)
    unfinished.rename(stage.folder / FINAL)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    kept = [p for p in (stage.folder / "memory").rglob("*") if p.is_file()]
    cost = {
        "seconds": seconds,
        "teacher_seconds": getattr(trainer, "teacher_seconds", 0.0),
        "trainable": sum(p.numel() for p in stage.model.parameters() if p.requires_grad),
        "kept_mb": sum(p.stat().st_size for p in kept) / 1e6,
        "peak_mb": _peak() / 1e6,
    }
    write_text(stage.folder / LOG, json.dumps({"log": log, "cost": cost}, indent=1) + "\n")


def _peak() -> float:
    """Bytes of memory in use at most: of the GPU, else of the process; NaN where the system doesn't say."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource  # not on Windows
    except ImportError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
