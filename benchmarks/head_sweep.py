"""Patching every head, three ways, on the same prompts with the same results.

    python benchmarks/head_sweep.py                      # SmolLM2 at about 90, 200 and 400 tokens
    python benchmarks/head_sweep.py --own 12             # prompts alike but for their last 12 tokens, as with the same demonstrations
    python benchmarks/head_sweep.py --positions -1 -2 -4 # every head at each of these positions
    python benchmarks/head_sweep.py --shape llama-2-7b --device cuda --dtype bfloat16 --prompts 100 --lengths 200 --skip-slow

1. one full forward pass per head (and position; the last prompt token, unless told otherwise) through `run_with_hooks`
2. `transformer_lens.patching.generic_activation_patch`
3. ours: exact suffix replay

The floor is the time of plain matrix products doing the arithmetic that no method can avoid: the prompt once, then each
patched copy of its last tokens from the layer where it differs, and the unembedding of every copy.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ivlens.models import backend_of, load_model
from ivlens.patching import head_effects

ANSWER = " the"
TEXT = "The mill stood empty for a year before anyone asked who owned it, and by then the roof had gone. "


def main() -> None:
    options = arguments()
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    model = (
        random_llama(options.shape, options.device, dtype)
        if options.shape
        else load_model(options.model, backend=options.backend, device=options.device, dtype=dtype)
    )
    backend = backend_of(model)
    print(
        f"{backend.name}: {backend.n_layers} × {backend.n_heads} heads, {type(model).__name__}, {options.dtype}, "
        f"{options.device}, {torch.get_num_threads()} threads, {options.prompts} prompt(s)"
    )
    header = (
        "tokens",
        "per head (s)",
        "helper (s)",
        "ours (s)",
        "÷ per head",
        "÷ helper",
        "largest Δp",
        "floor (s)",
        "floor ÷ ours",
    )
    print(" | ".join(f"{h:>12}" for h in header))
    for length in options.lengths:
        print(" | ".join(f"{cell:>12}" for cell in compare(model, backend, length, options)), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--shape", choices=["llama-2-7b"], help="a randomly initialised model of this shape instead")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--lengths", type=int, nargs="+", default=[90, 200, 400])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--own", type=int, help="tokens at the end in which prompts differ; default: all")
    parser.add_argument("--positions", type=int, nargs="+", default=[-1], help="patched ones, from the prompt's end")
    parser.add_argument("--repeats", type=int, default=3, help="of ours and of the floor; the median counts")
    parser.add_argument("--max-rows", type=int, default=None)
    parser.add_argument(
        "--slow-heads",
        type=int,
        default=None,
        help="only so many heads the slow ways, their time scaled up; default: all",
    )
    parser.add_argument("--skip-slow", action="store_true")
    return parser.parse_args()


def compare(model, backend, length: int, options: argparse.Namespace) -> list[str]:
    own = min(options.own or length, length)
    tokens = prompts_of(backend, options.prompts, length, own)
    answers = torch.tensor(backend.tokenizer.encode(ANSWER, add_special_tokens=False) * options.prompts)
    shape = (backend.n_layers, backend.n_heads, backend.d_head)
    replacement = (
        torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(backend.device, tokens_dtype(model)) * 0.3
    )
    ours = lambda: replay(model, tokens, replacement, options.positions, options.max_rows)  # noqa: E731
    ours()  # warm-up
    seconds, values = median_time(ours, options.repeats, backend.device)
    floor = statistics.median(
        floor_work(model, backend, length, options.prompts, own, options.positions) for _ in range(options.repeats)
    )
    cells = [f"{length}", "", "", f"{seconds:.2f}", "", "", "", f"{floor:.2f}", f"{floor / seconds:.0%}"]
    if not options.skip_slow:
        every = [(layer, p, h) for p in options.positions for layer in range(shape[0]) for h in range(shape[1])]
        index = range(0, len(every), max(1, len(every) // (options.slow_heads or 10**9)))
        heads, scale = [every[i] for i in index], len(every) / len(index)
        each, reference = timed(
            lambda: one_forward_per_head(model, tokens, answers, replacement, heads), backend.device
        )
        helper, also = timed(lambda: library_helper(model, tokens, answers, replacement, heads), backend.device)
        baseline = one_forward_per_head(model, tokens, answers, None, [(0, -1, 0)])
        difference = max((values[:, list(index)] - (x - baseline)).abs().max().item() for x in (reference, also))
        cells[1:3] = [f"{each * scale:.1f}", f"{helper * scale:.1f}"]
        cells[4:7] = [f"{each * scale / seconds:.0f}×", f"{helper * scale / seconds:.0f}×", f"{difference:.1e}"]
    return cells


def replay(model, tokens: Tensor, replacement: Tensor, positions: Sequence[int], max_rows: int | None) -> Tensor:
    """Effects on the answer's probability, [prompt, position · layer · head]."""
    about = (model, list(tokens), [ANSWER] * len(tokens), replacement)
    found = [head_effects(*about, position=p, method="replay", max_rows=max_rows).flatten(1) for p in positions]
    return torch.cat(found, dim=1)


@torch.inference_mode()
def one_forward_per_head(model, tokens, answers, replacement, heads: Sequence[tuple[int, int, int]]) -> Tensor:
    columns = []
    mask = torch.ones_like(tokens)
    for layer, position, head in heads:

        def patch(z: Tensor, hook, position=position, layer=layer, head=head) -> Tensor:
            if replacement is not None:
                z[:, position, head] = replacement[layer, head]
            return z

        logits = model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", patch)])
        columns.append(probability(logits, answers))
    return torch.stack(columns, dim=1)


