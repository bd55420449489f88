"""The command line on a tiny model: every command writes its folder, and errors are readable."""

import inspect
import json
import os
import subprocess
import sys

import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

import ivlens as ivl
from ivlens.cli import app, common, steer
from ivlens.continual import ContinualResults
from tests import tiny

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A local model folder, a task file, and what `locate` and `extract` make of them."""
    folder = tmp_path_factory.mktemp("cli")
    tiny.hf_model("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    records = [json.dumps({"input": verb, "output": f"{verb}ed"}) for verb in tiny.VERBS]
    (folder / "past.jsonl").write_text("\n".join(records))
    own = [
        "--model",
        f"{folder / 'model'}",
        "--file",
        f"{folder / 'past.jsonl'}",
        "--instruction",
        "Write the past form.",
    ]
    run("locate", *own, "--shots", "2", "--n-prompts", "3", "--out", f"{folder / 'heads'}")
    heads = f"{folder / 'heads' / 'effects.safetensors'}"
    run(
        "extract",
        *own,
        "--heads",
        heads,
        "--top",
        "3",
        "--shots",
        "2",
        "--n-prompts",
        "4",
        "--out",
        f"{folder / 'vectors'}",
    )
    return folder


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.output


def test_locate_writes_effects_and_report(folder):
    assert ivl.HeadEffects.load(folder / "heads" / "effects.safetensors").values.shape == (3, 3, 4)
    assert "<html" in (folder / "heads" / "report.html").read_text().lower()


def test_extract_writes_a_tuned_vector(folder):
    vector = ivl.InstructionVector.load(folder / "vectors" / "past")
    assert len(vector.heads) == 3 and vector.layer is not None


def test_steer_shows_three_columns(folder, tmp_path):
    options = ["--model", f"{folder / 'model'}", "--out", f"{tmp_path}", "--max-new-tokens", "3"]
    output = run("steer", f"{folder / 'vectors' / 'past'}", "Q: walk\\nA:", *options)
    assert "no vector" in output
    rows = json.loads((tmp_path / "generations.json").read_text())
    assert list(rows[0]) == ["prompt", "no vector", "+ vector", "− vector"] and rows[0]["prompt"] == "Q: walk\nA:"


def test_export_writes_for_other_programs(folder, tmp_path):
    vector, options = f"{folder / 'vectors' / 'past'}", ["--model", f"{folder / 'model'}", "--positions", "all"]
    tuned = ivl.InstructionVector.load(vector)
    run("export", vector, vector, "--out", f"{tmp_path / 'x.json'}", *options)
    (spec,) = json.loads((tmp_path / "x.json").read_text()).values()
    assert spec["value"] == pytest.approx((2 * tuned.scale * tuned.vector).tolist(), rel=1e-6)
    run("export", vector, "--out", f"{tmp_path / 'y.json'}", "--positions", "4", "--architecture", "llama")
    (spec,) = json.loads((tmp_path / "y.json").read_text()).values()
    assert spec["pos"] == 4
    run("export", vector, "--out", f"{tmp_path / 'adapter'}", "--format", "peft", *options)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    refused = run("export", vector, "--out", f"{tmp_path / 'z.gguf'}", "--architecture", "llama", code=2)
    assert refused.startswith("error: 'past' acts at positions='last', but format='llama.cpp' has only 'all'")


def test_evaluate_writes_scores(folder, tmp_path):
    files = [
        "--model",
        f"{folder / 'model'}",
        "--file",
        f"{folder / 'past.jsonl'}",
        "--instruction",
        "Write the past form.",
    ]
    run("evaluate", *files, "--vectors", f"{folder / 'vectors'}", "--reference-shots", "2", "--out", f"{tmp_path}")
    scores = ivl.Evaluation.load(tmp_path / "evaluation.json")
    assert {"vector", "random vector", "2 demonstrations"} <= set(scores.conditions)


def test_tasks_lists_and_shows():
    assert "antonym" in run("tasks")
    assert "opposite" in run("tasks", "antonym")


def test_an_old_code_page_prints_what_it_can():
    """`subprocess` for the terminal's own stream; − and → aren't in cp1252."""
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    code = (
        "from ivlens.cli.app import app\nfrom ivlens.cli.common import print_table, say\nimport pandas as pd\n"
        "app.command()(lambda: (say('a \u2212 b'), print_table(pd.DataFrame({'\u2212': ['\u4f60']}), '\u2192')))\napp()"
    )
    done = subprocess.run([sys.executable, "-c", code, "<lambda>"], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode("latin-1")
    assert b"a ? b" in done.stdout


def test_names_are_printed_as_they_are(capsys):
    path = f"/data [v2]/{'long ' * 40}[bold]/:smile:/file"
    common.say(path)
    assert capsys.readouterr().out == f"{path}\n"
    common.print_table(pd.DataFrame({"[b]": ["[v2]:smile:"], "x": [0.5]}), "[red]title")
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("[b]", "[v2]:smile:", "[red]title"))


class LibraryError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("two\n  lines"), "error: two lines"),
        (KeyError("unknown task 'x'; did you mean 'y'"), "error: unknown task 'x'; did you mean 'y'"),
        (KeyError("layers"), "error: KeyError: layers"),
        (RuntimeError("CUDA out of memory"), "error: CUDA out of memory"),
        (
            UnicodeDecodeError("utf-8", b"a", 0, 1, "no"),
            "error: 'utf-8' codec can't decode byte 0x61 in position 0: no",
        ),
        (ImportError("needs x; install it"), "error: needs x; install it"),
        (MemoryError(), "error: MemoryError"),
        (LibraryError("bad"), "error: LibraryError: bad"),
    ],
)
def test_bad_input_is_one_line_whoever_finds_it(error, said, capsys):
    with pytest.raises(typer.Exit) as exit_, common.readable_errors():
        raise error
    assert exit_.value.exit_code == 2
    assert capsys.readouterr().err == f"{said}\n"


@pytest.mark.parametrize("error", [AttributeError("x"), IndexError("x"), AssertionError(), NotImplementedError()])
def test_a_bug_is_not_called_bad_input(error):
    with pytest.raises(type(error)), common.readable_errors():
        raise error


def test_vectors_stay_in_their_folder(tmp_path):
    folders = common.vector_folders(tmp_path, {"../up": 1, "/etc": 2, "plain": 3})
    assert all(path.parent == tmp_path for path in folders.values()) and folders["plain"] == tmp_path / "plain"
    with pytest.raises(ValueError, match="share folders"):
        common.vector_folders(tmp_path, {"a/b": 1, "a_b": 2})


def test_a_hub_id_is_no_path():
    assert inspect.signature(steer.steer).parameters["vector"].annotation.startswith("Annotated[str")


def test_models_names_the_built_in_one():
    assert "smollm2" in run("models")


def test_unknown_task_ends_with_a_hint_not_a_traceback():
    output = run("tasks", "presnt_past", code=2)
    assert "did you mean 'present_past'" in output and "Traceback" not in output


def test_file_without_instruction_is_an_error(folder):
    output = run("locate", "--file", f"{folder / 'past.jsonl'}", code=2)
    assert "task 'past' has no instruction; give at least one sentence" in output
    files = ["--file", f"{folder / 'past.jsonl'}"] * 2
    assert "2 --file but 1 --instruction" in run("locate", *files, "--instruction", "x", code=2)


def test_records_bring_their_own_instruction(folder, tmp_path):
    records = [json.dumps({"input": v, "output": f"{v}s", "instruction": "Write the plural."}) for v in tiny.VERBS]
    (tmp_path / "plural.jsonl").write_text("\n".join(records))
    options = ["--model", f"{folder / 'model'}", "--shots", "2", "--n-prompts", "3", "--out", f"{tmp_path / 'heads'}"]
    run("locate", "--file", f"{tmp_path / 'plural.jsonl'}", *options)
    assert ivl.HeadEffects.load(tmp_path / "heads" / "effects.safetensors").task_names == ["plural"]


@pytest.fixture(scope="module")
def trained(folder):
    """Tasks of one's own with a question and a content, and what `train` makes of the first."""
    letters = [
        {"input": f"{v}?\nA. x\nB. y", "output": "AB"[i % 2], "question": f"{v}?", "content": "xy"[i % 2]}
        for i, v in enumerate(tiny.VERBS)
    ]
    (folder / "choice.jsonl").write_text(
        "\n".join(json.dumps({**r, "instruction": "Say the letter."}) for r in letters)
    )
    files = ["--model", f"{folder / 'model'}", "--file", f"{folder / 'past.jsonl'}", "--instruction", "Write the past."]
    out = ["--steps", "4", "--batch-size", "2", "--lr", "0.01", "--save-every", "2", "--out", f"{folder / 'trained'}"]
    assert "loss" in run("train", *files, *out)
    return folder / "trained"


