"""Choices of examples, published sequences in their own layouts, and the general benchmarks."""

from __future__ import annotations

import csv
import json

import pytest

import ivlens as ivl
from ivlens.continual.general import GENERAL, load_general, overlapping
from ivlens.continual.recipes import RECIPES, load_sequence


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl"
    path.write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content), encoding="utf-8")


def inputs(examples):
    return {example.input for example in examples}


# -- choices ------------------------------------------------------------------------------------------------------------


def test_choices_are_kept_and_renamed():
    records = [{"q": "2 + 2", "output": "4", "options": ["3", 4, "5"]}, {"q": "1 + 1", "output": "2", "options": None}]
    columns = {"input": "q", "choices": "options"}
    task = ivl.Task.from_records(records, name="sums", instruction="Add.", columns=columns)
    told = {x.input: x.choices for x in task.train + task.valid + task.test}
    assert told == {"2 + 2": ("3", "4", "5"), "1 + 1": None}
    frame = task.to_dataframe().set_index("input")
    assert frame.loc["2 + 2", "choices"] == ("3", "4", "5") and frame.loc["1 + 1", "choices"] is None


@pytest.mark.parametrize(
    "choices, message",
    [
        (["three", "four"], "not among its choices .*option's text, not its letter"),
        ("A, B", "give a list"),
        (4, "give a list"),
    ],
)
def test_an_output_that_is_no_choice_is_an_error(choices, message):
    with pytest.raises(ValueError, match=f"record 0 of task 't' has .*{message}"):
        ivl.Task.from_records([{"input": "2 + 2", "output": "B", "choices": choices}], name="t", instruction="Add.")


# -- sequences ----------------------------------------------------------------------------------------------------------


def trace(folder, front="Sort it.\n\nText:\n"):
    for task in RECIPES["trace"].tasks:
        lead = "<s> " if task == "Py150" else front
        for file, n in {"train": 30, "eval": 5, "test": 8}.items():
            rows = [{"prompt": f"{lead}{task} {file} {i}\n\nLabel:\n", "answer": f"{file}{i}"} for i in range(n)]
            write(folder / task / f"{file}.json", rows)
    return folder


def test_trace_keeps_its_order_splits_and_whole_texts(tmp_path):
    suite = load_sequence("trace", trace(tmp_path))
    assert suite.names == list(RECIPES["trace"].tasks) and suite.names[0] == "C-STANCE"
    fomc = suite["FOMC"]
    assert fomc.instructions == ("Sort it.",)
    assert (len(fomc.train), len(fomc.valid), len(fomc.test)) == (30, 5, 8)
    assert (fomc.test[3].input, fomc.test[3].output) == ("Text:\nFOMC test 3\n\nLabel:\n", "test3")
    code = suite["Py150"]  # its prompts differ in their first line
    assert code.instructions == ("Write the next line of the Python code.",)
    assert code.test[3].input == "<s> Py150 test 3\n\nLabel:\n"


def test_validation_examples_that_stand_in_the_test_split_are_left_out(tmp_path):
    trace(tmp_path)
    (tmp_path / "FOMC" / "eval.json").write_bytes((tmp_path / "FOMC" / "test.json").read_bytes())
    fomc = load_sequence("trace", tmp_path)["FOMC"]
    assert (len(fomc.train), len(fomc.valid), len(fomc.test)) == (24, 6, 8)
    assert not inputs(fomc.valid) & (inputs(fomc.test) | inputs(fomc.train))


