"""`ivlens checkup`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Exit, Option

import ivlens.cli.options as opt
from ivlens.cli.app import app
from ivlens.cli.common import print_table, read_tasks, readable_errors, report, say

if TYPE_CHECKING:
    from ivlens.dynamics import Checkup

_AFTER = "Adapter folder or hub id, a folder of `ivlens train`, or a model's folder or name"
_FAST = "Fewer skills and prompts, and no second look at free answers"
_TOLERANCE = "By how much a skill's accuracy may fall; 0.05 is five points"
_SHOTS = "Demonstrations in each prompt; default: 5, and 0 where answers are free"
_N_PROMPTS = "Test prompts per skill; default: 100, and 48 where answers are free; with --fast 50 and 20"
RULES = (
    "A skill fell where it lost more than the tolerance with the interval of its change clear of 0; these intervals hold for all skills "
    "together. It is overlaid where the base model's vector, on prompts that ask for nothing, still brings out at least half of what it "
    "brings out in the base model, gone where that is less and putting it back returns little too, unclear where that can't be told."
)


@app.command()
def checkup(
    base: Annotated[str, Argument(help="The model before: smollm2, a hub id or a folder")],
    after: Annotated[str, Argument(help=_AFTER)],
    task: opt.Tasks = None,
    group: opt.Group = None,
    file: opt.Files = None,
    instruction: opt.Instructions = None,
    fast: Annotated[bool, Option("--fast", help=_FAST)] = False,
    tolerance: Annotated[float, Option(help=_TOLERANCE)] = 0.05,
    shots: Annotated[int, Option("--shots", help=_SHOTS)] = 5,
    told: opt.ToldAtZero = None,
    style: opt.Style = None,
    n_prompts: Annotated[int | None, Option("--n-prompts", help=_N_PROMPTS)] = None,
    max_new_tokens: opt.Length = 40,
    seed: opt.Seed = 0,
    out: opt.Out = Path("checkup"),
) -> None:
    """What a fine-tune cost, and whether it is gone. Exit status 2 where a skill fell, 0 where none did."""
    with readable_errors():
        from ivlens.dynamics import checkup as look

        suite = read_tasks(task, file, instruction, group) if task or group or file else None
        options = {"instruction": shots == 0 if told is None else told, "style": style, "seed": seed, "fast": fast}
        options |= {"tolerance": tolerance, "shots": shots, "n_prompts": n_prompts, "max_new_tokens": max_new_tokens}
        found = look(base, after, suite, folder=out, **options)
        _report(found, out)
    print_table(found.table(), f"{base} → {after}")
    for line in found.advice():
        say(f"\n{line}")
    say(
        f"\nBy more than {found.tolerance:.0%}: {found.summary}. Wrote {out / 'checkup.json'} and {out / 'report.html'}"
    )
    raise Exit(found.exit_status)


def _report(found: Checkup, out: Path) -> None:
    from ivlens.report import Section

    sections = [Section("Skills before and after", RULES, [found.plot(), found.table()])]
    if found.fell:
        sections.append(Section("What to do", "", found.advice()))
    for skill in found.fell:
        if len(turned := found.turned(skill)):
            text = "The first that were right before and are wrong now."
            sections.append(Section(f"Answers: {skill}", text, [turned]))
    if len(found.heads):
        text = "Of each head behind the vector, the share of its old output that it still writes, along that: 1 as before, 0 nothing."
        sections.append(Section("Heads", text, [found.heads]))
    about = {key: value for key, value in found.metadata.items() if key != "skills"}
    report(out, "Checkup", [*sections, Section("All numbers", "", [found.to_dataframe()])], about)
