"""Tasks of one's own, and the built-in suite."""

from __future__ import annotations

import itertools
import json

import pytest

import ivlens as ivl

RECORDS = [{"input": f"{n} + 1", "output": str(n + 1)} for n in range(40)]


# -- tasks of one's own -------------------------------------------------------------------------------------------------


def test_records_without_splits_are_cut_in_a_fixed_way():
    task, again = (ivl.Task.from_records(RECORDS, name="plus_one", instruction="Add one.") for _ in range(2))
    assert (len(task.train), len(task.valid), len(task.test), len(task)) == (20, 6, 14, 40)
    assert task == again and {x.input for x in task.train + task.valid + task.test} == {r["input"] for r in RECORDS}
    assert [x.input for x in task.train] != [r["input"] for r in RECORDS[:20]], "shuffled"


def test_records_with_splits_keep_them():
    records = [{**r, "split": s} for r, s in zip(RECORDS, itertools.cycle(["train", "validation", "test", "dev"]))]
    task = ivl.Task.from_records(records, name="t", instruction="Add one.")
    assert [x.input for x in task.train] == [r["input"] for r in RECORDS[::4]]
    assert {x.input for x in task.valid} == {r["input"] for r in RECORDS[1::4] + RECORDS[3::4]}


def test_columns_of_other_names_are_mapped_and_values_become_text():
    records = [{"question": 3, "answer": 4, "extra": None}]
    columns = {"input": "question", "output": "answer"}
    task = ivl.Task.from_records(records, name="t", instruction=["Add one.", "Plus one."], columns=columns)
    (example,) = task.train + task.valid + task.test
    assert (example.input, example.output) == ("3", "4") and task.instructions == ("Add one.", "Plus one.")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_files_of_every_kind_are_read(tmp_path, suffix):
    path = tmp_path / f"plus_one.{suffix}"
    text = {
        "jsonl": "\n".join(map(json.dumps, RECORDS)),
        "json": json.dumps(RECORDS),
        "csv": "input,output\n" + "\n".join(f"{r['input']},{r['output']}" for r in RECORDS),
    }
    path.write_text(text[suffix])
    task = ivl.Task.from_file(path, instruction="Add one.")
    assert task == ivl.Task.from_records(RECORDS, name="plus_one", instruction="Add one.")


def test_datasets_keep_their_splits():
    import datasets

    parts = {"train": RECORDS[:5], "validation": RECORDS[5:7], "test": RECORDS[7:]}
    whole = datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in parts.items()})
    task = ivl.Task.from_dataset(whole, name="t", instruction="Add one.")
    assert (len(task.train), len(task.valid), len(task.test)) == (5, 2, 33)
    loose = ivl.Task.from_dataset(whole["test"], name="t", instruction="Add one.")
    assert len(loose) == 33 and len(loose.train) == round(33 * 0.5)


def test_a_task_shows_itself():
    task = ivl.Task.from_records(RECORDS, name="plus_one", instruction="Add one.")
    first = task.train[0]
    assert repr(task).startswith("Task(plus_one: 'Add one.', 20 / 6 / 14 train/valid/test, ")
    assert f"{first.input!r} → {first.output!r}" in repr(task)
    frame = task.to_dataframe()
    assert len(frame) == 40 and list(frame.columns[:3]) == ["split", "input", "output"]
    assert list(frame["split"].value_counts()[["train", "valid", "test"]]) == [20, 6, 14]


