"""A vector saved here works the same in a new process, also on the other kind of hooked model."""

import subprocess
import sys

import pytest
import torch

import ivlens as ivl
from ivlens.common.storage import read_tensors
from ivlens.models.head import Head
from tests import tiny

pytestmark = pytest.mark.model

ELSEWHERE = """
import sys, torch, ivlens as ivl
from ivlens.common.storage import write_tensors
folder, backend = sys.argv[1:]
model = ivl.load_model(folder + "/model", backend=backend)
with torch.inference_mode(), ivl.InstructionVector.load(folder + "/vector").inject(model, layer=1, scale=2.0):
    write_tensors(folder + "/logits.safetensors", {"logits": model(torch.tensor([[5, 9, 30, 41, 7]]))})
"""


@pytest.mark.parametrize("backend", ["bridge", "hooked"] if tiny.HOOKED else ["bridge"])
@pytest.mark.slow
def test_vector_gives_the_same_logits_in_a_new_process(backend, task, tokenizer, tmp_path):
    tiny.hf_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model = ivl.load_model(tmp_path / "model")
    vector = ivl.extract_vector(model, task, [Head(0, 1), Head(2, 3)], shots=2, n_prompts=4)
    vector.save(tmp_path / "vector")
    with torch.inference_mode(), vector.inject(model, layer=1, scale=2.0):
        here = model(torch.tensor([[5, 9, 30, 41, 7]]))
    subprocess.run([sys.executable, "-c", ELSEWHERE, str(tmp_path), backend], check=True)
    there = read_tensors(tmp_path / "logits.safetensors")[0]["logits"]
    assert (here - there).abs().max() <= 1e-4
    with torch.inference_mode():
        assert (model(torch.tensor([[5, 9, 30, 41, 7]])) - here).abs().max() > 1e-2  # the vector did something
