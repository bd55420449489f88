"""`ivlens train | compare | track`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

import ivlens.cli.options as opt
from ivlens.cli.app import app
from ivlens.cli.common import (
    load,
    look,
    print_table,
    read_tasks,
    readable_errors,
    report,
    say,
    vector_folders,
    with_answers,
)

if TYPE_CHECKING:
    from ivlens.dynamics import Change, Recovery
    from ivlens.tasks.suite import TaskSuite

_HEADS = "effects.safetensors of `ivlens locate`; default: located now"
Heads = Annotated[Path | None, Option("--heads", help=_HEADS)]
Top = Annotated[int, Option("--top", help="How many heads make a vector")]
NPrompts = Annotated[int, Option("--n-prompts", help="Test prompts per task")]
_METHODS = "By name (lora, iv, averaging, …), with options in brackets, or a sum of several; default: lora, or iv"


@app.command()
def train(
    task: Annotated[list[str] | None, Argument(help="Built-in tasks to train on")] = None,
    model: opt.Model = "smollm2",
    group: opt.Group = None,
    file: opt.Files = None,
    instruction: opt.Instructions = None,
    steps: Annotated[int, Option()] = 100,
    batch_size: Annotated[int, Option()] = 8,
    learning_rate: Annotated[float, Option("--lr")] = 1e-4,
    full: Annotated[bool, Option("--full", help="Train every weight instead of LoRA adapters")] = False,
    shots: opt.Shots0 = None,
    told: opt.Told = None,
    style: opt.Style = None,
    save_every: Annotated[int | None, Option(help="Keep a checkpoint every so many steps")] = None,
    method: Annotated[str | None, Option(help=_METHODS)] = None,
    vectors: Annotated[Path | None, Option(help="Folder of `ivlens extract`: guide training by these")] = None,
    previous: Annotated[Path | None, Option(help="Folder of the run to go on from")] = None,
    seed: opt.Seed = 0,
    out: opt.Out = Path("trained"),
) -> None:
    """Fine-tune on a task. An interrupted run goes on where it stopped."""
    with readable_errors():
        from ivlens.report import Section
        from ivlens.training import fine_tune
        from ivlens.vectors.vector import InstructionVector

        if not task and not group and not file:
            raise ValueError("name a task to train on, or give --file; `ivlens tasks` lists the built-in ones")
        suite = read_tasks(task, file, instruction, group)
        folders = {} if vectors is None else vector_folders(vectors, suite)
        loaded = {name: InstructionVector.load(path) for name, path in folders.items()} or None
        options = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "lora": not full}
        options |= {**look(suite, shots, told, style, 0, tell=True), "save_every": save_every, "seed": seed}
        if not all(x.output for one in suite.values() for x in one.train):
            suite = with_answers(load(model, "auto"), suite, str(options["style"]), ("train",))
        run = fine_tune(model, suite, folder=out, method=method, vectors=loaded, previous=previous, **options)
        report(out, "Fine-tuning", [Section("Loss", repr(run), [run.plot()])], run.settings)
    print_table(run.to_dataframe()[["step", "loss"]], "Loss on answer tokens (nats)")
    what = "" if full else f"--model {model} --adapter "
    say(f"Wrote {run.final} and {out / 'report.html'}")
    say(f"Compare it: ivlens compare {run.final} (or locate {what}{run.final})")


@app.command()
def compare(
    after: Annotated[str, Argument(help="Adapter folder, or a model's folder or name")],
    model: opt.Model = "smollm2",
    task: opt.Tasks = None,
    group: opt.Group = None,
    file: opt.Files = None,
    instruction: opt.Instructions = None,
    heads: Heads = None,
    top: Top = 10,
    shots: opt.Shots5 = None,
    told: opt.ToldAtZero = None,
    style: opt.Style = None,
    n_prompts: NPrompts = 100,
    n_effects: Annotated[int, Option(help="Prompts per task to locate heads on, before and after; 0 for not")] = 8,
    recover: Annotated[bool, Option(help="Put the old vectors back")] = True,
    seed: opt.Seed = 0,
    out: opt.Out = Path("compared"),
) -> None:
    """Instruction vectors before and after training, and putting the old ones back."""
    options, asked = {"seed": seed, "n_prompts": n_prompts}, (shots, told, style)
    tasks = (task, file, instruction, group)
    _study([after], model, tasks, asked, (heads, top), options, n_effects, recover, out, "compare")


@app.command()
def track(
    checkpoints: Annotated[list[str], Argument(help="A folder of `ivlens train`, or adapter or model folders")],
    model: opt.Model = "smollm2",
    task: opt.Tasks = None,
    group: opt.Group = None,
    file: opt.Files = None,
    instruction: opt.Instructions = None,
    heads: Heads = None,
    top: Top = 10,
    shots: opt.Shots5 = None,
    told: opt.ToldAtZero = None,
    style: opt.Style = None,
    n_prompts: NPrompts = 100,
    n_effects: Annotated[int, Option(help="Prompts per task to locate heads on at every checkpoint")] = 0,
    recover: Annotated[bool, Option(help="Put the old vectors back at every checkpoint")] = False,
    seed: opt.Seed = 0,
    out: opt.Out = Path("tracked"),
) -> None:
    """Instruction vectors and accuracy along training. An interrupted run goes on where it stopped."""
    options, asked = {"seed": seed, "n_prompts": n_prompts}, (shots, told, style)
    tasks = (task, file, instruction, group)
    _study(checkpoints, model, tasks, asked, (heads, top), options, n_effects, recover, out, "track")


def _study(
    checkpoints: list[str],
    model: str,
    tasks: tuple[list[str] | None, list[Path] | None, list[str] | None, str | None],
    asked: tuple[int | None, bool | None, str | None],
    heads: tuple[Path | None, int],
    options: dict[str, Any],
    n_effects: int,
    recovering: bool,
    out: Path,
    kind: str,
) -> None:
    """Heads and vectors of the base, every checkpoint beside it, and what the old vectors bring back."""
    with readable_errors():
        from ivlens.dynamics import recover, track

        suite = read_tasks(*tasks)
        options |= look(suite, *asked, default=5)
        base = load(model, "bridge")
        suite = with_answers(base, suite, options["style"], ("train", "valid", "test"), out / "partial")
        chosen, vectors = _of_base(base, suite, heads, options, out)
        change = track(checkpoints, suite, chosen, model=model, n_effects=n_effects, folder=out / "change", **options)
        recovery = None
        if recovering:
            recovery = recover(checkpoints, suite, vectors, model=model, folder=out / "recovery", **options)
        _report(change, recovery, _knowledge(checkpoints, model, suite, options), kind, out)
    columns = ["checkpoint", "task", "accuracy", "low", "high", "iv_similarity", "hidden_similarity", "weight_distance"]
    print_table(change.to_dataframe()[columns], "Accuracy and similarity to the base model's vectors")
    if recovery is not None:
        print_table(recovery.shares(), "Share of the lost accuracy returned")
    say(f"Wrote {out / 'report.html'}")


def _of_base(model: Any, suite: TaskSuite, heads: tuple[Path | None, int], options: dict[str, Any], out: Path) -> Any:
    """The base model's instruction heads and vectors."""
    from ivlens.common.keys import key
    from ivlens.common.storage import kept
    from ivlens.patching import HeadEffects, locate_heads
    from ivlens.vectors.extraction import extract_vector
    from ivlens.vectors.files import FILE
    from ivlens.vectors.vector import InstructionVector

    asked = {key: value for key, value in options.items() if key != "n_prompts"}
    if heads[0] is None:
        kind = "shuffled_labels" if asked["shots"] >= 2 else "no_instruction"
        look_for = {"n_prompts": 10, "n_mean": 30, "counterfactual": kind, "folder": out / "partial"}
        effects = locate_heads(model, suite, **look_for, **asked)
        effects.save(out / "effects.safetensors")
    else:
        effects = HeadEffects.load(heads[0])
    chosen, vectors = effects.top(heads[1]), {}
    for name, task in suite.items():
        make = partial(extract_vector, model, task, chosen, n_prompts=30, **asked)
        path = out / "partial" / key(model, task, chosen, asked) / FILE
        vectors[name] = kept(path, make, InstructionVector.load, lambda at, vector: vector.save(at.parent))
    return chosen, vectors


