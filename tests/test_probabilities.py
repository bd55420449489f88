"""Knowledge and instruction probability against passes by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ivlens as ivl
from ivlens.common.statistics import bootstrap_mean
from ivlens.models.backends import backend_of
from ivlens.running.tokens import tokenize
from ivlens.tasks import Example
from ivlens.tasks.prompts import Prompt
from tests import tiny

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def choice():
    records = [
        {
            "input": f"{verb}?\nA. cat\nB. dogs",
            "output": "AB"[i % 2],
            "question": f"{verb} what?",
            "content": ("cat", "dogs")[i % 2],
            "split": "test" if i < 7 else "train",
        }
        for i, verb in enumerate(tiny.VERBS)
    ]
    return ivl.Task.from_records(records, name="choice", instruction=["Say the letter.", "Another wording."])


@pytest.fixture(scope="module")
def found(model, choice):
    return ivl.answer_probabilities(model, choice, progress=False)


@torch.inference_mode()
def by_hand(model, prompt):
    row = tokenize(backend_of(model), [prompt])[0]
    logits = model(torch.tensor([row.prompt + row.answer]))[0, len(row.prompt) - 1 : -1].float().log_softmax(-1)
    return logits.gather(-1, torch.tensor([row.answer]).T).sum().item(), len(row.answer)


def test_both_probabilities_are_of_the_whole_answer_after_the_question_and_after_the_instruction(model, choice, found):
    for i, x in enumerate(choice.test):
        plain, n_plain = by_hand(model, Prompt(Example(x.question, x.content)))
        asked, n_asked = by_hand(model, Prompt(Example(x.input, x.output), instruction="Say the letter."))
        assert found.knowledge["choice"][i].item() == pytest.approx(plain, abs=2e-4)
        assert found.instruction["choice"][i].item() == pytest.approx(asked, abs=2e-4)
        assert found.per_token("knowledge", "choice")[i].item() == pytest.approx(plain / n_plain, abs=2e-4)
        assert found.tokens["choice"][i].tolist() == [n_plain, n_asked]


def test_table_has_means_and_intervals(found):
    table = found.to_dataframe().set_index("kind")
    chances = found.instruction["choice"].exp()
    assert table.loc["instruction", "probability"] == pytest.approx(chances.mean().item())
    low, high = bootstrap_mean([chances.numpy()])
    assert (table.loc["instruction", "low"], table.loc["instruction", "high"]) == (low, high)
    assert set(table["n"]) == {7} and "instruction" in repr(found)


def test_falls_are_paired_and_tested(found):
    lower = ivl.AnswerProbabilities(
        {"choice": found.knowledge["choice"] - 0.1 * found.tokens["choice"][:, 0]},
        {"choice": found.instruction["choice"] - (0.5 + 0.1 * torch.rand(7)) * found.tokens["choice"][:, 1]},
        found.tokens,
    )
    row = ivl.compare_probabilities(found, lower).iloc[0]
    assert row["knowledge_fall"] == pytest.approx(0.1, abs=1e-5) and 0.5 < row["instruction_fall"] < 0.6
    assert row["difference"] == pytest.approx(row["instruction_fall"] - row["knowledge_fall"])
    assert row["low"] <= row["difference"] <= row["high"]
    assert row["p"] == pytest.approx(2 / 2**7, abs=0.01) and row["n"] == 7
    none = ivl.compare_probabilities(found, found).iloc[0]
    assert none["p"] == 1.0 and none["difference"] == 0.0


def test_they_come_back_from_their_file(found, tmp_path):
    again = ivl.AnswerProbabilities.load(found.save(tmp_path / "p.safetensors"))
    assert again.to_dataframe().equals(found.to_dataframe()) and again.metadata == found.metadata


def test_a_task_without_content_and_unlike_tasks_are_refused(model, task, found):
    with pytest.raises(ValueError, match=r"task 'past' has no content answer to .*'question'.*'content'"):
        ivl.answer_probabilities(model, task, progress=False)
    other = ivl.AnswerProbabilities({"x": torch.zeros(2)}, {"x": torch.zeros(2)}, {"x": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="different tasks"):
        ivl.compare_probabilities(found, other)


def test_built_in_choice_tasks_have_both_answers():
    for task in ivl.load_tasks(["general_choice", "synonym_choice"]).values():
        assert all(x.question and x.content and x.output in "ABCD" for x in task.test)
        assert len(task.test) >= 100 and np.unique([x.output for x in task.test]).size == 4


def reordered(found, order):
    parts = [{"choice": getattr(found, name)["choice"][order]} for name in ("knowledge", "instruction", "tokens")]
    queries = [found.metadata["queries"]["choice"][i] for i in order]
    return ivl.AnswerProbabilities(*parts, {**found.metadata, "queries": {"choice": queries}})


def test_falls_are_paired_by_what_is_asked(found):
    mixed = reordered(found, [6, 2, 0, 1, 5, 3, 4])
    row = ivl.compare_probabilities(found, mixed).iloc[0]
    assert row["knowledge_low"] == row["knowledge_high"] == 0 and row["p"] == 1.0 and row["n"] == 7
    with pytest.raises(ValueError, match="asked different prompts of task 'choice'"):
        ivl.compare_probabilities(found, reordered(found, [0, 1, 2, 3, 4, 5]))
    few = ivl.AnswerProbabilities(found.knowledge, found.instruction, found.tokens, {**found.metadata, "shots": 3})
    with pytest.raises(ValueError, match=r"asked with .*'shots': 0.*'shots': 3"):
        ivl.compare_probabilities(found, few)


def test_repeated_queries_count_once(found):
    twice = reordered(found, [*range(7), *range(7)])
    assert set(twice.to_dataframe()["n"]) == {7}
    torch_rng = torch.Generator().manual_seed(0)
    noise = torch.rand(7, generator=torch_rng)
    lower = ivl.AnswerProbabilities(
        found.knowledge, {"choice": found.instruction["choice"] - noise}, found.tokens, found.metadata
    )
    one, two = (
        ivl.compare_probabilities(*pair) for pair in ((found, lower), (twice, reordered(lower, [*range(7)] * 2)))
    )
    assert two[["p", "n", "low"]].iloc[0].tolist() == pytest.approx(one[["p", "n", "low"]].iloc[0].tolist())
