"""Tiny random models of every architecture, and a tokenizer for them.

With transformer-lens 4 a Hugging Face model is made from its config and loaded as a bridge. With 3.9 it is converted to
`HookedTransformer`; architectures that 3.9 only knows by the names of released models are built from a
`HookedTransformerConfig` with the same features instead.
"""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

import ivlens as ivl

HOOKED = find_spec("transformer_lens.HookedTransformer") is not None  # transformer-lens 3.9

VERBS = [
    "walk", "jump", "look", "talk", "call", "help", "open", "play", "stay", "rain", "paint", "clean",
    "cook", "laugh", "watch", "wait", "start", "end", "turn", "ask", "need", "learn", "work", "point",
]  # fmt: skip
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def save_tokenizer(folder: Path) -> Path:
    """A byte-level BPE tokenizer: printable ASCII and line breaks, some merges, BOS, EOS and padding tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ"]
    trainer = trainers.BpeTrainer(vocab_size=200, initial_alphabet=alphabet, special_tokens=["<s>", "</s>", "<pad>"])
    text = [f"Q: {verb}\nA: {verb}ed\n\nWrite the past form of the word." for verb in VERBS]
    tokenizer.train_from_iterator(text, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=CHAT_TEMPLATE
    )
    fast.save_pretrained(folder)
    return folder


# -- Hugging Face models ------------------------------------------------------------------------------------------------

_SIZES = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 128,
}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_WINDOW = 5  # shorter than the prompts of the tests
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_OLD = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {**_OLD, "n_ctx": 128}),
    "gpt_neox": ("GPTNeoX", {**_SIZES, "rotary_pct": 0.5}),
    "gptj": ("GPTJ", {**_OLD, "rotary_dim": 4}),
    "llama": ("Llama", _GROUPED),
    "mistral": ("Mistral", {**_GROUPED, "head_dim": 16, "sliding_window": _WINDOW}),
    "qwen2": ("Qwen2", _GROUPED),
    "qwen3": ("Qwen3", {**_GROUPED, "head_dim": 16}),
    "gemma": ("Gemma", {**_GROUPED, "num_key_value_heads": 1, "head_dim": 16}),
    "gemma2": (
        "Gemma2",
        {**_GROUPED, "head_dim": 16, "sliding_window": _WINDOW, "layer_types": _MIXED, "query_pre_attn_scalar": 16,
         "tie_word_embeddings": False, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0},
    ),
    "gemma3": (
        "Gemma3Text",
        {**_GROUPED, "head_dim": 16, "sliding_window": _WINDOW, "layer_types": _MIXED, "query_pre_attn_scalar": 16},
    ),
    "phi": ("Phi", {**_SIZES, "partial_rotary_factor": 0.5}),
    "phi3": ("Phi3", {**_GROUPED, "sliding_window": _WINDOW, "pad_token_id": 2}),
    "olmo2": ("Olmo2", _GROUPED),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 3, "n_head": 4}),
}  # fmt: skip
_MODELS = {"gpt2": "GPT2LMHeadModel"}


def hf_model(name: str, **changes: Any) -> Any:
    """A random Hugging Face model in evaluation mode, always the same one."""
    family, settings = CONFIGS[name]
    tokens = {"vocab_size": 200, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = getattr(transformers, f"{family}Config")(**{**tokens, **settings, **changes})
    kind = family.removesuffix("Text") + ("LMHeadModel" if family == "GPT2" else "ForCausalLM")
    return randomize(getattr(transformers, kind)(config)).eval()


@torch.no_grad()
def randomize(model: Any, seed: int = 0) -> Any:
    """Weights large enough that every head matters; biases and norms away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(0.3 * noise if parameter.dim() > 1 else parameter + 0.2 * noise)
    return model


# -- hooked models ------------------------------------------------------------------------------------------------------

_PLAIN = {
    "n_layers": 3, "n_heads": 4, "d_model": 32, "d_head": 8, "d_mlp": 48, "n_ctx": 128, "d_vocab": 200, "act_fn": "silu",
    "normalization_type": "RMS", "final_rms": True, "gated_mlp": True, "positional_embedding_type": "rotary",
    "rotary_adjacent_pairs": False, "device": "cpu", "seed": 0,
}  # fmt: skip
_LOCAL = {"use_local_attn": True, "window_size": _WINDOW, "attn_types": ["local", "global", "local"]}

BY_HAND: dict[str, dict[str, Any]] = {
    "gemma": {**_PLAIN, "d_head": 16, "n_key_value_heads": 1, "act_fn": "gelu_pytorch_tanh"},
    "gemma2": {
        **_PLAIN, **_LOCAL, "d_head": 16, "n_key_value_heads": 2, "use_normalization_before_and_after": True,
        "attn_scores_soft_cap": 5.0, "output_logits_soft_cap": 4.0,
    },
    "gemma3": {
        **_PLAIN, **_LOCAL, "d_head": 16, "n_key_value_heads": 2, "use_normalization_before_and_after": True,
        "use_qk_norm": True, "rotary_base": 1_000_000, "rotary_base_local": 10_000,
    },
    "phi": {**_PLAIN, "normalization_type": "LN", "final_rms": False, "gated_mlp": False, "parallel_attn_mlp": True, "rotary_dim": 4},
    "olmo2": {**_PLAIN, "n_key_value_heads": 2, "original_architecture": "Olmo2ForCausalLM"},
}  # fmt: skip