def test_samples_are_seeded_and_grow(tmp_path):
    trace(tmp_path)

    def drawn(n, seed=0):
        task = load_sequence("trace", tmp_path, n_train=n, n_test=3, seed=seed)["FOMC"]
        assert len(task.train) == n and len(task.test) == 3 and len(task.valid) == 5
        return [x.input for x in task.train]

    whole = [x.input for x in load_sequence("trace", tmp_path)["FOMC"].train]
    assert drawn(10) == drawn(10) == drawn(20)[:10] and drawn(10) != drawn(10, seed=1)
    assert drawn(10) != whole[:10] and set(drawn(10)) < set(whole)
    assert len(load_sequence("trace", tmp_path, n_train=99)["FOMC"].train) == 30, "fewer where there are fewer"
    with pytest.raises(ValueError, match="n_test=0 must be at least 1"):
        load_sequence("trace", tmp_path, n_test=0)


def test_the_long_sequence_in_o_loras_layout(tmp_path):
    categories = {"NLI": "MNLI CB RTE", "SC": "yelp amazon IMDB SST-2", "TC": "dbpedia agnews yahoo"}
    categories = {task: category for category, tasks in categories.items() for task in tasks.split()}
    for task in RECIPES["long"].tasks:
        where = tmp_path / "CL_Benchmark" / categories.get(task, task) / task
        write(where / "labels.json", ["Good", "Bad"])
        for split, n in {"train": 20, "dev": 6, "test": 6}.items():
            name = "train" if split == "train" else "test"  # as published: dev.json repeats test.json
            write(where / f"{split}.json", [{"sentence": f"{task} {name} {i}", "label": "Bad"} for i in range(n)])
    suite = load_sequence("long", tmp_path)
    assert suite.names == list(RECIPES["long"].tasks) and len(suite) == 15
    assert (suite.names[0], suite.names[-1]) == ("yelp", "WiC")
    yelp = suite["yelp"]
    assert yelp.instructions == ("Classify the sentiment of the text. Options: Good, Bad.",)
    assert (len(yelp.train), len(yelp.valid), len(yelp.test)) == (16, 4, 6) and yelp.test[2].input == "yelp test 2"
    assert load_sequence("long", tmp_path / "CL_Benchmark")["WiC"] == suite["WiC"]


def test_natural_instructions_from_its_repository(tmp_path):
    for task in RECIPES["ni-m1"].tasks:
        rows = [{"input": f"{task} {i}", "output": [f"out {i}", "another"]} for i in range(40)]
        rows += [{"input": f"{task} 3", "output": ["comes again"]}, {"input": f"{task} 99", "output": []}]
        write(tmp_path / "tasks" / f"{task}_some_name.json", {"Definition": ["Do it.", "Now."], "Instances": rows})
    suite = load_sequence("ni-m1", tmp_path)
    assert suite.names == [f"task{n}_some_name" for n in (360, 363, 1290, 339, 1510)]
    task = suite["task360_some_name"]
    assert task.instructions == ("Do it. Now.",) and (len(task.train), len(task.valid), len(task.test)) == (20, 6, 14)
    assert {x.input: x.output for x in task.train + task.valid + task.test} == {
        f"task360 {i}": f"out {i}" for i in range(40)
    }


def test_natural_instructions_from_the_hub(tmp_path, monkeypatch):
    asked = {}

    def download(repo, *, repo_type, allow_patterns):
        asked.update(repo=repo, repo_type=repo_type, patterns=allow_patterns)
        for task in RECIPES["ni-c1"].tasks:
            rows = [{"definition": "Do it.", "inputs": f"{task} {i}", "targets": str(i), "id": "x"} for i in range(20)]
            write(tmp_path / "train" / f"{task}_some_name_train.jsonl", rows)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    suite = load_sequence("ni-c1", n_train=4)
    assert asked["repo"] == RECIPES["ni-c1"].hub and asked["repo_type"] == "dataset"
    assert asked["patterns"] == [f"*/task{n}_*" for n in (195, 1343, 1310, 1292, 363)]
    assert suite.names == [f"task{n}_some_name" for n in (195, 1343, 1310, 1292, 363)]
    assert suite["task195_some_name"].instructions == ("Do it.",) and len(suite["task195_some_name"].train) == 4


