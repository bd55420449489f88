"""Does a hundred times as many prompts need more memory? Peak resident memory of a fresh process, for few prompts and for many.

python benchmarks/memory.py --few 1000 --many 100000

The model is small and random, so that what is kept of each prompt shows: its heads' outputs alone would be 3 kB. Prompts themselves, and
in `evaluate` each one's text and scores, are counted in.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import ivlens as ivl
from ivlens.patching import mean_head_outputs

WORDS = [f"w{i}" for i in range(100)]
HEADS = [(2, 0), (4, 3)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", type=int, default=1000)
    parser.add_argument("--many", type=int, default=100_000)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--n", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        CALLS[args.only](small_model(), [prompt(i) for i in range(args.n)])
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6 * (1 if sys.platform == "darwin" else 1024))
        return
    print(f"| peak of memory, MB | {args.few:,} prompts | {args.many:,} prompts | ratio |\n|---|---:|---:|---:|")
    for name in CALLS:
        few, many = (measured(name, n) for n in (args.few, args.many))
        print(f"| `{name}` | {few:.0f} | {many:.0f} | {many / few:.2f} |", flush=True)


def measured(name: str, n: int) -> float:
    command = [sys.executable, __file__, "--only", name, "--n", str(n)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return float(done.stdout.split()[-1])


def small_model() -> Any:
    """Six layers of eight heads, and a tokenizer of a hundred words."""
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(["<s>", "?", "Q:", "A:", *WORDS])}, unk_token="?")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "<s>", "pad_token": "<s>", "unk_token": "?"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    sizes = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 256}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf_model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes))
    return ivl.load_model(hf_model.eval(), tokenizer=tokenizer)


def prompt(i: int) -> ivl.Prompt:
    """Each another question, of three words."""
    question = " ".join(WORDS[(i // 100**k + 7 * k) % 100] for k in range(3))
    return ivl.Prompt(ivl.Example(question, WORDS[i % 100]), task="words")


def gated(model: Any, prompts: list[ivl.Prompt]) -> None:
    """Half of the prompts fit the gate, half choose its layer and threshold."""
    parts = [prompts[i::4] for i in range(4)]
    ivl.fit_gate(model, parts[0], parts[1], valid=(parts[2], parts[3]))


def evaluated(model: Any, prompts: list[ivl.Prompt]) -> None:
    examples = tuple(x.query for x in prompts)
    ivl.evaluate(
        model, ivl.Task("words", ("Answer.",), examples[:1], (), examples), metrics=["first_token"], progress=False
    )


CALLS = {
    "mean_head_outputs": mean_head_outputs,
    "extract_vector": lambda model, prompts: ivl.extract_vector(model, prompts, HEADS),
    "fit_gate": gated,
    "evaluate": evaluated,
}

if __name__ == "__main__":
    main()
