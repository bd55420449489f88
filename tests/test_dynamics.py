"""Before and after: snapshots against plain passes by hand, adapters switched on one base, skipped and refused checkpoints."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

import ivlens as ivl
from ivlens.common.statistics import bootstrap_share, correlation, sign_flip
from ivlens.dynamics import Change
from ivlens.models.backends import backend_of
from ivlens.models.checkpoints import open_checkpoints
from ivlens.models.head import Head
from ivlens.running.tokens import tokenize
from ivlens.tasks.prompts import build_prompts
from ivlens.training import fine_tune
from tests import tiny

pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("ignore")]

HEADS = [Head(0, 1), Head(1, 2), Head(2, 0)]
LOOK = {"shots": 2, "n_prompts": 6, "n_mean": 5, "progress": False}


@pytest.fixture(scope="module")
def task(base, task):
    """With the base's own words as answers, where they are: a hit rate of 0 would equal any other."""
    return tiny.answered(ivl.load_model(base, backend="bridge"), task, n=6, shots=2, seed=0)


@pytest.fixture(scope="module")
def run(base, task, tmp_path_factory):
    options = {"steps": 4, "batch_size": 3, "learning_rate": 2e-2, "progress": False}
    return fine_tune(base, task, folder=tmp_path_factory.mktemp("run"), save_every=2, **options)


@pytest.fixture(scope="module")
def change(base, run, task, other_task):
    return ivl.track(run.folder, [task, other_task], HEADS, model=base, **LOOK)


def test_checkpoints_of_a_run_are_opened_in_order_with_their_steps(base, run):
    opened, broken = open_checkpoints(base, [run.folder])
    assert [(c.label, c.step) for c in opened] == [("base", 0), ("checkpoint-2", 2), ("checkpoint-4", 4)]
    assert not broken


def test_switched_adapters_give_the_logits_of_each_loaded_alone_and_share_the_base(base, run):
    opened, _ = open_checkpoints(base, run.checkpoints)
    tokens, mask = torch.tensor([[5, 9, 30, 41, 7]]), torch.ones(1, 5, dtype=torch.long)
    models, seen = [], []
    for checkpoint in [*opened, *reversed(opened)]:  # there and back
        with checkpoint.use() as model, torch.inference_mode():
            models.append(model)
            seen.append(backend_of(model).forward(tokens, mask, keep=5))
    assert all(model is models[0] for model in models)
    for i, adapter in enumerate([None, *run.checkpoints]):
        alone = ivl.load_model(base, adapter=adapter, backend="bridge")
        with torch.inference_mode():
            expected = backend_of(alone).forward(tokens, mask, keep=5)
        torch.testing.assert_close(seen[i], expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(seen[-1 - i], expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)


def test_weight_distance_of_an_adapter_is_that_of_the_merged_weights(base, run):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base)
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(run.final)).merge_and_unload()
    pairs = zip(plain.parameters(), merged.parameters(), strict=True)
    expected = sum((a - b).double().square().sum().item() for a, b in pairs) ** 0.5
    opened, _ = open_checkpoints(base, [run.final])
    with opened[1].use() as model:
        assert opened[1].distance(model) == pytest.approx(expected, rel=1e-4)
    merged.save_pretrained(run.folder / "merged")
    shutil.copy(f"{base}/tokenizer.json", run.folder / "merged")
    shutil.copy(f"{base}/tokenizer_config.json", run.folder / "merged")
    opened, _ = open_checkpoints(base, [run.folder / "merged"])  # a whole model beside the base
    with opened[1].use() as model:
        assert opened[1].distance(model) == pytest.approx(expected, rel=1e-4)


@torch.inference_mode()
def by_hand(model, vector_prompts, test_prompts, base_vector):
    """Vector, hidden similarity per layer and accuracy, one prompt at a time without padding."""
    backend = backend_of(model)
    z, hidden, hits = [], [], []
    for row in tokenize(backend, vector_prompts):
        _, cache = model.run_with_cache(torch.tensor([row.prompt]))
        z.append([cache[f"blocks.{h.layer}.attn.hook_z"][0, -1, h.head] for h in HEADS])
    means = [torch.stack([row[i] for row in z]).mean(0) for i in range(len(HEADS))]
    shares = []
    for mean, head in zip(means, HEADS):
        whole = torch.zeros(backend.n_heads, backend.d_head)
        whole[head.head] = mean
        shares.append(backend.head_shares(head.layer, whole)[head.head])
    vector = torch.stack(shares).sum(0)
    reference = vector if base_vector is None else base_vector
    for row in tokenize(backend, test_prompts):
        answer, at = list(row.answer), len(row.prompt) - 1
        logits, cache = model.run_with_cache(torch.tensor([row.prompt + row.answer]))
        states = torch.stack([cache[f"blocks.{i}.hook_resid_post"][0, at] for i in range(backend.n_layers)])
        hidden.append(torch.nn.functional.cosine_similarity(states, reference[None], dim=-1))
        hits.append(float(logits[0, at:-1].argmax(-1).tolist() == answer))
    return vector, torch.stack(hidden).mean(0), hits