def test_no_hub_is_an_error_that_tells_what_to_do(monkeypatch):
    for name in ("trace", "long"):
        with pytest.raises(ValueError, match=f"isn't on the hub; download {RECIPES[name].url} .*test.json"):
            load_sequence(name)

    def download(*arguments, **options):
        raise OSError("no way out")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(OSError, match=r"no way out.*download https://github.com/allenai/natural-instructions"):
        load_sequence("ni-g1")


def test_the_built_in_sequence():
    suite = load_sequence("func", n_train=7)
    assert suite.names == list(RECIPES["func"].tasks)
    assert all(len(task.train) == 7 for task in suite.values())
    assert suite["object_counting"].test == ivl.load_tasks()["object_counting"].test
    with pytest.raises(ValueError, match="'func' is built in; leave folder='here' out"):
        load_sequence("func", "here")


def test_what_is_wrong_with_a_folder_is_told(tmp_path):
    trace(tmp_path)
    path = tmp_path / "ScienceQA" / "eval.json"
    for text, message in {
        "": "is empty",
        "[{": "is truncated or not JSON",
        "[]": "holds (no rows|a single record)",
        '{"prompt": 1}': "holds (no rows|a single record)",
        '[{"prompt": "x", "answer": "y"}, {"prompt": "x"}]': "row 1 of .* has no 'answer'",
        '[{"prompt": {"a": 1}, "answer": "y"}]': "row 0 of .* has no text under 'prompt'",
        '[{"prompt": null, "answer": "y"}]': "row 0 of .* has no 'prompt'",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{message}.*one folder per task") as told:
            load_sequence("trace", tmp_path)
        assert str(path) in str(told.value)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"no file {path}; .*xpected one folder per task"):
        load_sequence("trace", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere; download .* with tasks/taskNNN"):
        load_sequence("ni-c1", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no file task195_\*.json in"):
        load_sequence("ni-c1", tmp_path)
    write(tmp_path / "tasks" / "task195_x.json", {"Definition": "Do it.", "Instances": [{"input": "x"}]})
    with pytest.raises(ValueError, match=r"row 0 of .*task195_x.json has no 'output'"):
        load_sequence("ni-c1", tmp_path)


def test_unknown_names_are_answered_with_near_ones():
    with pytest.raises(ValueError, match="unknown recipe 'trance'; did you mean 'trace'"):
        load_sequence("trance")
    with pytest.raises(ValueError, match="unknown general task 'arc_eazy'; did you mean 'arc_easy'"):
        load_general(["lambada", "arc_eazy"])
    with pytest.raises(ValueError, match="unknown recipe 'xyz'; choose from func, trace"):
        load_sequence("xyz")


# -- general tasks ------------------------------------------------------------------------------------------------------

FOUR = ["north", "east", "south", "west"]
LABELLED = {"text": FOUR, "label": ["A", "B", "C", "D"]}
ROWS = {  # one row as the hub has it, and what it becomes
    "hellaswag": ({"ctx": "He turns", "endings": FOUR, "label": "2", "ind": 1}, ("He turns", "south", FOUR)),
    "arc_easy": ({"question": "Where?", "choices": LABELLED, "answerKey": "B"}, ("Where?", "east", FOUR)),
    "arc_challenge": (
        {"question": "Where?", "choices": {"text": FOUR, "label": ["1", "2", "3", "4"]}, "answerKey": "4"},
        ("Where?", "west", FOUR),
    ),
    "openbookqa": ({"question_stem": "Look", "choices": LABELLED, "answerKey": "A"}, ("Look", "north", FOUR)),
    "lambada": ({"text": "They went far,\nfar away"}, ("They went far,\nfar", "away", None)),
    "bbh_object_counting": (
        {"input": "I have an oboe. How many?", "target": "1"},
        ("I have an oboe. How many?", "1", None),
    ),
    "mmlu": ({"question": "Where?", "choices": FOUR, "answer": 3, "subject": "maps"}, ("Where?", "west", FOUR)),
}


def numbered(row, n):
    """The row n times, each with a number in front of its question."""
    first = next(key for key in ("ctx", "question", "question_stem", "text", "input") if key in row)
    return [{**row, first: f"{i} {row[first]}"} for i in range(n)]


@pytest.mark.parametrize("name", GENERAL)
def test_hub_columns_become_examples(tmp_path, name):
    row, (question, answer, choices) = ROWS[name]
    write(tmp_path / f"{name}.jsonl", numbered(row, 50))
    task = load_general(name, tmp_path)[name]
    assert {(x.input, x.output, x.choices) for x in task.train + task.valid + task.test} == {
        (f"{i} {question}", answer, choices and tuple(choices)) for i in range(50)
    }
    assert task.instructions == (GENERAL[name].instruction,)
    assert (len(task.train), len(task.valid), len(task.test)) == (16, 4, 30), "20 set aside"


@pytest.mark.parametrize("name", GENERAL)
def test_hub_datasets_are_asked_for_their_splits(monkeypatch, name):
    import datasets

    row, benchmark, asked = ROWS[name][0], GENERAL[name], []

    def load(path, config=None, *, split):
        asked.append((path, config, split))
        return datasets.Dataset.from_list([{**r, "tag": split} for r in numbered(row, 10 if split == "train" else 60)])

    monkeypatch.setattr("datasets.load_dataset", load)
    task = load_general([name], n=12)[name]
    splits = [split for split in (benchmark.train, benchmark.test) if split]
    assert asked == [(benchmark.hub, benchmark.config, split) for split in splits]
    assert len(task.test) == 12 and len(task.train) == (
        8 if benchmark.train == "train" else 48 if benchmark.train else 16
    )


def test_answers_that_are_not_public_are_left_out_and_validation_is_scored(tmp_path):
    row = ROWS["hellaswag"][0]
    parts = {"train": (10, "0"), "validation": (7, "1"), "test": (5, "")}
    for split, (n, label) in parts.items():
        write(tmp_path / "hellaswag" / f"{split}.jsonl", numbered({**row, "label": label}, n))
    task = load_general("hellaswag", tmp_path)["hellaswag"]
    assert (len(task.train), len(task.valid), len(task.test)) == (8, 2, 7)
    assert {x.output for x in task.test} == {"east"} and {x.output for x in task.train} == {"north"}


def test_validation_gives_the_demonstrations_where_there_is_no_train_split(tmp_path):
    rows = [{**r, "split": "validation"} for r in numbered(ROWS["mmlu"][0], 10)]
    rows += [{"input": f"test {i}", "output": "x", "split": "test"} for i in range(6)]
    write(tmp_path / "mmlu.json", rows)
    task = load_general("mmlu", tmp_path)["mmlu"]
    assert (len(task.train), len(task.valid), len(task.test)) == (8, 2, 6)
    assert inputs(task.test) == {f"test {i}" for i in range(6)}


def test_lettered_options_become_the_bare_question_and_the_options_text(tmp_path):
    lettered = "Where?\nA. north\nB. east\nC. south\nD. west"
    plain = {"instruction": "Say where.", "input": "Where is A. north\nB. east?", "output": "east", "choices": FOUR[:2]}
    rows = [{"instruction": "Say where.", "input": lettered, "output": "C", "choices": FOUR}] * 20
    write(tmp_path / "arc_easy.jsonl", [{**r, "split": s} for s in ("train", "test") for r in rows] + [plain])
    task = load_general("arc_easy", tmp_path)["arc_easy"]
    assert task.instructions == ("Say where.",)
    assert {(x.input, x.output, x.choices) for x in task.train} == {("Where?", "south", tuple(FOUR))}
    assert {x.input for x in task.test} == {"Where?", plain["input"]}, "rows without a split are scored"
    write(tmp_path / "arc_easy.jsonl", [{"input": "Where?", "output": "C", "choices": FOUR}] * 4)
    with pytest.raises(ValueError, match="output 'C', which is not among its choices"):
        load_general("arc_easy", tmp_path)


def test_csv_files_hold_choices_as_json(tmp_path):
    with open(tmp_path / "mmlu.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["question", "choices", "answer", "split"])
        writer.writeheader()
        for i in range(20):
            split = "train" if i < 10 else "test"
            writer.writerow({"question": f"{i},\nwhere?", "choices": json.dumps(FOUR), "answer": i % 4, "split": split})
    task = load_general("mmlu", tmp_path)["mmlu"]
    told = {x.input: (x.output, x.choices) for x in task.train + task.valid + task.test}
    assert told == {f"{i},\nwhere?": (FOUR[i % 4], tuple(FOUR)) for i in range(20)} and len(task.test) == 10


def test_what_is_set_aside_and_drawn_is_seeded(tmp_path):
    write(tmp_path / "lambada.json", numbered(ROWS["lambada"][0], 60))
    one, again, other = (load_general("lambada", tmp_path, n=10, seed=seed)["lambada"] for seed in (0, 0, 1))
    assert one == again and inputs(one.test) != inputs(other.test) and inputs(one.train) != inputs(other.train)
    assert not inputs(one.test) & inputs(one.train + one.valid) and len(one.test) == 10


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"question": "Where?", "choices": FOUR}], r"row 0 of .*can't be read.*expected question, choices, answer as"),
        ([{"question": "Where?", "choices": FOUR, "answer": 4}], "row 0 of .*no option of number 4"),
        ([{"input": "x", "output": None}] * 2, "has no 'output'"),
        ([{"input": "x", "output": "y", "split": "train"}], "mmlu has no test rows"),
    ],
)
def test_rows_that_cannot_be_read_are_named(tmp_path, rows, message):
    write(tmp_path / "mmlu.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        load_general("mmlu", tmp_path)


def test_a_folder_as_downloaded_is_read_by_its_splits(tmp_path):
    rows = [{"question": f"{i}?", "choices": FOUR, "answer": i % 4} for i in range(12)]
    folder = tmp_path / "mmlu"
    for split, part in {"dev": rows[:4], "validation": rows[4:8], "test": rows[8:]}.items():
        write(folder / "all" / f"{split}-00000-of-00001.jsonl", part)
    write(folder / "anatomy" / "test.jsonl", rows[:1])
    write(folder / "all" / "dataset_info.json", {})
    (folder / "all" / "._test.jsonl").write_bytes(b"\xff")
    task = load_general("mmlu", tmp_path)["mmlu"]
    assert inputs(task.test) == {"8?", "9?", "10?", "11?"} and len(task) == 12
    write(folder / "all" / "constraints.jsonl", rows[:1])
    with pytest.raises(ValueError, match=r"can't tell which split .*constraints.jsonl is"):
        load_general("mmlu", tmp_path)


def test_missing_general_files_and_hubs_are_named(tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r"no lambada.jsonl, .*and no folder lambada with a file per split in .*text"
    ):
        load_general("lambada", tmp_path)

    def load(*arguments, **options):
        raise ConnectionError("no way out")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(OSError, match=r"can't get EleutherAI/lambada_openai .*no way out"):
        load_general("lambada")


def test_inputs_that_were_trained_on_are_found_but_for_case_and_white_space():
    def task(train, test):
        records = [{"input": text, "output": "x", "split": "train"} for text in train]
        records += [{"input": text, "output": "x", "split": "test"} for text in test]
        return ivl.Task.from_records(records, name="t", instruction="Do.")

    general = task(["a b"], ["The  Sky\nis blue ", "the sky is bluer", "sea", "kept"])
    trained = task(["the sky is BLUE", "SEA", "sky"], ["kept"])
    assert overlapping(general, trained) == ["The  Sky\nis blue ", "sea"]
