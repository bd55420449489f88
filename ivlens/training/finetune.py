"""Fine-tuning on one task or several, one stage of a sequence at a time: `transformers.Trainer`, resumed where it stopped."""

from __future__ import annotations

import copy
import os
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ivlens.common.keys import files_key, recorded, weights_fingerprint
from ivlens.models.adapters import (
    add_adapter,
    check_reloads,
    check_stackable,
    describe_config,
    freeze_adapter,
    record_base,
)
from ivlens.models.checkpoints import FINAL, SAVED
from ivlens.models.hooking import check_in_memory, tokenizing_backend
from ivlens.models.loading import as_dtype, load_hf
from ivlens.models.precision import use_plain_attention
from ivlens.tasks.suite import as_suite
from ivlens.tasks.task import Task
from ivlens.training.data import rows_needed, training_rows
from ivlens.training.run import TrainingRun, keep_outcome, settled, usable_checkpoint
from ivlens.training.sharding import check_sharding, whole_weights
from ivlens.vectors.vector import InstructionVector

if TYPE_CHECKING:
    from peft import PeftConfig

    from ivlens.training.methods import Method

__all__ = ["fine_tune", "rows_needed", "training_rows"]


def fine_tune(
    model: Any,
    tasks: Task | Iterable[Task] | Mapping[str, Task],
    *,
    folder: str | Path,
    method: str | Method | Mapping[str, Any] | Sequence[Any] | None = None,
    vectors: Mapping[str, InstructionVector] | None = None,
    previous: TrainingRun | str | Path | None = None,
    steps: int = 100,
    batch_size: int = 8,
    learning_rate: float = 1e-4,
    lora: bool | PeftConfig = True,
    shots: int = 0,
    instruction: bool | str | int = True,
    style: str = "qa",
    template: Mapping[str, Any] | None = None,
    on_too_long: str = "error",
    save_every: int | None = None,
    tokenizer: Any = None,
    dtype: str | torch.dtype = "float32",
    seed: int = 0,
    progress: bool = True,
    **arguments: Any,
) -> TrainingRun:
    """Fine-tune on the training splits of tasks; the loss is on the answers' tokens and the end of text.

    Parameters
    ----------
    model
        A name or folder as for `load_model`, or a Hugging Face model (which is then trained in place).
    tasks
        A task, a list of tasks, or tasks by name, such as `load_tasks` gives.
    folder
        Where everything goes. Called again with the same settings, an interrupted run goes on from its last checkpoint,
        and a finished one is returned as it is.
    method
        A name in `ivlens.training.METHODS`, with options in brackets where it needs some, several with a + between them, or a
        `Method`; see `as_method`. Default: `iv` where there are vectors, else `lora`, which is plain.
    vectors
        The instruction vector of every task, for guided methods (see `IVTrainer`).
    previous
        The run this one goes on from, on the same base model: its adapter, and what its method keeps.
    steps, batch_size
        Optimizer steps, and rows in each, per process and accumulated part.
    learning_rate
        Constant unless `lr_scheduler_type` is given.
    lora
        True for rank 8, alpha 16, dropout 0.1 on the query and value projections (as in the code of arXiv 2502.11019), a
        peft config of your own, or False to train every weight.
    shots, instruction, style, template
        How the prompts look; see `build_prompts`. Each example gets a wording of its own.
    on_too_long
        `skip` leaves out rows that are longer than the context, with a warning that counts them.
    save_every
        Keep a checkpoint every so many steps; None for the final one only.
    tokenizer
        Of a model that is passed as an object; default: from where it came from.
    dtype
        Of the model's weights; adapters are trained in float32 whatever it is. With bfloat16 a step takes half the time or
        less, and half the memory.
    seed
        Of all that is drawn at random; global random states are left alone.
    progress
        Show a progress bar.
    arguments
        More of `transformers.TrainingArguments`: `bf16=True`, `gradient_accumulation_steps=4`, …

    Raises
    ------
    ValueError
        If a prompt with its answer is longer than the context (nothing is ever cut off), the folder holds another run, the
        method is unknown, or it needs a previous run by the same method.
    """
    from ivlens.training.methods import Stage, as_method

    suite, folder = as_suite(tasks, answered=["train"]), Path(folder)
    chosen = as_method(("lora" if vectors is None else "iv") if method is None else method)
    chosen.check(suite.names, vectors)
    if not isinstance(lora, bool):
        check_reloads(lora, "lora")
        if chosen.fresh:
            check_stackable(lora)
    before = _previous(previous, chosen, lora)
    hf_model, tokenizer, label = load_hf(model, tokenizer, as_dtype(dtype))
    check_in_memory(hf_model, label, "trained")
    look = {"shots": shots, "instruction": instruction, "style": style, "template": template, "seed": seed}
    n = rows_needed(steps, batch_size, arguments)
    backend = tokenizing_backend(hf_model, tokenizer, label)
    dataset = training_rows(backend, suite, n, look, on_too_long, teacher_shots=chosen.teacher_shots)
    rows = {name: list(dataset[name]) for name in dataset.column_names}
    settings = {"base": hf_model, "data": rows, "method": chosen, "weights": lora, "vectors": vectors, **look}
    settings |= {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "dtype": hf_model.dtype}
    settings |= {"save_every": save_every, "on_too_long": on_too_long}
    settings["previous"] = None if before is None else [files_key(before / name) for name in (FINAL, "memory")]
    fingerprint = weights_fingerprint(hf_model)
    shown = {
        "base": label,
        "base_fingerprint": fingerprint,
        "data": f"{len(dataset)} rows",
        "tasks": suite.names,
        "method": repr(chosen),
        "weights": "LoRA" if lora is True else "every weight" if lora is False else describe_config(lora),
        "dtype": str(hf_model.dtype).removeprefix("torch."),
        "vectors": None if vectors is None else sorted(vectors),
        "previous": None if before is None else str(before),
    }
    if settled(folder, recorded({**settings, **arguments}, shown)):
        return TrainingRun.load(folder)
    given = {"max_steps": steps, "per_device_train_batch_size": batch_size, "learning_rate": learning_rate}
    arguments = {**_defaults(save_every, seed, progress, steps), **given, **arguments}
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if isinstance(model, (str, Path)):
        use_plain_attention(hf_model)
    record = {} if lora is False else {"label": label, "fingerprint": fingerprint}
    with _random_state(seed):
        if lora is not False:
            hf_model = _with_lora(hf_model, lora, before, chosen.fresh, record)
        stage = Stage(hf_model, tokenizer, dataset, vectors, before, folder, seed, suite, look)
        trainer = _trainer(chosen, stage, arguments, record, before)
        check_sharding(trainer, chosen)
        resumed = usable_checkpoint(folder)
        start = time.perf_counter()
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        chosen.finish(stage)
        seconds = float("nan") if resumed else time.perf_counter() - start
    whole = whole_weights(trainer)
    if trainer.is_world_process_zero():
        below = before / FINAL if before and chosen.fresh else None
        keep_outcome(stage, trainer, below, record, seconds, whole)
    trainer.accelerator.wait_for_everyone()
    return TrainingRun.load(folder)


