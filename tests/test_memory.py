"""Batches and sweeps begin with what the device has free, and means over prompts keep nothing of each."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ivlens as ivl
from ivlens.models.backends import backend_of
from ivlens.patching import head_effects, mean_head_outputs
from ivlens.running import batches, memory, replay
from ivlens.running.memory import MASK_SHARE, prompts_at_once, rows_at_once
from ivlens.running.reading import read_prompts
from ivlens.running.tokens import TokenizedPrompt
from tests import tiny


def rows_of(*lengths):
    return [TokenizedPrompt(tuple(x.tolist())) for x in tiny.tokens(*lengths)]


def test_what_is_free_is_the_least_of_machine_and_container_and_each_process_has_its_part(model, monkeypatch, tmp_path):
    backend = backend_of(model)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=8_000))
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.free_memory(backend) == 8_000
    (tmp_path / "memory.current").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("anon 4000\ninactive_file 900\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory(backend) == 8_000
    (tmp_path / "memory.max").write_text("6000\n")
    assert memory.free_memory(backend) == 6_000 - 5_000 + 900
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.free_memory(backend) == 475


@pytest.mark.parametrize("prefix", [0, 7, 100])
@given(st.integers(1, 10**11))
def test_a_sweep_s_mask_keeps_to_its_share(model, prefix, free):
    rows = rows_at_once(backend_of(model), free, prefix)
    size = next(model.parameters()).element_size()
    assert rows == 1 or rows * (prefix + rows) * (size + 2) <= MASK_SHARE * free
    assert rows <= rows_at_once(backend_of(model), 2 * free, prefix)


def test_the_masks_that_are_made_keep_to_it_too(model, monkeypatch):
    prompts, free, seen = tiny.tokens(9, 12, 14), 100_000, []
    expected = head_effects(model, prompts, ["7"] * 3, torch.zeros(3, 4, 8))
    made = replay.copy_masks

    def measured(*args):
        masks = made(*args)
        seen.append(sum(x.numel() for x in {id(x): x for x in masks}.values()))
        return masks

    monkeypatch.setattr(replay, "copy_masks", measured)
    monkeypatch.setattr(replay, "free_memory", lambda backend: free)
    effects = head_effects(model, prompts, ["7"] * 3, torch.zeros(3, 4, 8))
    assert 0 < max(seen) * 6 <= MASK_SHARE * free and len(seen) > 3, "in several passes"
    torch.testing.assert_close(effects, expected, atol=1e-6, rtol=0)


def test_where_less_is_free_batches_are_smaller_and_the_numbers_the_same(model, monkeypatch):
    backend, rows, sizes = backend_of(model), rows_of(*[5, 9] * 10, 60), []
    expected = read_prompts(backend, rows, z=True).z
    forward = type(backend).forward

    def counted(self, tokens, mask, **options):
        sizes.append((len(tokens), tokens.shape[1]))
        return forward(self, tokens, mask, **options)

    monkeypatch.setattr(type(backend), "forward", counted)
    assert torch.equal(read_prompts(backend, rows, z=True).z, expected) and max(sizes)[0] == 16
    for free in (1_000, 1_000_000, 2_000_000):
        monkeypatch.setattr(batches, "free_memory", lambda backend, free=free: free)
        sizes.clear()
        torch.testing.assert_close(read_prompts(backend, rows, z=True).z, expected, atol=1e-5, rtol=1e-5)
        assert sum(n for n, _ in sizes) == len(rows)
        assert all(n <= prompts_at_once(backend, free, width, 0) for n, width in sizes)
        assert max(n for n, _ in sizes) == (1 if free == 1_000 else 16), (
            "one long prompt doesn't make all batches small"
        )


def test_a_batch_size_must_be_one_or_more(model):
    with pytest.raises(ValueError, match="batch_size=-1 must be at least 1"):
        read_prompts(backend_of(model), rows_of(5), batch_size=-1)


def test_means_keep_nothing_of_a_prompt(model, monkeypatch, task):
    """Only sums leave a batch, whatever the number of prompts."""
    from ivlens.patching import heads

    left, original = [], heads.read_batches

    def watched(*args, **options):
        for index, (counted, sums) in original(*args, **options):
            left.append([tuple(x.shape) for x in sums])
            yield index, (counted, sums)

    monkeypatch.setattr(heads, "read_batches", watched)
    prompts = ivl.build_prompts(task, n=12, split="train", shots=1)
    found = mean_head_outputs(model, prompts, batch_size=5)
    vector = ivl.extract_vector(model, prompts, [(0, 1)], batch_size=5)
    assert left == [[(3, 4, 8), (3,)]] * 3 + [[(3, 4, 8), (3,), (3, 32)]] * 3
    each = torch.stack([mean_head_outputs(model, [prompt]) for prompt in prompts])
    torch.testing.assert_close(found, each.mean(0), atol=1e-5, rtol=1e-5)
    assert len(vector.metadata["projections"]) == 3