def test_bad_records_and_files_are_named(tmp_path):
    def make(records, **options):
        return ivl.Task.from_records(records, name="t", **{"instruction": "Add one.", **options})

    for records, message in [
        ([], "task 't' is empty; give it at least one record with 'input' and 'output'"),
        ([RECORDS[0], {"input": "x"}], "record 1 of task 't' has no 'output'; it has input: name your columns"),
        ([{"input": " ", "output": "x"}], "record 0 of task 't' has no 'input'"),
        ([{**RECORDS[0], "split": "exam"}], "record 0 of task 't' has split='exam'; choose one of train, valid, test"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(records)
    for instruction in ("", [], ["Add one.", ""]):
        with pytest.raises(ValueError, match="task 't' has no instruction; give at least one sentence"):
            make(RECORDS, instruction=instruction)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "notes.txt").write_text("x")
    for name, error, message in [
        ("none.jsonl", FileNotFoundError, "no file .*none.jsonl; give the path of a .jsonl, .json, .csv"),
        ("empty.jsonl", ValueError, "empty.jsonl is empty; put one record in each line"),
        ("notes.txt", ValueError, "can't read notes.txt: choose a .jsonl, .json, .csv"),
    ]:
        with pytest.raises(error, match=message):
            ivl.Task.from_file(tmp_path / name, instruction="Add one.")
    with pytest.raises(ValueError, match="split='dev' is unknown; choose one of train, valid, test"):
        make(RECORDS).split("dev")


# -- the built-in suite -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def suite():
    return ivl.load_tasks()


def test_every_built_in_task_has_enough_examples_and_wordings(suite):
    for task in suite.values():
        assert len(task) >= 120, task.name
        assert min(len(task.train), len(task.valid), len(task.test)) >= 15, task.name
        assert len(set(task.instructions)) == len(task.instructions) >= 3, task.name
        assert task.group != "own" and task.description, task.name


def test_splits_of_built_in_tasks_are_disjoint_and_inputs_distinct(suite):
    for task in suite.values():
        inputs = [x.input for x in task.train + task.valid + task.test]
        assert len(set(inputs)) == len(inputs), task.name


def test_built_in_examples_are_tidy_text(suite):
    for task in suite.values():
        for example in task.train + task.valid + task.test:
            for text in (example.input, example.output):
                assert text == text.strip() and text, (task.name, example)
            assert "\n" not in example.output, (task.name, example)


def test_choice_tasks_know_the_content_behind_the_letter(suite):
    choices = [task for task in suite.values() if task.train[0].content]
    assert {"synonym_choice", "general_choice"} <= {task.name for task in choices}
    for task in choices:
        for x in task.train + task.valid + task.test:
            assert f"\n{x.output}. {x.content}" in x.input and x.input.startswith(x.question), (task.name, x)
        letters = [x.output for x in task.train]
        assert max(letters.count(letter) for letter in set(letters)) <= 0.4 * len(letters), (
            "no letter is the usual answer"
        )


def test_rules_of_computable_tasks_hold(suite):
    rules = {
        "capitalize": str.capitalize,
        "lowercase": str.lower,
        "word_length": lambda x: str(len(x)),
        "first_of_list": lambda x: x.split(", ")[0],
        "last_of_list": lambda x: x.split(", ")[-1],
        "alphabetically_first": lambda x: min(x.split(", ")),
    }
    for name, rule in rules.items():
        for x in suite[name].train + suite[name].valid + suite[name].test:
            assert x.output == rule(x.input), (name, x)


def test_a_suite_is_a_mapping_that_prints_and_cuts(suite):
    assert suite.names == list(suite) and len(suite) == len(suite.names) >= 20
    part = suite.subset(["sentiment", "antonym"])
    assert part.names == ["sentiment", "antonym"] and part["antonym"] is suite["antonym"]
    assert repr(part) == "TaskSuite(2 tasks: sentiment, antonym)"
    frame = suite.to_dataframe()
    assert list(frame.index) == suite.names and frame.loc["antonym", "examples"] == len(suite["antonym"])
    escaped = ivl.TaskSuite([ivl.Task.from_records(RECORDS, name="<b>", instruction="<i>")])._repr_html_()
    assert "<b>" not in escaped and "<i>" not in escaped


def test_tasks_are_loaded_by_name(suite):
    assert ivl.load_tasks("antonym").names == ["antonym"]
    assert ivl.load_tasks(["sentiment", "antonym"]).names == ["sentiment", "antonym"]


def test_unknown_tasks_suggest_near_names(suite):
    for ask in (
        lambda: ivl.load_tasks("presnt_past"),
        lambda: suite["presnt_past"],
        lambda: suite.subset(["presnt_past"]),
    ):
        with pytest.raises(KeyError, match="unknown task 'presnt_past'; did you mean 'present_past'"):
            ask()
    with pytest.raises(KeyError, match=r"unknown task 'qqq'; choose from .*antonym.*sentiment"):
        ivl.load_tasks(["antonym", "qqq"])
