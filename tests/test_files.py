"""Files and records as they are written: cells, formats, splits, and what is refused."""

from __future__ import annotations

import csv
import gzip
import io
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ivlens as ivl
from ivlens.tasks.files import read_rows
from ivlens.tasks.task import plain_text, same_input

ROWS = [{"input": f"q{i}", "output": f"a{i}"} for i in range(20)]
TEXT = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), min_size=1).filter(str.strip)
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def records(n=20, **more):
    return [{"input": f"q{i}", "output": f"a{i}", **more} for i in range(n)]


@QUICK
@given(
    st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5), st.sampled_from(["csv", "tsv", "jsonl", "json", "parquet"])
)
def test_cells_are_read_as_they_were_written(tmp_path, cells, kind):
    rows = [{"input": a, "output": b} for a, b in cells]
    path = tmp_path / f"t.{kind}"
    if kind in ("csv", "tsv"):
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter="\t" if kind == "tsv" else ",", lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writerows([["input", "output"], *([r["input"], r["output"]] for r in rows)])
        path.write_bytes(text.getvalue().encode())
    elif kind == "parquet":
        import pandas as pd

        pd.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if kind == "jsonl" else json.dumps(rows))
    assert [dict(row) for row in read_rows(path)] == rows
    path.with_suffix(f".{kind}.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert [dict(row) for row in read_rows(path.with_suffix(f".{kind}.gz"))] == rows


@pytest.mark.parametrize(
    "column", [["007", "012"], ["true", "false"], ["1.50", "2.00"], ["NA", "null"], ["1e5", "2024-01-02"]]
)
def test_nothing_is_guessed_to_be_a_number_a_date_or_missing(tmp_path, column):
    for name, text in {
        "t.csv": "input,output\n" + "".join(f"q{i},{column[i % 2]}\n" for i in range(20)),
        "t.jsonl": "".join(f'{{"input": "q{i}", "output": {json.dumps(column[i % 2])}}}\n' for i in range(20)),
    }.items():
        (tmp_path / name).write_text(text)
        task = ivl.Task.from_file(tmp_path / name, instruction="x")
        assert {x.output for x in task.train + task.valid + task.test} == set(column)


def test_numbers_in_json_stay_as_written(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"input": 1.50, "output": true}\n' * 4)
    assert read_rows(tmp_path / "t.jsonl")[0] == {"input": "1.50", "output": "true"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.csv", "\ufeffinput,output\r\nq,a\r\n".encode()),
        ("semicolon.csv", b"input;output\nq;a\n"),
        ("wide.csv", "input,output\nq,a\n".encode("utf-16")),
        ("columns.json", b'{"input": ["q"], "output": ["a"]}'),
        ("nested.json", b'{"version": 1, "data": [{"input": "q", "output": "a"}]}'),
        ("blank.jsonl", b'\n{"input": "q", "output": "a"}\n\n'),
        ("blank.csv", b"input,output\n\n  \nq,a\n,\n"),
        ("old.csv", b"input;output\rq;a\r"),
        ("wider.csv", "input,output\nq,a\n".encode("utf-32")),
        ("a?b*[v2]::c.csv", b"input,output\nq,a\n"),
    ],
)
def test_what_programs_write_is_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read_rows(tmp_path / name) == [{"input": "q", "output": "a"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "cut.jsonl",
            b'{"input": "a", "output": "b"}\n{"input": "c", "out',
            "line 2 of .*cut.jsonl is truncated or not JSON",
        ),
        ("latin.csv", b"input,output\ncaf\xe9,x\n", "line 2 of .*latin.csv is not UTF-8"),
        ("ragged.csv", b"input,output\na,b\nc,d,e\n", "line 3 of .*ragged.csv has 3 cells, but there are 2 columns"),
        ("open.csv", b'input,output\na,"b\n', "open.csv can't be read"),
        ("list.json", b'{"input": "a", "output": "b"}', "holds a single record"),
        ("number.json", b"3", "holds '3'; put a list of records"),
        (
            "mixed.jsonl",
            b'{"input": "a", "output": {"x": 1}}',
            "line 1 of .*mixed.jsonl of task 'mixed' has a dict under 'output'",
        ),
        ("cut.parquet", b"PAR1xxxx", "is truncated or no parquet file"),
        ("t.jsonl.gz", b"\x1f\x8bxx", "can't be unpacked"),
        ("twice.csv", b"input,input\na,b\n", "has two columns called 'input'"),
    ],
)
def test_broken_files_are_named_with_their_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        ivl.Task.from_file(tmp_path / name, instruction="x")


