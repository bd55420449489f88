"""How prompts are built, rendered, made counterfactual and tokenized."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

import ivlens as ivl
from ivlens.models import backend_of
from ivlens.running.tokens import pad_left, tokenize
from ivlens.tasks.counterfactuals import COUNTERFACTUALS, counterfactual
from ivlens.tasks.prompts import common_stop
from tests import tiny

GO, WALK, JUMP = ivl.Example("go", "went"), ivl.Example("walk", "walked"), ivl.Example("jump", "jumped")


# -- rendering ----------------------------------------------------------------------------------------------------------


def test_styles_render_instruction_demonstrations_and_query():
    prompt = ivl.Prompt(GO, (WALK, JUMP), "Write the past form.")
    assert prompt.render() == "Write the past form.\n\nQ: walk\nA: walked\n\nQ: jump\nA: jumped\n\nQ: go\nA:"
    assert prompt.answer == " went"
    plain = replace(prompt, style="plain")
    assert plain.render() == "Write the past form.\n\nwalk\nwalked\n\njump\njumped\n\ngo\n" and plain.answer == "went"
    assert ivl.Prompt(GO).render() == "Q: go\nA:"


def test_chat_style_is_the_tokenizer_s_template_with_the_instruction_said_once(tokenizer):
    prompt = ivl.Prompt(GO, (WALK,), "Write the past form.", style="chat")
    turns = "user: Write the past form.\n\nwalk</s>\nassistant: walked</s>\nuser: go</s>\nassistant: "
    assert prompt.render(tokenizer) == f"<s>{turns}" and prompt.answer == "went"


def test_chat_style_without_a_template_says_what_to_use_instead(tokenizer):
    with pytest.raises(
        ValueError, match="style='chat' needs a tokenizer with a chat template; use style='qa' or 'plain'"
    ):
        ivl.Prompt(GO, style="chat").render(object())


# -- building -----------------------------------------------------------------------------------------------------------


def test_every_example_of_a_split_is_asked_once_by_default(task):
    for split in ("train", "valid", "test"):
        assert [p.query for p in ivl.build_prompts(task, split=split)] == list(task.split(split))


def test_demonstrations_come_from_training_and_are_never_the_query(task):
    for split in ("train", "test"):
        for prompt in ivl.build_prompts(task, n=40, shots=5, split=split):
            assert len(set(prompt.demonstrations)) == 5 and set(prompt.demonstrations) <= set(task.train)
            assert prompt.query in task.split(split) and prompt.query not in prompt.demonstrations


def test_more_prompts_than_examples_reuse_queries_with_new_demonstrations(task):
    prompts = ivl.build_prompts(task, n=len(task.train) * 2, shots=3)
    assert len(prompts) == 24 and len({p.query for p in prompts}) == 12 and len(set(prompts)) == 24


def test_a_query_that_stands_in_training_twice_is_not_shown(task):
    doubled = replace(task, train=task.train + task.train[:1])
    for prompt in ivl.build_prompts(doubled, n=30, shots=11):
        assert prompt.query not in prompt.demonstrations


def test_the_same_seed_gives_the_same_prompts_and_global_random_state_stays(task):
    state = random.getstate()
    first, again, other = (ivl.build_prompts(task, n=8, shots=3, instruction=True, seed=s) for s in (0, 0, 1))
    assert first == again and first != other and random.getstate() == state


def test_instruction_is_none_a_paraphrase_per_prompt_a_chosen_one_or_ones_own(task):
    def instructions(choice):
        return {p.instruction for p in ivl.build_prompts(task, instruction=choice)}

    assert instructions(False) == {None} and instructions(True) == set(task.instructions)
    assert instructions(1) == {task.instructions[1]} and instructions(0) == {task.instructions[0]}
    assert instructions("Do it!") == {"Do it!"}


def test_bad_arguments_are_refused(task):
    with pytest.raises(ValueError, match="style='json' is unknown; choose one of plain, qa, chat"):
        ivl.build_prompts(task, style="json")
    with pytest.raises(ValueError, match="split='dev' is unknown; choose one of train, valid, test"):
        ivl.build_prompts(task, split="dev")
    with pytest.raises(
        ValueError,
        match="shots=12 needs at least 13 training examples with different inputs, but task 'past' has 12; use fewer shots",
    ):
        ivl.build_prompts(task, shots=12)
    with pytest.raises(ValueError, match="task 'past' has no examples in its 'valid' split"):
        ivl.build_prompts(replace(task, valid=()), split="valid")


# -- counterfactuals ----------------------------------------------------------------------------------------------------


@pytest.fixture
def prompts(task):
    return ivl.build_prompts(task, n=12, shots=4, instruction=True)


def test_every_counterfactual_keeps_query_answer_and_style_and_repeats_for_a_seed(prompts, task, other_task, tokenizer):
    for kind in COUNTERFACTUALS:
        options = {"tasks": [task, other_task], "tokenizer": tokenizer}
        broken = counterfactual(prompts, kind, **options)
        assert [(b.query, b.answer, b.style, b.task) for b in broken] == [
            (p.query, p.answer, p.style, p.task) for p in prompts
        ]
        assert all(b != p for b, p in zip(broken, prompts)), kind
        assert broken == counterfactual(prompts, kind, **options)
        if kind in ("shuffled_labels", "random_text"):  # the others have nothing to draw here
            assert broken != counterfactual(prompts, kind, seed=1, **options)


def test_shuffled_labels_keeps_inputs_and_permutes_outputs(prompts):
    for broken, prompt in zip(counterfactual(prompts, "shuffled_labels"), prompts):
        assert [x.input for x in broken.demonstrations] == [x.input for x in prompt.demonstrations]
        assert sorted(x.output for x in broken.demonstrations) == sorted(x.output for x in prompt.demonstrations)
        assert broken.instruction == prompt.instruction


def test_shuffled_labels_of_two_demonstrations_are_always_swapped_and_equal_ones_stay(task):
    prompts = ivl.build_prompts(task, n=20, shots=2)
    for broken, prompt in zip(counterfactual(prompts, "shuffled_labels"), prompts):
        assert [x.output for x in broken.demonstrations] == [x.output for x in prompt.demonstrations][::-1]
    same = ivl.Prompt(GO, (WALK, WALK, WALK))
    assert counterfactual([same], "shuffled_labels") == [same]


def test_no_instruction_leaves_the_bare_query(prompts):
    assert {(b.instruction, b.demonstrations) for b in counterfactual(prompts, "no_instruction")} == {(None, ())}


def test_other_instruction_is_another_task_s(prompts, task, other_task):
    broken = counterfactual(prompts, "other_instruction", tasks=[task, other_task])
    assert {(b.instruction, b.demonstrations) for b in broken} == {("Write the plural form.", ())}


@pytest.mark.parametrize("style", ["qa", "plain", "chat"])
@pytest.mark.parametrize("shots", [0, 4])
def test_random_text_is_about_as_long_as_what_it_replaces(task, tokenizer, style, shots):
    prompts = ivl.build_prompts(task, n=8, shots=shots, instruction=True, style=style)
    for broken, prompt in zip(counterfactual(prompts, "random_text", tokenizer=tokenizer), prompts):
        lengths = [len(tokenizer.encode(p.render(tokenizer), add_special_tokens=False)) for p in (broken, prompt)]
        # a chat template wraps every turn in tokens of its own, which count as template and not as instruction
        assert abs(lengths[0] - lengths[1]) <= (4 if style != "chat" else 4 + 12 * shots)
        assert prompt.instruction not in broken.instruction and broken.demonstrations == ()


def test_counterfactuals_that_cannot_be_made_say_why(task, prompts):
    bare = ivl.build_prompts(task, n=1, shots=1)
    with pytest.raises(
        ValueError, match="'shuffled_labels' needs shots >= 2; use 'no_instruction' or 'random_text' instead"
    ):
        counterfactual(bare, "shuffled_labels")
    with pytest.raises(ValueError, match="'other_instruction' needs at least two tasks; pass more tasks"):
        counterfactual(prompts, "other_instruction", tasks=[task])
    with pytest.raises(
        ValueError, match="counterfactual='none' is unknown; choose one of shuffled_labels, no_instruction"
    ):
        counterfactual(prompts, "none")


# -- tokens -------------------------------------------------------------------------------------------------------------


@pytest.mark.model
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_tokens_are_the_model_s_own(load, name):
    """With a BOS for models that want one, without for those that don't."""
    model = load(name)
    for text in ("Q: walk\nA:", "plain text", "<s>already there"):
        (row,) = tokenize(backend_of(model), [text])
        expected = model.tokenizer.encode(text, add_special_tokens=False)
        if model.cfg.default_prepend_bos and not text.startswith("<s>"):
            expected = [model.tokenizer.bos_token_id, *expected]
        assert list(row.prompt) == expected and row.answer == ()
    assert list(tokenize(backend_of(model), ["Q: walk"])[0].prompt) == model.to_tokens("Q: walk")[0].tolist()