def test_snapshots_equal_plain_passes_by_hand(base, run, change, task):
    options = {"shots": 2, "seed": 0}
    mean = build_prompts(task, n=5, split="train", **options)
    test = build_prompts(task, n=6, split="test", **options)
    start = None
    for snapshot, adapter in zip(change.snapshots, [None, *run.checkpoints]):
        model = ivl.load_model(base, adapter=adapter, backend="bridge")
        vector, hidden, hits = by_hand(model, mean, test, start)
        start = vector if start is None else start
        torch.testing.assert_close(snapshot.vectors["past"].vector, vector, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(snapshot.hidden["past"], hidden, atol=1e-4, rtol=1e-4)
        assert snapshot.accuracy["past"].tolist() == hits and 0 < sum(hits) < len(hits)


def test_similarity_is_one_at_the_base_and_falls_with_training(change):
    similarity = change.similarity()
    assert list(similarity.index) == ["base", "checkpoint-2", "checkpoint-4"]
    assert similarity.loc["base"].tolist() == pytest.approx([1.0, 1.0])
    assert (similarity.loc["checkpoint-4"] < 0.99999).all()
    heads = change.head_similarity()
    assert len(heads) == 2 * 2 * 3 and set(heads["head"]) == {"L0H1", "L1H2", "L2H0"}
    one = heads.query("checkpoint == 'checkpoint-4' and task == 'past' and head == 'L1H2'")["similarity"].item()
    old, new = (change.snapshots[i].vectors["past"].shares[1] for i in (0, 2))
    assert one == pytest.approx((old @ new / old.norm() / new.norm()).item(), rel=1e-5)


def test_table_points_and_correlations(change):
    frame = change.to_dataframe()
    assert len(frame) == 3 * 2 and (frame["low"] <= frame["accuracy"]).all() and set(frame["n"]) == {6}
    points = change.points()
    assert len(points) == 4
    first = points.query("checkpoint == 'checkpoint-2' and task == 'past'").iloc[0]
    before = frame.query("checkpoint == 'base' and task == 'past'").iloc[0]
    after = frame.query("checkpoint == 'checkpoint-2' and task == 'past'").iloc[0]
    assert first["accuracy_change"] == pytest.approx(after["accuracy"] - before["accuracy"])
    assert first["hidden_similarity"] == pytest.approx(after["hidden_similarity"] - before["hidden_similarity"])
    assert list(change.correlations()["predictor"]) == ["iv_similarity", "hidden_similarity", "weight_distance"]


def test_change_comes_back_from_its_folder(change, tmp_path):
    again = Change.load(change.save(tmp_path))
    assert again.to_dataframe().equals(change.to_dataframe()) and "accuracy" in repr(again)
    assert again.metadata == change.metadata
    (tmp_path / "change.json").write_text('{"snap')
    with pytest.raises(ValueError, match="truncated or not JSON"):
        Change.load(tmp_path)


def test_compare_of_two_models_locates_heads_on_both(base, run, task, other_task):
    before, after = (ivl.load_model(base, adapter=a, backend="bridge") for a in (None, run.final))
    change = ivl.compare(before, after, [task, other_task], HEADS, n_effects=3, **LOOK)
    overlap = change.overlap(k=3).set_index("task")
    for name in ("past", None):
        tops = [set(s.effects.top(3, name)) for s in change.snapshots]
        expected = len(tops[0] & tops[1]) / len(tops[0] | tops[1])
        assert overlap.loc[name or "all tasks", "jaccard"] == pytest.approx(expected)
    assert -1 <= overlap.loc["past", "spearman"] <= 1
    assert {"head_overlap", "effects_spearman"} <= set(change.correlations()["predictor"])
    identical = ivl.compare(before, before, [task], HEADS, n_effects=3, **LOOK)
    assert identical.overlap()["jaccard"].tolist() == [1.0, 1.0]


def test_a_checkpoint_with_a_missing_file_is_left_out_and_the_rest_survives(base, run, task, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(run.final, tmp_path / name)
    (tmp_path / "one" / "adapter_model.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"one left out: .* has no adapter_model\.safetensors"):
        change = ivl.track([tmp_path / "one", tmp_path / "two"], task, HEADS, model=base, **LOOK)
    assert [s.label for s in change.snapshots] == ["base", "two"] and list(change.skipped) == ["one"]


def test_other_architectures_vocabularies_and_bases_are_refused(base, run, load, model, task, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="another architecture or vocabulary"):
        ivl.compare(ivl.load_model(base, backend="bridge"), load("gpt2"), task, HEADS, **LOOK)
    other = tiny.hf_model("llama")
    with torch.no_grad():
        next(other.parameters()).add_(0.1)
    other.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was trained on another base model"):
        ivl.track([run.final], task, HEADS, model=str(tmp_path), **LOOK)
    with pytest.raises(ValueError, match="can't be put on a model that is hooked already"):
        ivl.track([run.final], task, HEADS, model=model, **LOOK)
    with pytest.raises(ValueError, match="no checkpoints given"):
        ivl.track([], task, HEADS, model=base, **LOOK)


def test_an_interrupted_track_goes_on_from_its_folder(base, run, task, tmp_path, monkeypatch):
    from ivlens.dynamics import tracking

    taken = []
    original = tracking.take_snapshot

    def counted(*args, **options):
        if len(taken) == 2:
            raise KeyboardInterrupt
        taken.append(options["label"])
        return original(*args, **options)

    monkeypatch.setattr(tracking, "take_snapshot", counted)
    with pytest.raises(KeyboardInterrupt):
        ivl.track(run.folder, task, HEADS, model=base, folder=tmp_path, **LOOK)
    taken.clear()
    change = ivl.track(run.folder, task, HEADS, model=base, folder=tmp_path, **LOOK)
    assert taken == ["checkpoint-4"] and len(change.snapshots) == 3
    assert Change.load(tmp_path).similarity().equals(change.similarity())


# -- statistics ----------------------------------------------------------------------------------------------------------


def test_sign_flip_agrees_with_all_flips():
    values = np.random.default_rng(1).normal(0.4, 1, size=10)
    flips = np.array(np.meshgrid(*[[-1, 1]] * 10)).reshape(10, -1)
    exact = (np.abs(flips.T @ values) >= abs(values.sum()) - 1e-12).mean()
    assert sign_flip([values]) == pytest.approx(exact, abs=0.02)


def test_correlation_against_numpy_and_ranks_by_hand():
    rng = np.random.default_rng(0)
    x = rng.normal(size=200)
    y = x + rng.normal(size=200)
    found = correlation(x, y)
    assert found["r2"] == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)
    ranks = [np.argsort(np.argsort(v)) for v in (x, y)]
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert found["r2_low"] < found["r2"] < found["r2_high"] and found["r2_high"] - found["r2_low"] < 0.25


def test_groups_are_resampled_whole():
    x = np.repeat(np.arange(6.0), 50)
    y = x + np.repeat([2.0, -2, 1, -1, 2, -2], 50)
    loose, whole = correlation(x, y), correlation(x, y, groups=[str(i) for i in x])
    assert loose["r2"] == whole["r2"] and whole["r2_high"] - whole["r2_low"] > 2 * (loose["r2_high"] - loose["r2_low"])


def test_a_share_is_summed_gains_over_summed_losses():
    one = np.array([[1, 0, 1]] * 30 + [[1, 1, 1]] * 70, float)  # lost 30 points, all of them returned
    two = np.array([[1, 0, 0]] * 10 + [[1, 1, 1]] * 90, float)  # lost 10, none returned
    share, low, high = bootstrap_share([one, two])
    assert share == pytest.approx(0.75) and low < 0.75 < high


def test_a_share_of_a_loss_that_may_be_none_has_no_interval():
    rows = np.array([[1, 0, 1]] * 6 + [[0, 1, 1]] * 4 + [[1, 1, 1]] * 90, float)
    share, low, high = bootstrap_share([rows])
    assert share == pytest.approx(3.0) and np.isnan([low, high]).all()
    assert np.isnan(bootstrap_share([np.ones((5, 3))])).all()