def _previous(previous: TrainingRun | str | Path | None, method: Method, lora: bool | PeftConfig) -> Path | None:
    """The folder of the run before, which must be finished, of the same adapter, and have left what the method needs."""
    if lora is False and (previous is not None or method.fresh):
        neither = f"lora=False goes neither with previous nor with {method!r}, which work on adapters"
        raise ValueError(f"{neither}; to go on training every weight, pass the run's `final` folder as the model")
    if previous is None:
        return None
    run = previous if isinstance(previous, TrainingRun) else TrainingRun.load(previous)
    if run.settings["weights"] == "every weight":
        there = f"{run.folder} trained every weight and has no adapter to go on with"
        raise ValueError(f"{there}; pass {run.final} as the model")
    trained_by = {part.split("(")[0] for part in run.settings["method"].split(" + ")}
    for name in (type(part).__name__ for part in method.parts if part.keeps):
        if name not in trained_by:
            there = f"{run.folder} kept nothing for {name} ({run.settings['method']} trained it)"
            raise ValueError(f"{there}; train the stages before with the same method")
    if not (method.fresh or lora is True or describe_config(lora) == run.settings["weights"]):
        there = (
            f"{run.folder} has an adapter of other settings ({run.settings['weights']}), which goes on being trained"
        )
        own = "take a method with an adapter of its own for every stage, such as fresh_lora"
        raise ValueError(f"{there}; leave lora out, or {own}")
    return run.folder


def _with_lora(
    hf_model: Any, lora: bool | PeftConfig, before: Path | None, fresh: bool, record: Mapping[str, str]
) -> Any:
    """The model with the adapter to train: the previous one, or a new one beside the previous one, which is frozen."""
    from peft import LoraConfig, get_peft_model

    if before is not None and not fresh:
        return add_adapter(hf_model, before / FINAL, trainable=True, **record)
    plain = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, task_type="CAUSAL_LM")
    # Query and value projections are peft's default where there are such.
    model = get_peft_model(hf_model, plain if lora is True else copy.deepcopy(lora))
    model.peft_config["default"].base_model_name_or_path = record["label"]
    if before is not None:
        add_adapter(model, before / FINAL, name="previous", **record)
        model.base_model.set_adapter(["default", "previous"])
        freeze_adapter(model, "previous")
        # Checkpoints are of the adapter in training, which is also the one that the Trainer loads when it goes on.
        model.save_pretrained = partial(model.save_pretrained, selected_adapters=["default"])
    return model


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
    method: Method, stage: Any, arguments: dict[str, Any], record: Mapping[str, str], before: Path | None
) -> Any:
    from transformers import TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from ivlens.training.methods.penalized import trainer as stage_trainer

    class Bar(ProgressCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if self.training_bar is not None and logs and "loss" in logs:
                self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.3f}")

    class Record(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if not state.is_world_process_zero:
                return
            saved = stage.folder / f"checkpoint-{state.global_step}"
            if record and not (method.fresh and before):  # a fresh adapter alone, without the earlier ones, is no model
                record_base(saved, **record)
            (saved / SAVED).touch()

    made = _on_own_device(TrainingArguments(output_dir=str(stage.folder), **arguments))
    common = {"args": made, "callbacks": [Record()]}
    trainer = stage_trainer(method, stage, processing_class=stage.tokenizer, **common)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if not arguments["disable_tqdm"]:
        trainer.add_callback(Bar())
    return trainer


def _on_own_device(arguments: Any) -> Any:
    """Of several processes that train alone, each stays on the GPU that it was given; transformers would take the first, or all."""
    device = torch.device(os.environ.get("ACCELERATE_TORCH_DEVICE", "cpu"))
    if device.type == "cuda":
        arguments.__dict__["_setup_devices"], arguments._n_gpu = device, 1
        torch.cuda.set_device(device)
    return arguments


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
