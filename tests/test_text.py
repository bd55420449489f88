"""Text in, tokens out, and answers compared: templates, special tokens, ends, scripts, choices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ivlens as ivl
from ivlens.continual.scoring import Scoring, free_text, score_task, scored_prompts
from ivlens.models import backend_of
from ivlens.running import batches
from ivlens.running.decoding import complete
from ivlens.running.scores import exact_match, rouge_l
from ivlens.running.tokens import TokenizedPrompt, tokenize
from ivlens.tasks.chat import chat_parts
from ivlens.training.data import answer_dataset
from tests import tiny

QUICK = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEMPLATES = {
    "space before the answer": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "no BOS": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "no opening": "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}",
    "stripped": "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
}  # fmt: skip


@pytest.fixture
def with_template(tokenizer, tmp_path):
    """A tiny model's backend, and its tokenizer with another chat template."""
    from transformers import AutoTokenizer

    def make(template):
        tokenizer.save_pretrained(tmp_path)
        changed = AutoTokenizer.from_pretrained(tmp_path)
        changed.chat_template = template
        backend = backend_of(ivl.load_model(tiny.hf_model("llama"), tokenizer=changed))
        return backend, changed

    return make


@pytest.mark.model
@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_prompt_and_answer_begin_as_the_template_s_own_conversation(with_template, name):
    backend, tokenizer = with_template(TEMPLATES[name])
    prompt = ivl.Prompt(ivl.Example("go", "went"), (ivl.Example("walk", "walked"),), "Past form.", style="chat")
    row = tokenize(backend, [prompt])[0]
    turns = [("user", "Past form.\n\nwalk"), ("assistant", "walked"), ("user", "go"), ("assistant", "went")]
    text = tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in turns], tokenize=False)
    whole = tokenizer.encode(text, add_special_tokens=False)
    mine = [*row.prompt, *row.answer]
    assert mine == whole[: len(mine)] and tokenizer.decode(row.answer).strip() == "went"
    trained = answer_dataset(backend, [prompt])[0]
    assert trained["input_ids"] == whole[: len(mine) + 1], "and ends as there"


def test_options_of_the_template_are_told_and_today_is_a_fixed_day(tokenizer):
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{{ strftime_now('%d %b %Y') }}|{% for m in messages %}{{ m.role }}={{ m.content }}|{% endfor %}"
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    )
    prompt = ivl.Prompt(ivl.Example("go", "went"), style="chat")
    assert prompt.render(tokenizer) == "01 Jan 2025|user=go|<think></think>"
    told = (("date", "2031-01-02"), ("enable_thinking", True), ("system", "Be brief."))
    prompt = ivl.Prompt(ivl.Example("go", "went"), style="chat", template=told)
    assert prompt.render(tokenizer) == "02 Jan 2031|system=Be brief.|user=go|assistant="
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ValueError, match=r"the chat template refuses this conversation \(no system role\)"):
        chat_parts(tokenizer, [{"role": "user", "content": "x"}], {})


@pytest.mark.model
@QUICK
@given(
    st.lists(st.sampled_from(["<s>", "</s>", "<pad>", "<s", "walk", " a", ":", "\n"]), min_size=1, max_size=5).map(
        "".join
    )
)
def test_data_never_becomes_a_special_token(model, text):
    backend = backend_of(model)
    special = set(backend.tokenizer.all_special_ids)
    query = ivl.Example(f"{text}y", f"x{text}y")
    for style in ("qa", "plain", "chat"):
        plain = tokenize(backend, [ivl.Prompt(ivl.Example("x", "y"), style=style)])[0]
        row = tokenize(backend, [ivl.Prompt(query, style=style)])[0]
        assert sum(t in special for t in row.prompt) == sum(t in special for t in plain.prompt)
        assert not special & set(row.answer)
        assert backend.tokenizer.decode([*row.prompt, *row.answer]).count(f"{text}y") >= 2


@pytest.mark.model
def test_every_end_of_the_model_s_own_generation_ends_an_answer(tokenizer):
    hf, ids = tiny.hf_model("llama"), tiny.tokens(9)[0]
    with torch.no_grad():
        first = int(hf(ids[None]).logits[0, -1].argmax())
    hf.generation_config.eos_token_id = [1, first]
    backend = backend_of(ivl.load_model(hf, tokenizer=tokenizer))
    rows = [TokenizedPrompt(tuple(ids.tolist()))]
    assert complete(backend, rows, {"": None}, max_new_tokens=3, stop=None)[""].texts == [""]
    assert backend.end_tokens == (1, first)