def given(folder):
    files = ["--file", f"{folder / 'past.jsonl'}", "--file", f"{folder / 'choice.jsonl'}"]
    told = ["--instruction", "Write the past.", "--instruction", "Say the letter."]
    return ["--model", f"{folder / 'model'}", *files, *told, "--shots", "2", "--n-prompts", "4", "--top", "3"]


def test_train_writes_adapters_and_a_report(trained):
    assert [p.name for p in ivl.TrainingRun.load(trained).checkpoints] == ["checkpoint-2", "checkpoint-4", "final"]
    assert "<html" in (trained / "report.html").read_text().lower()


@pytest.mark.slow
def test_compare_writes_change_recovery_and_a_report(folder, trained, tmp_path):
    output = run("compare", f"{trained / 'final'}", *given(folder), "--n-effects", "6", "--out", f"{tmp_path}")
    assert "Share of the lost accuracy" in output
    assert ivl.Change.load(tmp_path / "change").task_names == ["past", "choice"]
    assert "original state" in ivl.Recovery.load(tmp_path / "recovery" / "recovery.json").conditions
    report = (tmp_path / "report.html").read_text()
    assert "Knowing the answer" in report and "Putting the old vectors back" in report


def test_track_follows_the_checkpoints_of_a_run(folder, trained, tmp_path):
    heads = ["--heads", f"{folder / 'heads' / 'effects.safetensors'}"]
    run("track", f"{trained}", *given(folder), *heads, "--out", f"{tmp_path}")
    change = ivl.Change.load(tmp_path / "change")
    assert [s.step for s in change.snapshots] == [0, 2, 4]
    assert "Along fine-tuning" in (tmp_path / "report.html").read_text()


