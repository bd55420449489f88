"""Files: round trips, and files that are truncated, foreign or hold no numbers."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from ivlens.common.storage import read_tensors, write_tensors


@pytest.fixture
def path(tmp_path):
    return write_tensors(
        tmp_path / "new" / "x.safetensors", {"a": torch.arange(6.0).view(2, 3).T}, {"kind": "test", "n": [1, 2]}
    )


def test_tensors_and_description_come_back(path):
    tensors, about = read_tensors(path, kind="test")
    assert torch.equal(tensors["a"], torch.arange(6.0).view(2, 3).T) and about == {"kind": "test", "n": [1, 2]}


def test_a_failed_write_leaves_the_old_file_whole(path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_tensors(path, {"a": torch.zeros(1)})
    assert read_tensors(path)[0]["a"].shape == (3, 2)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no file .*none.safetensors; give the path of a .safetensors file that ivlens saved"
    ):
        read_tensors(tmp_path / "none.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 60, -4])
def test_a_truncated_file_is_refused(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        ValueError, match=r"x.safetensors is truncated or not a safetensors file .* save or download it again"
    ):
        read_tensors(path)


@pytest.mark.parametrize("content", [b"not tensors at all, only some text", b"\x80\x04\x95pickle"])
def test_a_file_of_another_format_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is truncated or not a safetensors file"):
        read_tensors(path)


def test_a_safetensors_file_of_somebody_else_is_refused(tmp_path, path):
    save_file({"vector": torch.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds something ivlens did not save, not head effects"):
        read_tensors(tmp_path / "other.safetensors", kind="head effects")
    with pytest.raises(ValueError, match="holds test, not head effects"):
        read_tensors(path, kind="head effects")


def test_a_description_that_is_not_json_is_refused(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors", {"about": "{not json"})
    with pytest.raises(ValueError, match="is truncated or not a safetensors file"):
        read_tensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_result_with_nan_is_refused_but_an_unfinished_sweep_may_hold_them(tmp_path, value):
    path = write_tensors(tmp_path / "x.safetensors", {"a": torch.tensor([1.0, value])}, {"kind": "test"})
    with pytest.raises(ValueError, match="a holds NaN or infinite values"):
        read_tensors(path, kind="test")
    assert not read_tensors(path)[0]["a"].isfinite().all()
