"""Several processes do together what one does alone. Run as a module, this is one of them, under the environment of a launcher."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import ivlens as ivl
from ivlens.common.processes import alone, everyones, gathered, here, is_main, joined, on_main
from ivlens.models.backends import backend_of
from ivlens.models.head import Head
from ivlens.patching import heads as heads_room
from ivlens.running.decoding import complete
from ivlens.running.tokens import tokenize
from tests import tiny

ROOT = Path(__file__).parents[1]
HEADS = [Head(0, 1), Head(2, 3)]
KILLED = 3  # after so many times that results were kept


def task() -> ivl.Task:
    records = [{"input": verb, "output": f"{verb}ed"} for verb in tiny.VERBS]
    return ivl.Task.from_records(records, name="past", instruction="Write the past form.")


def models(tokenizer: Any) -> tuple[Any, Any]:
    after = tiny.randomize(tiny.hf_model("llama"), seed=1).eval()
    return tiny.hooked_model("llama", tokenizer), ivl.load_model(after, tokenizer=tokenizer)


def located(model: Any, folder: Path | None) -> list[Any]:
    options = {"shots": 2, "n_prompts": 11, "n_mean": 9, "max_rows": 30}  # two prompts a batch
    effects = ivl.locate_heads(model, task(), **options, folder=folder, progress=False)
    return [effects.values.tolist(), effects.baseline.tolist()]


def measured(before: Any, after: Any) -> dict[str, Any]:
    """Numbers of every engine: sweeps, reading, decoding, sampling, choosing."""
    vector = ivl.extract_vector(before, task(), HEADS, shots=2, n_prompts=10, batch_size=3)
    scores = ivl.evaluate(
        before, task(), vectors=vector, layer=1, scale=2.0, n_prompts=5, draws=1, batch_size=2, progress=False
    ).scores
    change = ivl.compare(before, after, task(), HEADS, shots=2, n_prompts=7, n_mean=5, n_effects=0, progress=False)
    few = ivl.generate(
        before, ["Q: walk\nA:"], vector=vector, layer=1, max_new_tokens=4
    )  # fewer prompts than processes
    rows = tokenize(backend_of(before), [f"Q: {verb}\nA:" for verb in tiny.VERBS[:7]])
    sampled = complete(backend_of(before), rows, {0: None}, max_new_tokens=5, stop=None, temperature=1.0, batch_size=3)
    columns = ["condition", "text", "first_token", "exact_match", "probability"]
    return {
        "vector": vector.vector.tolist(),
        "projections": vector.metadata["projections"],
        "scores": scores[columns].to_dict("list"),
        "change": [x.log_probability["past"].tolist() + x.hidden["past"].tolist() for x in change.snapshots],
        "few": few.to_dataframe().to_dict("list"),
        "sampled": sampled[0].texts,
    }


def continued(base: str, folder: Path) -> list[Any]:
    """Two chains of two stages, scored and trained weights."""
    other = ivl.Task.from_records(
        [{"input": v, "output": f"{v}s"} for v in tiny.VERBS], name="plural", instruction="Say it."
    )
    options = {"methods": ["lora", "averaging"], "steps": 2, "batch_size": 2, "n_prompts": 3, "general_shots": (0,)}
    options |= {"similarity": False, "save_every": None, "progress": False}
    found = ivl.continual.run([task(), other], folder=folder, model=base, **options)
    weights = [load_file(path) for path in sorted(folder.rglob("final/adapter_model.safetensors"))]
    return [found.scores.to_dict("list"), [{k: x.tolist() for k, x in each.items()} for each in weights]]


# -- in each of several processes ---------------------------------------------------------------------------------------


def work(folder: Path, tokenizer_folder: str, base: str, killed: bool) -> None:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    before, after = models(tokenizer)
    index, n = here()
    found = {"numbers": measured(before, after), "errors": errors(before, index)}
    with alone():  # on prompts of its own, and as if there were no others
        assert here() == (0, 1)
        rows = tokenize(backend_of(before), [f"Q: {verb}\nA:" for verb in tiny.VERBS[index : index + 2]])
        found["alone"] = complete(backend_of(before), rows, {0: None}, max_new_tokens=3)[0].texts
    assert here() == (index, n) and gathered(index, "numbers") == list(range(n))
    (folder / f"found-{n}-{index}.json").write_text(json.dumps(found))
    swept, original = [], heads_room.write_tensors

    def counted(*args: Any) -> None:
        original(*args)
        swept.append(1)
        if killed and is_main() and len(swept) == KILLED:
            os._exit(9)

    heads_room.write_tensors = counted
    batches: list[int] = []
    replayed = heads_room.Sweep._replay
    heads_room.Sweep._replay = lambda self, batch: batches.append(len(batch.index)) or replayed(self, batch)
    (folder / f"located-{n}-{index}.json").write_text(json.dumps([located(before, folder / "kept"), batches]))
    (folder / f"continued-{index}.json").write_text(json.dumps(continued(base, folder / "continual")))
    assert here() == (index, n)


def errors(model: Any, index: int) -> list[str]:
    """What is raised where one process fails, where they do different things, and where the main process can't read a file."""

    def fails() -> Any:
        yield from range(2)
        if index == 1:
            raise ValueError("this one")
        yield 2

    def read() -> Any:
        return (Path("/") / "nowhere").read_text()

    found = []
    prompts = [f"Q: {tiny.VERBS[index]}\nA:"]
    for tried in (
        lambda: list(everyones(fails(), "failing")),
        lambda: on_main(read, "reading"),
        lambda: ivl.generate(model, prompts),
        lambda: ivl.load_model("smollm2", device_map="auto"),
    ):
        try:
            tried()
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


