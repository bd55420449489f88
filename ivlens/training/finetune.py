"""Plain fine-tuning on one task or several: `transformers.Trainer`, LoRA by peft or every weight, resumed where it stopped."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ivlens.models.adapters import record_base
from ivlens.models.backends import weights_fingerprint
from ivlens.models.checkpoints import FINAL, SETTINGS, checkpoints_in
from ivlens.models.loading import load_hf, tokenizing_backend
from ivlens.prompts import build_prompts
from ivlens.tasks.suite import as_suite
from ivlens.tasks.task import Task
from ivlens.training.data import IGNORED, answer_dataset
from ivlens.training.guidance import Guidance
from ivlens.vectors import InstructionVector

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from peft import PeftConfig

__all__ = ["TrainingRun", "fine_tune"]

LOG = "log.json"


@dataclass(frozen=True)
class TrainingRun:
    """A finished training run in its folder.

    Attributes
    ----------
    log
        One entry per logged step: `step`, `loss` (mean over answer tokens, nats), `learning_rate`, …
    """

    folder: Path
    settings: Mapping[str, Any]
    log: list[dict[str, float]]

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
        """A finished run from its folder."""
        folder = Path(folder)
        if not (folder / LOG).is_file():
            raise FileNotFoundError(
                f"{folder} holds no finished training run; call fine_tune with this folder to go on"
            )
        read = {name: json.loads((folder / name).read_text(encoding="utf-8")) for name in (SETTINGS, LOG)}
        return cls(folder, read[SETTINGS], read[LOG])

    def to_dataframe(self) -> pd.DataFrame:
        """One row per logged step."""
        import pandas as pd

        return pd.DataFrame(self.log)

    def plot(self) -> go.Figure:
        """Loss over steps."""
        from ivlens.plots import plot_loss

        return plot_loss(self)

    def __repr__(self) -> str:
        s = self.settings
        losses = [f"{self.log[i]['loss']:.3f}" for i in (0, -1)] if self.log else ["?", "?"]
        kept = len(self.checkpoints)
        return (
            f"TrainingRun({', '.join(s['tasks'])} on {s['base']}, {s['method']}, {s['steps']} steps of {s['batch_size']}, "
            f"loss {losses[0]} → {losses[1]}, {kept} checkpoint{'s' if kept > 1 else ''} in {self.folder})"
        )


def fine_tune(
    model: Any,
    tasks: Task | Iterable[Task] | Mapping[str, Task],
    *,
    folder: str | Path,
    steps: int = 100,
    batch_size: int = 8,
    learning_rate: float = 1e-4,
    lora: bool | PeftConfig = True,
    shots: int = 0,
    instruction: bool | str | int = True,
    style: str = "qa",
    save_every: int | None = None,
    vectors: Mapping[str, InstructionVector] | None = None,
    guidance: str | Guidance = "paper",
    tokenizer: Any = None,
    seed: int = 0,
    progress: bool = True,
    **arguments: Any,
) -> TrainingRun:
    """Fine-tune on the training splits of tasks; the loss is on the answers' tokens and the end of text.

    Parameters
    ----------
    model
        A name or folder as for `load_model`, or a Hugging Face model (which is then trained in place).
    folder
        Where everything goes. Called again with the same settings, an interrupted run goes on from its last checkpoint,
        and a finished one is returned as it is.
    lora
        True for rank 8, alpha 16, dropout 0.1 on the query and value projections (as in the code of arXiv 2502.11019), a
        peft config of your own, or False to train every weight.
    shots, instruction, style
        How the prompts look; see `build_prompts`. Each example gets a wording of its own.
    save_every
        Keep a checkpoint every so many steps; None for the final one only.
    vectors, guidance
        With a vector for every task, training is guided by them (see `IVTrainer`), so that less is forgotten; without, plain.
    arguments
        More of `transformers.TrainingArguments`: `bf16=True`, `gradient_accumulation_steps=4`, …

    Raises
    ------
    ValueError
        If a prompt with its answer is longer than the context (nothing is ever cut off), or the folder holds another run.
    """
    suite, folder = as_suite(tasks), Path(folder)
    hf_model, tokenizer, label = load_hf(model, tokenizer, torch.float32)
    settings = {
        "base": label,
        "base_fingerprint": weights_fingerprint(hf_model),
        "tasks": suite.names,
        "method": "LoRA" if lora is True else "every weight" if lora is False else repr(lora),
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "shots": shots,
        "instruction": instruction,
        "style": style,
        "seed": seed,
        **({} if vectors is None else {"guidance": repr(guidance), "vectors": _digest(vectors)}),
        **{key: str(value) for key, value in arguments.items()},
    }
    if _settled(folder, settings):
        return TrainingRun.load(folder)
    n = steps * batch_size * int(arguments.get("gradient_accumulation_steps", 1))
    options: dict[str, Any] = {"shots": shots, "instruction": instruction, "style": style, "seed": seed}
    prompts = [p for task in suite.values() for p in build_prompts(task, n=-(-n // len(suite)), **options)]
    dataset = answer_dataset(tokenizing_backend(hf_model, tokenizer, label), prompts)
    arguments = {
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "learning_rate": learning_rate,
        **arguments,
    }
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    with _random_state(seed):
        if lora is not False:
            hf_model = _with_lora(hf_model, lora, label)
        record = {} if lora is False else {"label": label, "fingerprint": settings["base_fingerprint"]}
        guided = {} if vectors is None else {"vectors": vectors, "guidance": guidance}
        defaults = _defaults(save_every, seed, progress, steps)
        trainer = _trainer(hf_model, tokenizer, dataset, folder, {**defaults, **arguments}, record, guided)
        done = checkpoints_in(folder)
        trainer.train(resume_from_checkpoint=str(done[-1]) if done else None)
    _save(hf_model, tokenizer, folder / FINAL, record)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    (folder / LOG).write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    return TrainingRun.load(folder)


def _settled(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether this run is finished already. Notes its settings if it is new."""
    path = folder / SETTINGS
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        differing = [key for key in {**known, **settings} if known.get(key) != settings.get(key)]
        if differing:
            what = ", ".join(f"{key}: {known.get(key)!r} there, {settings.get(key)!r} now" for key in differing)
            raise ValueError(f"{folder} holds another training run ({what}); choose another folder or remove that one")
        return (folder / LOG).is_file()
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return False