@pytest.mark.model
def test_chat_prompts_have_one_bos(model, task):
    bos = model.tokenizer.bos_token_id
    for row in tokenize(backend_of(model), ivl.build_prompts(task, n=3, shots=2, style="chat")):
        assert row.prompt[0] == bos and row.prompt.count(bos) == 1


@pytest.mark.model
@pytest.mark.parametrize("style", ["qa", "plain", "chat"])
def test_prompt_and_answer_tokens_are_those_of_the_whole_text(model, task, style):
    prompts = ivl.build_prompts(task, n=6, shots=2, style=style)
    for row, prompt in zip(tokenize(backend_of(model), prompts), prompts):
        text = prompt.render(model.tokenizer) + prompt.answer
        assert model.tokenizer.decode(row.prompt + row.answer).removeprefix("<s>") == text.removeprefix("<s>")
        assert model.tokenizer.decode(row.answer).strip() == prompt.query.output
        assert model.tokenizer.decode(row.answer[:1]).strip(), "the first answer token says something"


@pytest.mark.model
def test_answers_given_as_texts_continue_texts_and_tensors_exactly(model):
    backend, prompt = backend_of(model), tiny.tokens(5)[0]
    rows = tokenize(backend, ["Q: walk\nA:", prompt], [" 7%", "7%"])
    assert [model.tokenizer.decode(row.answer) for row in rows] == [" 7%", "7%"]
    assert rows[1].prompt == tuple(prompt.tolist())