# -- and here -----------------------------------------------------------------------------------------------------------


def launch(n: int, *arguments: object, module: str = "tests.test_processes") -> list[int]:
    """Exit statuses of n processes, as a launcher would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": n,
        "LOCAL_WORLD_SIZE": n,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
    }
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environments = [{**shared, "RANK": i, "LOCAL_RANK": i} for i in range(n)]
    started = [
        subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **{k: str(v) for k, v in each.items()}}, stderr=subprocess.PIPE
        )
        for each in environments
    ]
    said = [process.communicate(timeout=500)[1].decode() for process in started]
    if any(process.returncode == 1 for process in started) and not any(p.returncode == 9 for p in started):
        raise AssertionError("\n".join(said))
    return [process.returncode for process in started]


def close(found: Any, expected: Any) -> None:
    """The same texts, and numbers to a millionth."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            close(found[name], expected[name])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for x, y in zip(found, expected):
            close(x, y)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-6, rel=1e-6)
    else:
        assert found == expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_folder, base):
    """What two processes found, whose last sweep was killed, and three, which went on with it."""
    folder = tmp_path_factory.mktemp("processes")
    assert 9 in launch(2, folder, tokenizer_folder, base, "killed") and not list(folder.glob("located-*"))
    assert launch(3, folder, tokenizer_folder, base, "") == [0, 0, 0]
    return folder


@pytest.fixture(scope="module")
def alone_here(tokenizer):
    return models(tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
def test_several_processes_find_what_one_finds(folder, alone_here, n):
    expected = json.loads(json.dumps(measured(*alone_here)))
    for index in range(n):
        close(json.loads((folder / f"found-{n}-{index}.json").read_text())["numbers"], expected)


@pytest.mark.slow
def test_a_sweep_killed_in_two_processes_goes_on_in_three_and_does_nothing_twice(folder, alone_here):
    expected = json.loads(json.dumps(located(alone_here[0], None)))
    done = 0
    for index in range(3):
        found, batches = json.loads((folder / f"located-3-{index}.json").read_text())
        close(found, expected)
        done += sum(batches[1:])  # but for the self-check, which every process makes
    assert 0 < done < len(expected[0]) - KILLED


@pytest.mark.slow
def test_each_process_trains_its_own_methods_and_all_have_the_results(folder, base, tmp_path):
    expected = json.loads(json.dumps(continued(base, tmp_path)))
    assert len(expected[1]) == 4 and len(set(expected[0]["method"])) == 3
    for index in range(3):  # the third has nothing to train
        close(json.loads((folder / f"continued-{index}.json").read_text()), expected)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
def test_an_error_of_one_process_is_raised_in_all(folder, n):
    for index in range(n):
        failed, unread, other, spread = json.loads((folder / f"found-{n}-{index}.json").read_text())["errors"]
        assert failed == "ValueError: this one" and unread.startswith("FileNotFoundError: ")
        assert "every process must make the same calls" in other and "ivlens.alone()" in other
        assert f"each of {n} processes would" in spread


@pytest.mark.slow
def test_alone_each_process_has_its_own_prompts(folder, alone_here):
    backend = backend_of(alone_here[0])
    for index in range(3):
        rows = tokenize(backend, [f"Q: {verb}\nA:" for verb in tiny.VERBS[index : index + 2]])
        expected = complete(backend, rows, {0: None}, max_new_tokens=3)[0].texts
        assert json.loads((folder / f"found-3-{index}.json").read_text())["alone"] == expected


def test_one_process_is_left_alone(monkeypatch):
    monkeypatch.delitem(sys.modules, "accelerate.state", raising=False)
    numbers = count()
    assert here() == (0, 1) and is_main() and gathered("x", "y") == ["x"] and on_main(lambda: next(numbers), "") == 0
    assert list(everyones(iter("abc"), "")) == ["a", "b", "c"]
    with alone(), joined():
        assert "accelerate.state" not in sys.modules


if __name__ == "__main__":
    with joined():
        work(Path(sys.argv[1]), sys.argv[2], sys.argv[3], bool(sys.argv[4]))
