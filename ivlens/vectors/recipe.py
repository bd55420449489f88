"""The code that makes a vector again, from what its metadata say."""

from __future__ import annotations

from typing import Any

__all__ = ["recipe"]

NEEDED = ("model", "task", "n_prompts", "way")
ASKED = ("shots", "instruction", "style", "template", "n_prompts", "only_correct", "seed")
PINNED = {"ivlens": "ivlens", "transformer_lens": "transformer-lens", "torch": "torch"}


def recipe(vector: Any) -> str:
    """Python that makes an `InstructionVector` again: versions, model, task, heads and every option."""
    about = vector.metadata
    if missing := [name for name in NEEDED if name not in about]:
        said = f"{vector.name!r} has no {', '.join(missing)} in its metadata"
        raise ValueError(f"{said}: it is a sum, or wasn't made by extract_vector; ask its parts for theirs")
    if "seed" not in about:
        raise ValueError(
            f"{vector.name!r} was made from a list of prompts, which its metadata don't hold; send them along"
        )
    pins = " ".join(f"{package}=={about[name].split('+')[0]}" for name, package in PINNED.items() if name in about)
    options = {name: about[name] for name in ASKED if name in about}
    options |= {"way": about["way"]} | ({} if vector.heads else {"layer": vector.layer})
    given = ", ".join(f"{name}={value!r}" for name, value in options.items())
    heads = f"[{', '.join(f'({h.layer}, {h.head})' for h in vector.heads)}]" if vector.heads else "None"
    kept = {name: about[name] for name in ("positions", "how") if name in about}
    return "\n".join(
        [
            f"# pip install {pins}",
            "from dataclasses import replace",
            "",
            "import ivlens as ivl",
            "",
            f"model = ivl.load_model({about['model']!r})",
            *_task(about["task"]),
            f"heads = {heads}",
            f"iv = ivl.extract_vector(model, task, heads, {given})",
            f"iv = replace(iv, layer={vector.layer!r}, scale={vector.scale!r}, metadata={{**iv.metadata, **{kept!r}}})",
            f"assert abs(iv.norm() / {vector.norm():.6g} - 1) < 1e-3, 'another vector: of another model, adapter, task or version'",
            "",
        ]
    )


def _task(name: str) -> list[str]:
    from ivlens.tasks.suite import load_tasks

    try:
        load_tasks(name)
    except KeyError:
        return [f"task = ivl.Task.from_file({name + '.jsonl'!r})  # your own: its records have to go along"]
    return [f"task = ivl.load_tasks({name!r})[{name!r}]"]