@pytest.mark.model
def test_bad_prompts_and_answers_are_named(load, model):
    backend = backend_of(model)
    with pytest.raises(ValueError, match="no prompts given; pass at least one"):
        tokenize(backend, [])
    with pytest.raises(ValueError, match="2 prompts but 1 answers; give one answer per prompt"):
        tokenize(backend, ["a", "b"], ["c"])
    for answer in ("", "é"):
        with pytest.raises(
            ValueError, match=rf"answer 1 \('{answer}'\) tokenizes to nothing; give every prompt an answer"
        ):
            tokenize(backend, ["a", "b"], ["c", answer])
    with pytest.raises(ValueError, match="prompt 1 tokenizes to nothing; give it some text"):
        tokenize(backend_of(load("gpt_neox")), ["a", ""])
    with pytest.raises(
        ValueError, match=r"prompt 0 has 128 tokens and its answer 1, but .* has a context of 128; use fewer"
    ):
        tokenize(backend, tiny.tokens(128), ["7"])
    assert len(tokenize(backend, tiny.tokens(127), ["7"])[0].prompt) == 127


def test_pad_left_fills_up_on_the_left_and_masks_it():
    tokens, mask = pad_left([(5, 6, 7), (8,)], 2)
    assert torch.equal(tokens, torch.tensor([[5, 6, 7], [2, 2, 8]]))
    assert torch.equal(mask, torch.tensor([[1, 1, 1], [0, 0, 1]]))


def test_an_answer_of_several_lines_does_not_end_with_its_first():
    one, two = ivl.Prompt(ivl.Example("a", "b")), ivl.Prompt(ivl.Example("a", "b\nbecause"))
    assert common_stop([one, one]) == "\n" and common_stop([one, two]) is None