def test_train_without_a_task_says_so():
    assert "name a task to train on" in run("train", code=2)


@pytest.fixture
def config(folder):
    (folder / "run.yaml").write_text(f"""
model: {folder / "model"}
sequence:
  - {{file: past.jsonl, instruction: Write the past form.}}
  - {{file: choice.jsonl, instruction: Say the letter.}}
general: [antonym]
methods: [lora, iv]
steps: 2
batch_size: 2
n_prompts: 4
general_shots: [0]
vector_shots: 2
heads_per_vector: 2
folder: sequence
""")
    return f"{folder / 'run.yaml'}"


@pytest.mark.slow
def test_continual_plans_runs_and_reports(folder, trained, config):
    assert "to train" in run("continual", config, "--dry-run") and not (folder / "sequence").exists()
    output = run("continual", config)
    assert "plasticity" in output and "Wrote" in output
    found = ContinualResults.load(folder / "sequence" / "results.json")
    assert found.methods == ["lora", "iv"] and found.sequence == ["past", "choice"]
    report = (folder / "sequence" / "report.html").read_text()
    assert "Accuracy after every stage" in report and "Instruction vectors along the sequence" in report
    only = run("continual", config, "--method", "iv", "--dry-run")
    assert "done" in only and "lora" not in only and "to train" not in only


def test_continual_says_what_is_wrong(config):
    assert "name what to train on" in run("continual", code=2)
    assert "is not in the file" in run("continual", config, "--method", "ewc", code=2)
    assert "did you mean 'ewc'" in run("continual", "-t", "antonym", "-t", "sentiment", "--method", "ewcc", code=2)
    assert "unknown task" in run("continual", "-t", "antonim", "-t", "sentiment", code=2)