def hooked_model(name: str, tokenizer: Any) -> Any:
    """A tiny model as the installed transformer-lens hooks it."""
    if not HOOKED:
        return ivl.load_model(hf_model(name), tokenizer=tokenizer)
    if name not in BY_HAND:
        return ivl.load_model(hf_model(name), tokenizer=tokenizer, backend="hooked")
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    model = HookedTransformer(HookedTransformerConfig(**BY_HAND[name]), tokenizer=tokenizer)
    return randomize(model).eval()


def tokens(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    """Random prompts of these lengths, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 200, (n,), generator=generator) for n in lengths]


def experiment(sequence: Any, **options: Any) -> Any:
    """What `continual.run` would run with these options."""
    from ivlens.continual.runner import experiment

    takes = inspect.signature(experiment).parameters
    told = inspect.signature(ivl.continual.run).parameters.values()
    defaults = {p.name: p.default for p in told if p.name in takes and p.default is not p.empty}
    return experiment(sequence, **{**defaults, **options})


# -- tasks that a random model gets right -------------------------------------------------------------------------------


@torch.inference_mode()
def answers(model: Any, prompts: list[Any], *, whole: bool, limit: int = 3) -> list[str | None]:
    """What the model itself answers greedily, so that scores aren't all 0; None where that is no answer of a task's.

    `whole` answers end within so many tokens, and are matched exactly; others are the first token, and match teacher-forced.
    """
    from ivlens.models.backends import backend_of
    from ivlens.running.tokens import tokenize

    backend, found = backend_of(model), []
    for row in tokenize(backend, [str(prompt.render(backend.tokenizer)) for prompt in prompts]):
        written: list[int] = []
        while len(written) < (limit if whole else 1):
            ids = torch.tensor([[*row.prompt, *written]], device=backend.device)
            written.append(int(backend.forward(ids, torch.ones_like(ids))[0, -1].argmax()))
            if written[-1] == backend.tokenizer.eos_token_id:
                break
        ended = written[-1] == backend.tokenizer.eos_token_id
        kept = written[:-1] if ended else written
        text = backend.tokenizer.decode(kept)
        good = text.startswith(" ") and text.strip() and text == f" {text.strip()}" and text.isascii()
        good = good and backend.tokenizer.encode(text, add_special_tokens=False) == kept and "\n" not in text
        found.append(text.strip() if good and (ended or not whole) else None)
    return found


def ending_model(name: str = "llama") -> Any:
    """Like `hf_model`, more inclined to end its answers."""
    model = hf_model(name)
    with torch.no_grad():
        model.lm_head.weight[model.config.eos_token_id] *= 2
    return model


def answered_task(model: Any, name: str, instruction: str, *, n: int = 40, whole: bool = True, asked: Any = 0) -> Any:
    """A task of which the model answers about half right, without demonstrations, the instruction `asked` as in `build_prompts`."""
    inputs = [f"{verb}{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789" for verb in VERBS]
    bare = [{"input": x, "output": "x", "split": "test"} for x in inputs]
    pool = ivl.Task.from_records(bare, name=name, instruction=instruction)
    records: list[dict[str, str]] = []
    for prompt in ivl.build_prompts(pool, instruction=asked, split="test"):
        (answer,) = answers(model, [prompt], whole=whole)
        if answer is not None:
            records += [
                {"input": prompt.query.input, "output": answer},
                {"input": f"no{prompt.query.input}", "output": "walk"},
            ]
            if len(records) >= n:
                return ivl.Task.from_records(records, name=name, instruction=instruction)
    raise AssertionError(f"only {len(records) // 2} answers")


def answered(model: Any, task: Any, *, split: str = "test", **look: Any) -> Any:
    """The task with the model's own first words as the outputs of a split's examples, where it is asked like this."""
    from dataclasses import replace

    prompts = ivl.build_prompts(task, split=split, **look)
    own = {p.query: answer for p, answer in zip(prompts, answers(model, prompts, whole=False)) if answer is not None}
    return replace(task, **{split: tuple(replace(x, output=own.get(x, x.output)) for x in task.split(split))})


def free_task(name: str = "free", check: str = "even_letters", **more: Any) -> Any:
    """Questions with free answers, of which a random model's meet the check about half the time; see `even_letters`."""
    from ivlens.tasks.checks import register_check

    register_check("even_letters")(even_letters)
    records = [{"input": f"Tell me about {verb}{'ing' * (i % 3)}."} for i, verb in enumerate(VERBS)]
    wordings = {"instruction": ["Write the past form.", "Be brief."], "held_out": ["Be very brief now."]}
    return ivl.Task.from_records(records, name=name, check=check, **{**wordings, **more})


def even_letters(text: str) -> bool:
    return sum(c.isalpha() for c in text) % 2 == 0
