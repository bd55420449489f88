"""Vectors of other programs read, ours written for them, and the code that makes one again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter

import ivlens as ivl
from ivlens.models.head import Head
from ivlens.vectors.vector import InstructionVector


def vector(layer=2, scale=1.5, **about):
    shares = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    return InstructionVector(shares.sum(0), (Head(0, 1), Head(1, 2)), shares, layer=layer, scale=scale, metadata=about)


def test_a_function_vector_is_read_and_written(tmp_path):
    own = vector()
    path = ivl.export_vector(own, tmp_path / "antonym.pt")
    saved = torch.load(path, weights_only=True)
    assert saved.shape == (1, 1, 32) and torch.equal(saved[0, 0], own.vector * 1.5)
    back = ivl.import_vector(path, layer=2)
    assert torch.equal(back.vector, own.vector * 1.5) and (back.layer, back.scale, back.name) == (2, 1.0, "antonym")
    torch.save(torch.ones(1, 32, dtype=torch.float16), tmp_path / "half.pt")
    assert torch.equal(ivl.import_vector(tmp_path / "half.pt").vector, torch.ones(32))


def test_nothing_in_a_file_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "done"), "w"))

    torch.save({"fv": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="it isn't read, because reading could execute it"):
        ivl.import_vector(tmp_path / "evil.pt")
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (torch.ones(3, 4, 5, 8), "vector_from_heads"),
        ({"fv": torch.ones(8)}, "holds a dict, not a tensor"),
        (torch.tensor(1.0), "no vector"),
    ],
)
def test_other_contents_are_refused(tmp_path, content, said):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=said):
        ivl.import_vector(tmp_path / "x.pt")


def test_a_control_vector_is_written_as_llama_cpp_reads_it(tmp_path):
    both = [vector(2, positions="all"), vector(1, 0.5, positions="all")]
    path = ivl.export_vector(both, tmp_path / "iv.gguf", architecture="qwen2")
    assert path == tmp_path / "iv.gguf"
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector" and fields["controlvector.model_hint"] == "qwen2"
    assert fields["controlvector.layer_count"] == 2
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    np.testing.assert_array_equal(found["direction.2"], (both[0].vector * 1.5).numpy())
    one, two = ivl.import_vector(path)
    assert (one.layer, two.layer, one.metadata["positions"]) == (1, 2, "all")
    assert torch.equal(one.vector, both[1].vector * 0.5)


def test_repengs_control_vectors_are_read(tmp_path):
    writer = GGUFWriter(tmp_path / "happy.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", 2)  # as repeng has it
    for n in (1, 2):
        writer.add_tensor(f"direction.{n}", np.full(32, n, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = ivl.import_vector(tmp_path / "happy.gguf")
    assert [(v.layer, v.vector[0].item(), v.name) for v in found] == [(1, 1.0, "happy"), (2, 2.0, "happy")]


@pytest.mark.model
def test_an_imported_control_vector_steers_at_every_position(model, tmp_path):
    own = [vector(1, 0.5, positions="all"), vector(2, 0.5, positions="all")]
    found = ivl.import_vector(ivl.export_vector(own, tmp_path / "x.gguf", architecture="llama"))
    tokens = torch.arange(5, 12)[None]
    with ivl.inject(model, own):
        expected = model(tokens)
    with ivl.inject(model, found):
        torch.testing.assert_close(model(tokens), expected)


def test_what_is_no_file_of_another_program_is_said(tmp_path):
    with pytest.raises(ValueError, match="must end in"):
        ivl.import_vector(tmp_path / "x.bin")
    with pytest.raises(FileNotFoundError, match="no file"):
        ivl.import_vector(tmp_path / "none.pt")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="truncated or no GGUF"):
        ivl.import_vector(tmp_path / "broken.gguf")


@pytest.mark.model
@pytest.mark.parametrize("way", ["heads", "difference", "residual"])
def test_a_recipe_makes_the_vector_again(base, way):
    model, task = ivl.load_model(base), ivl.load_tasks("present_past")["present_past"]
    where = {"layer": 1} if way == "residual" else {"heads": [(0, 1), (2, 3)]}
    made = ivl.extract_vector(model, task, **where, way=way, shots=1, n_prompts=3, seed=4)
    made = replace(made, layer=1, scale=0.7, metadata={**made.metadata, "positions": "all"})
    done: dict = {}
    exec(made.recipe(), done)
    assert done["iv"] == made and done["iv"].metadata["positions"] == "all"
    with pytest.raises(AssertionError, match="another vector: of another model, adapter, task or version"):
        exec((2 * made).recipe(), {})


def test_a_recipe_says_what_it_lacks():
    with pytest.raises(ValueError, match="has no model, task, n_prompts, way in its metadata"):
        vector().recipe()
    about = {"model": "smollm2", "n_prompts": 3, "way": "heads", "task": "mine", "torch": "2.13.0+cpu"}
    with pytest.raises(ValueError, match="made from a list of prompts"):
        vector(**about).recipe()
    text = vector(**about, seed=0, shots=5).recipe()
    assert "mine.jsonl" in text and "torch==2.13.0\n" in text and "heads = [(0, 1), (1, 2)]" in text