def test_a_json_file_may_hold_a_row_in_each_line(tmp_path):
    (tmp_path / "t.json").write_text("\n".join(map(json.dumps, ROWS)))
    assert read_rows(tmp_path / "t.json") == ROWS
    (tmp_path / "t.json").write_text('{"input": "a", "output": "b"}\n{"input": "c", "out')
    with pytest.raises(ValueError, match=r"line 2 of .*t.json is truncated or not JSON"):
        read_rows(tmp_path / "t.json")


def test_delimiters_are_counted_outside_quotes(tmp_path):
    (tmp_path / "t.csv").write_text('"input, as asked, in words";output\n"a;b";c\n')
    assert read_rows(tmp_path / "t.csv") == [{"input, as asked, in words": "a;b", "output": "c"}]


def test_a_name_with_a_tilde_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for path in (tmp_path / "~backup.csv", tmp_path / "home" / "t.csv"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("input,output\nq,a\n")
    assert read_rows("~backup.csv") == read_rows("~/t.csv") == [{"input": "q", "output": "a"}]


def test_what_is_no_text_is_refused_with_its_place():
    import numpy as np
    import pandas as pd
    import torch

    for value, what in [
        (float("nan"), "a missing value"), (["a", "b"], "a list.*right answers as a list under 'outputs'"), ({"text": "a"}, "a dict"),
        (torch.tensor(3), "a Tensor"), (b"x", "a bytes"), (torch.tensor([1, 2]), "a Tensor"), (np.array([1, 2]), "a ndarray"),
        (pd.NA, "a missing value"), (pd.NaT, "a missing value"), (float("inf"), "a float"), ("\ud800", "half a character"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"record 1 of task 't' has {what}"):
            ivl.Task.from_records([ROWS[0], {"input": "x", "output": value}], name="t", instruction="x")
    task = ivl.Task.from_records([{"input": np.int64(3), "output": np.float32(0.1)}], name="t", instruction="x")
    assert (task.train + task.valid + task.test)[0].output == "0.1"
    for records in (pd.DataFrame(ROWS), {"input": ["a"], "output": ["b"]}, [ROWS]):
        with pytest.raises(ValueError, match=r"record 0 of task 't' is .*no dictionary"):
            ivl.Task.from_records(records, name="t", instruction="x")
    with pytest.raises(ValueError, match="columns names 'outputt', which is unknown; did you mean 'output'"):
        ivl.Task.from_records(ROWS, name="t", instruction="x", columns={"outputt": "a"})


def test_nan_in_json_is_a_missing_value_and_no_key_stands_twice(tmp_path):
    for line, message in {
        '{"input": "q", "output": NaN}': "line 1 of .*t.jsonl of task 't' has a missing value under 'output'",
        '{"input": "q", "input": "r", "output": "a"}': "line 1 of .*t.jsonl .*a key of input, input, output stands twice",
    }.items():
        (tmp_path / "t.jsonl").write_text(line)
        with pytest.raises(ValueError, match=message):
            ivl.Task.from_file(tmp_path / "t.jsonl", instruction="x")


def test_several_right_answers_and_class_labels():
    import datasets

    rows = [{"input": "q", "outputs": ["a ", "b"], "split": "train"}, {**ROWS[1], "split": "test"}]
    task = ivl.Task.from_records(rows, name="t", instruction="x")
    assert task.train[0].answers == ("a", "b") and task.train[0].output == "a" and task.test[0].answers == ("a1",)
    features = datasets.Features(
        {"input": datasets.Value("string"), "output": datasets.ClassLabel(names=["bad", "good"])}
    )
    table = datasets.Dataset.from_dict({"input": list("abcd"), "output": [0, 1, 1, 0]}, features=features)
    task = ivl.Task.from_dataset(table, name="t", instruction="x")
    assert {(x.input, x.output) for x in task.train + task.valid + task.test} == set(
        zip("abcd", ["bad", "good", "good", "bad"])
    )


def test_an_instruction_stays_with_its_row():
    rows = [{"instruction": f"Say {i}.", "input": f"number {i}" if i % 2 else "", "output": str(i)} for i in range(40)]
    task = ivl.Task.from_records(rows, name="alpaca")
    for prompt in ivl.build_prompts(task, instruction=True, shots=2):
        number = prompt.query.output
        assert (prompt.instruction, prompt.query.input) in [
            (f"Say {number}.", f"number {number}"),
            (None, f"Say {number}."),
        ]
    assert len(task.instructions) == 20
    with pytest.raises(
        ValueError, match="1 of 41 records of task 't' have no 'instruction', and those of the others differ"
    ):
        ivl.Task.from_records([*rows, ROWS[0]], name="t")


def test_demonstrations_follow_the_query_s_instruction_where_enough_do():
    rows = [{"instruction": f"Do {i % 2}.", "input": f"q{i}", "output": str(i % 2)} for i in range(40)]
    task = ivl.Task.from_records(rows, name="two")
    for prompt in ivl.build_prompts(task, instruction=True, shots=3):
        assert {x.output for x in prompt.demonstrations} == {prompt.query.output}
    with pytest.warns(
        UserWarning, match="20 of 20 prompts of task 'two' show demonstrations that follow other instructions"
    ):
        ivl.build_prompts(task, instruction=True, shots=15)


@QUICK
@given(st.lists(st.sampled_from("abcdefghijkl"), min_size=1, max_size=60))
def test_a_repeated_input_stands_on_one_side_of_the_splits(inputs):
    task = ivl.Task.from_records([{"input": x, "output": "y"} for x in inputs], name="t", instruction="x")
    sides = [{same_input(x) for x in task.split(s)} for s in ("train", "valid", "test")]
    assert len(task) == len(inputs) and sum(map(len, sides)) == len(set(inputs))


def test_given_splits_that_overlap_are_told():
    rows = [{**r, "split": s} for s in ("train", "test") for r in ROWS[:3]]
    with pytest.warns(UserWarning, match="3 of 3 test inputs of task 't' stand in its training split too"):
        ivl.Task.from_records(rows, name="t", instruction="x")
    rows = [{**ROWS[9], "split": "train"}, *({**ROWS[0], "split": s} for s in ("valid", "test"))]
    with pytest.warns(UserWarning, match="1 of 1 test inputs of task 't' stand in its valid split too"):
        ivl.Task.from_records(rows, name="t", instruction="x")


def test_a_query_s_input_is_never_shown_with_another_output():
    rows = [{"input": f"q{i}", "output": y, "split": "train"} for i in range(6) for y in "ab"]
    for prompt in ivl.build_prompts(ivl.Task.from_records(rows, name="t", instruction="x"), shots=5):
        assert prompt.query.input not in {x.input for x in prompt.demonstrations}
    rows = [{"input": x, "output": "a", "split": "train"} for x in ("caf\u00e9", " Cafe\u0301", "q", "Q ", "r", "s")]
    for prompt in ivl.build_prompts(ivl.Task.from_records(rows, name="t", instruction="x"), shots=2):
        assert plain_text(prompt.query.input) not in {plain_text(x.input) for x in prompt.demonstrations}


def test_more_prompts_than_queries_are_told():
    task = ivl.Task.from_records(ROWS, name="t", instruction="x")
    with pytest.warns(
        UserWarning, match="n=100 prompts were asked for, but the 'test' split of task 't' has 7 different"
    ):
        ivl.build_prompts(task, n=100, split="test")


def test_two_tasks_of_one_name_are_refused_and_names_are_no_paths():
    one, two = (ivl.Task.from_records(records(n), name="t", instruction="x") for n in (20, 21))
    with pytest.raises(ValueError, match="two tasks are called 't'"):
        ivl.TaskSuite([one, two])
    assert len(ivl.TaskSuite([one, one])) == 1
    assert ivl.Task.from_records(ROWS, name="../up", instruction="x").name == ".._up"
    for name in ("", ".", "..", " "):
        with pytest.raises(ValueError, match="is no name for a task"):
            ivl.Task.from_records(ROWS, name=name, instruction="x")