@pytest.mark.parametrize(
    "text", ["天气很好", "хорошая погода", "الطقس جميل", "schönes Wetter für Übermütige", "अच्छा मौसम", "สวัสดี", "42 km"]
)
def test_rouge_of_a_text_with_itself_is_one_in_every_script(text):
    assert rouge_l(text, [text]) == 1 and rouge_l(text, ["zzz qqq"]) == 0


def test_rouge_in_english_is_the_library_s_own():
    from rouge_score.rouge_scorer import RougeScorer

    plain = RougeScorer(["rougeL"])
    for one, two in [("The cat's on the mat", "the cat is on a_mat!"), ("a b c d", "a c d e"), ("U.S. 42", "us 42")]:
        assert rouge_l(two, [one]) == plain.score(one, two)["rougeL"].fmeasure
    assert rouge_l("天气", ["天气很好"]) == pytest.approx(2 * 1 * 0.5 / 1.5)


def test_any_right_answer_counts():
    assert exact_match(None, " b\n", ("a", "b")) == 1 and exact_match(None, "c", ("a", "b")) == 0
    assert rouge_l("x y", ("q", "x y")) == 1


def test_a_long_chinese_answer_is_free_text():
    def task(output):
        return ivl.Task.from_records([{"input": str(i), "output": output} for i in range(9)], name="t", instruction="x")

    assert (
        free_text(task("今天下午我们一起去公园散步然后在湖边喝茶聊天"))
        and not free_text(task("公园"))
        and not free_text(task("one two"))
    )


@pytest.mark.model
@pytest.mark.slow
def test_which_option_is_chosen_does_not_depend_on_which_is_right(smollm2):
    backend, pairs = backend_of(smollm2), [("spider", "8", "eight"), ("cat", "4", "four"), ("ant", "6", "six")]

    def hits(right):
        rows = [
            {"input": f"How many legs has a {name}?", "output": options[right], "choices": options, "split": "test"}
            for name, *options in pairs
        ]
        task = ivl.Task.from_records(
            [*rows, {**rows[0], "input": "x", "split": "train"}], name="t", instruction="Answer."
        )
        prompts = scored_prompts(task, Scoring(), shots=0, instruction=False, style="qa")
        return {p.query.input: hit for p, hit in zip(prompts, score_task(backend, task, prompts, Scoring()))}

    one, two = hits(0), hits(1)
    assert all(one[question] + two[question] == 1 for question in one)


@QUICK
@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 9), st.integers(1, 9))
@pytest.mark.filterwarnings("ignore:out of memory")
def test_every_row_is_worked_on_once_also_where_memory_runs_out(lengths, batch_size, room):
    def work(index):
        if len(index) > room:
            raise torch.OutOfMemoryError("too much")
        return [lengths[i] for i in index]

    found = list(batches.by_length(lengths, batch_size, work))
    done = [i for index, _ in found for i in index]
    assert sorted(done) == list(range(len(lengths)))
    assert [x for _, values in found for x in values] == [lengths[i] for i in done] == sorted(lengths)
    assert all(len(index) <= min(batch_size, room) for index, _ in found)


@QUICK
@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 200), st.integers(1, 5), st.sampled_from([1, 3, 99]))
@pytest.mark.filterwarnings("ignore:out of memory")
def test_processes_share_the_rows_in_the_batches_of_one_where_there_are_enough(lengths, tokens, n, room):
    """As many of a length as a number of tokens allows, so that batches are of different sizes."""

    def work(index):
        if len(index) > room:
            raise torch.OutOfMemoryError("too much")

    def parts(index, count):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(batches, "here", lambda: (index, count))
            return [rows for rows, _ in batches.by_length(lengths, lambda length: max(tokens // length, 1), work)]

    one, several = parts(0, 1), [parts(i, n) for i in range(n)]
    assert all(len(rows) * max(lengths[i] for i in rows) <= tokens or len(rows) == 1 for rows in one)
    assert sorted(i for own in several for rows in own for i in rows) == list(range(len(lengths)))
    if len(one) >= n and room == 99:
        assert several == [one[i::n] for i in range(n)]
