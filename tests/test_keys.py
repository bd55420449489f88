"""The one key: the same for equal things only, in every process."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ivlens.common.keys import differences, files_key, key, recorded, weights_fingerprint
from ivlens.training.methods import METHODS
from ivlens.vectors.vector import InstructionVector
from tests import tiny

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=200)
@given(PLAIN, PLAIN)
def test_plain_values_share_a_key_only_where_they_are_written_alike(one, two):
    def written(value):  # mappings in any order
        if isinstance(value, dict):
            return "map" + repr(sorted((k, written(v)) for k, v in value.items()))
        return repr([written(v) for v in value]) if isinstance(value, list) else repr(value)

    assert (key(one) == key(two)) == (written(one) == written(two))


def test_types_order_and_borders_count():
    apart = [0, False, "0", 0.0, None, "", [], {}, [[]], b"0", Path("0"), torch.tensor(0), torch.tensor(False), {0}]
    assert len({key(x) for x in apart}) == len(apart)
    assert key("a", "b") != key("ab") and key([1], 2) != key([1, 2]) and key(a=1) != key(b=1)
    assert key((1, 2)) == key([1, 2]) and key({1, 2, 3}) == key({3, 2, 1})


def test_tensors_count_by_dtype_shape_and_bytes():
    x = torch.arange(6.0)
    assert key(x) == key(x.clone()) == key(torch.stack([x, x], 1)[:, 0])
    apart = [x, x.double(), x.bfloat16(), x.view(2, 3), x + 1e-6, x.flip(0)]
    assert len({key(y) for y in apart}) == len(apart)


def test_every_field_of_a_value_counts():
    vector = InstructionVector(torch.ones(3), layer=1)
    others = [{"layer": 2}, {"layer": None}, {"scale": 2.0}, {"vector": torch.zeros(3)}, {"metadata": {"task": "x"}}]
    assert len({key(vector), *(key(replace(vector, **other)) for other in others)}) == 1 + len(others)
    assert len({key(method) for method in METHODS.values()}) == len(METHODS)
    assert key(METHODS["ewc"]) != key(replace(METHODS["ewc"], n_examples=1))


def test_what_it_cannot_tell_apart_is_refused():
    for unknown in (lambda x: x, object(), iter([1])):
        with pytest.raises(TypeError, match="has no key by which results kept for it"):
            key(unknown)
    assert key(torch.relu) != key(torch.tanh) and key(InstructionVector) != key(torch.nn.Linear)


@pytest.mark.slow
def test_a_peft_config_has_the_same_key_in_every_process():
    script = (
        "from peft import LoraConfig\nfrom ivlens.common.keys import key\n"
        "print(key(LoraConfig(r=4, target_modules=['q_proj', 'k_proj', 'v_proj', 'o_proj'])))"
    )
    keys = {
        subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(keys) == 1


def test_a_model_is_its_weights_dtype_configuration_and_adapters_as_they_are_switched():
    from peft import LoraConfig, get_peft_model

    plain = key(tiny.hf_model("llama"))
    assert plain == key(tiny.hf_model("llama")) != key(tiny.hf_model("llama").to(torch.bfloat16))
    assert plain != key(tiny.hf_model("llama", rms_norm_eps=0.1))
    model = get_peft_model(tiny.hf_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    seen = {plain, key(model)}
    with model.disable_adapter():
        seen.add(key(model))
    model.merge_adapter()
    seen.add(key(model))
    model.unmerge_adapter()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("second")
    seen.add(key(model))
    weight = next(w for n, w in model.named_parameters() if "lora_B" in n)
    weight.data.flatten()[1] += 1e-6
    seen.add(key(model))
    assert len(seen) == 6


def test_one_number_of_a_large_weight_is_enough():
    model = torch.nn.Linear(300, 300)
    before, fingerprint = key(model), weights_fingerprint(model)
    assert key(model) == before
    with torch.no_grad():
        model.weight[123, 45] += 1e-7
    assert key(model) != before and weights_fingerprint(model) == fingerprint


def test_files_count_by_name_and_contents(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 200_000)
    first = files_key(tmp_path)
    (tmp_path / "a").write_bytes(b"x" * 199_999 + b"y")
    second = files_key(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({first, second, files_key(tmp_path)}) == 3


def test_a_record_says_what_differs():
    def record(seed, data, flag):
        return recorded({"seed": seed, "data": data, "flag": flag}, {"data": "past"})

    assert not differences(record(0, "x", 0), record(0, "x", 0))
    assert differences(record(0, "x", 0), record(0, "y", False)) == "flag: 0 there, False now"
    assert differences(record(0, "x", 0), record(0, "y", 0)) == "data: other contents than there"


def test_a_long_bias_has_a_key_that_changes_with_any_number_in_it():
    bias = torch.nn.Linear(1, 70_000)
    before = key(bias)
    with torch.no_grad():
        bias.bias[12_345] += 1
    assert key(bias) != before