@torch.inference_mode()
def library_helper(model, tokens, answers, replacement, heads: Sequence[tuple[int, int, int]]) -> Tensor:
    import pandas as pd
    from transformer_lens import ActivationCache, patching

    cache = ActivationCache({f"blocks.{layer}.attn.hook_z": z[None] for layer, z in enumerate(replacement)}, model)

    def setter(z: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:
        z[:, index[1], index[2]] = clean[0, index[2]]
        return z

    columns = []
    for i in range(len(tokens)):  # its metric is one number per forward pass
        frame = pd.DataFrame(heads, columns=["layer", "pos", "head"])
        metric = lambda logits, i=i: probability(logits, answers[i : i + 1])[0]  # noqa: E731
        columns.append(
            patching.generic_activation_patch(model, tokens[i : i + 1], cache, metric, setter, "z", index_df=frame)
        )
    return torch.stack(columns).cpu()


def probability(logits: Tensor, answers: Tensor) -> Tensor:
    last = logits[:, -1].float()
    return last.softmax(-1).gather(-1, answers[:, None].to(last.device))[:, 0].cpu()


@torch.inference_mode()
def floor_work(model, backend, length: int, prompts: int, own: int, positions: Sequence[int]) -> float:
    """Seconds of the matrix products of the prompt, of every copy where it differs, and of the unembedding of its last token."""
    cfg, device, dtype = model.cfg, backend.device, tokens_dtype(model)
    heads, kv = backend.n_heads, getattr(cfg, "n_key_value_heads", None) or backend.n_heads
    d, width = backend.d_model, backend.n_heads * backend.d_head
    into = torch.empty(width + 2 * kv * backend.d_head, d, device=device, dtype=dtype).normal_(0, 0.02)
    out = torch.empty(d, width, device=device, dtype=dtype).normal_(0, 0.02)
    gated = 2 if getattr(cfg, "gated_mlp", True) else 1
    up = torch.empty(gated * cfg.d_mlp, d, device=device, dtype=dtype).normal_(0, 0.02)
    down = torch.empty(d, cfg.d_mlp, device=device, dtype=dtype).normal_(0, 0.02)
    unembed = torch.empty(backend.d_vocab, d, device=device, dtype=dtype).normal_(0, 0.02)

    # One buffer of each kind, cut to size: making the inputs is not part of the floor. All prompts in one product.
    copies = sum(-p for p in positions)  # tokens that are run again for each head
    most = prompts * max(length, copies * (backend.n_layers * heads + 1))
    buffers = {n: torch.empty(most, n, device=device, dtype=dtype).normal_() for n in (d, width, cfg.d_mlp)}
    queries = torch.empty(
        prompts, heads, max(length, copies * backend.n_layers * heads), backend.d_head, device=device, dtype=dtype
    ).normal_()
    keys = torch.empty(prompts, heads, length, backend.d_head, device=device, dtype=dtype).normal_()

    def layer(rows_attention: int, rows_mlp: int, prompts: int = prompts) -> None:
        if rows_attention:
            torch.nn.functional.linear(buffers[d][: prompts * rows_attention], into)
            scores = queries[:prompts, :, :rows_attention] @ keys[:prompts].transpose(2, 3)
            scores @ keys[:prompts]
            torch.nn.functional.linear(buffers[width][: prompts * rows_attention], out)
        torch.nn.functional.linear(buffers[d][: prompts * rows_mlp], up)
        torch.nn.functional.linear(buffers[cfg.d_mlp][: prompts * rows_mlp], down)

    start = time.perf_counter()
    for i in range(backend.n_layers):
        if shared := length - own:
            layer(shared, shared, prompts=1)
        layer(own, own)
        layer(
            copies * heads * i, copies * heads * (i + 1)
        )  # a copy patched here has its attention input from the unpatched one
    torch.nn.functional.linear(buffers[d][: prompts * (len(positions) * backend.n_layers * heads + 1)], unembed)
    synchronize(device)
    return time.perf_counter() - start


def prompts_of(backend, prompts: int, length: int, own: int) -> Tensor:
    """Prompts that differ in their last `own` tokens."""
    ids = backend.tokenizer.encode(TEXT * (length // 10 + prompts), add_special_tokens=False)
    rows = torch.tensor([ids[7 * i : 7 * i + length] for i in range(prompts)], device=backend.device) % backend.d_vocab
    rows[:, : length - own] = rows[0, : length - own]
    return rows


def tokens_dtype(model) -> torch.dtype:
    return next(model.parameters()).dtype


def random_llama(shape: str, device: str, dtype: torch.dtype):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from ivlens.models.smollm2 import smollm2_folder

    config = (
        LlamaConfig()
    )  # its defaults are Llama-2-7B's: 32 layers, 32 heads, d_model 4096, d_mlp 11008, 32,000 tokens
    with torch.device(device):
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            hf_model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(previous)
    return load_model(
        hf_model,
        tokenizer=AutoTokenizer.from_pretrained(smollm2_folder()),
        device=device,
        dtype=dtype,
        backend="bridge",
    )


def timed(work: Callable, device: torch.device) -> tuple[float, object]:
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - start, result


def median_time(work: Callable, repeats: int, device: torch.device) -> tuple[float, object]:
    runs = [timed(work, device) for _ in range(repeats)]
    return statistics.median(seconds for seconds, _ in runs), runs[-1][1]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