def _knowledge(checkpoints: list[str], model: str, suite: TaskSuite, options: dict[str, Any]) -> list[Any]:
    """Knowledge and instruction probabilities at the base and every checkpoint, of the tasks that have a content answer."""
    from ivlens.dynamics.probabilities import answer_probabilities
    from ivlens.models.checkpoints import open_checkpoints

    able = [name for name, task in suite.items() if all(x.question and x.content for x in task.test)]
    size, found = {key: options[key] for key in ("n_prompts", "seed")}, []
    for checkpoint in open_checkpoints(model, checkpoints)[0] if able else ():
        with checkpoint.use() as hooked:
            found.append(answer_probabilities(hooked, suite.subset(able), **size))
    return found


def _report(change: Change, recovery: Recovery | None, probabilities: list[Any], kind: str, out: Path) -> None:
    from ivlens.dynamics.probabilities import compare_probabilities
    from ivlens.plots import plot_probabilities
    from ivlens.report import Section

    kinds = ["tasks", "matrix", "hidden", *(["trajectory"] if kind == "track" else []), "scatter"]
    kinds += ["effects"] if change.base.effects is not None else []
    text = "Over every task and checkpoint; the distance of the weights, which knows nothing of tasks, is the baseline."
    sections = [
        Section("What changed", repr(change), [change.plot(k) for k in kinds]),
        Section("Does similarity tell what is lost?", text, [change.correlations()]),
    ]
    if probabilities:
        before, after = probabilities[0], probabilities[-1]
        items = [plot_probabilities(before, after), compare_probabilities(before, after)]
        sections.append(Section("Knowing the answer, and giving it as asked", "At the last checkpoint.", items))
    if recovery is not None:
        items = [recovery.plot(), recovery.shares(), recovery.to_dataframe()]
        text = "Layer and scale from the validation split, accuracy on the test split; a share counts where validation lost."
        sections.append(Section("Putting the old vectors back", text, items))
    sections.append(Section("All numbers", "", [change.to_dataframe()]))
    title = "Before and after fine-tuning" if kind == "compare" else "Along fine-tuning"
    report(out, title, sections, change.metadata)