def _with_lora(hf_model: Any, lora: bool | PeftConfig, label: str) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, task_type="CAUSAL_LM") if lora is True else lora
    model = get_peft_model(hf_model, config)  # query and value projections are peft's default where there are such
    model.peft_config["default"].base_model_name_or_path = label
    return model


def _digest(vectors: Mapping[str, InstructionVector]) -> str:
    """Tells other vectors apart."""
    digest = hashlib.sha256()
    for name, vector in sorted(vectors.items()):
        digest.update(f"{name} {vector.layer} {vector.scale}".encode() + vector.vector.float().numpy().tobytes())
    return digest.hexdigest()[:16]


def _defaults(save_every: int | None, seed: int, progress: bool, steps: int) -> dict[str, Any]:
    """What `TrainingArguments` start from."""
    return {
        "lr_scheduler_type": "constant",
        "logging_steps": max(1, min(10, steps // 10)),
        "report_to": "none",
        "remove_unused_columns": False,
        "save_strategy": "no" if save_every is None else "steps",
        "save_steps": save_every or 500,
        "disable_tqdm": not progress,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": seed,
    }


def _trainer(
    hf_model: Any,
    tokenizer: Any,
    dataset: Any,
    folder: Path,
    arguments: dict[str, Any],
    record: dict[str, str],
    guided: dict[str, Any],
) -> Any:
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    class Bar(ProgressCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if self.training_bar is not None and logs and "loss" in logs:
                self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.3f}")

    class Record(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if record and state.is_world_process_zero:
                record_base(folder / f"checkpoint-{state.global_step}", **record)

    common: dict[str, Any] = {
        "args": TrainingArguments(output_dir=str(folder), **arguments),
        "processing_class": tokenizer,
        "callbacks": [Record()],
    }
    if guided:
        from ivlens.training.trainer import IVTrainer

        trainer: Trainer = IVTrainer(hf_model, train_dataset=dataset, **guided, **common)
    else:
        collator = DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=IGNORED)
        trainer = Trainer(hf_model, train_dataset=dataset.remove_columns("task"), data_collator=collator, **common)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if not arguments["disable_tqdm"]:
        trainer.add_callback(Bar())
    return trainer


def _save(hf_model: Any, tokenizer: Any, folder: Path, record: dict[str, str]) -> None:
    hf_model.save_pretrained(folder)
    if record:
        record_base(folder, **record)
    else:
        tokenizer.save_pretrained(folder)


@contextmanager
def _random_state(seed: int) -> Iterator[None]:
    """Seeded inside, as before afterwards: the Trainer sets the global seeds."""
    import numpy as np

    kept = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])
