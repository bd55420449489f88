"""Fixtures of all tests. Everything is made in memory or a temporary folder: no network, no Hugging Face cache."""

from __future__ import annotations

import gc
import importlib
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported

import pytest
import torch
from jaxtyping import install_import_hook

# Where tensors travel, the shapes in the annotations are checked while the tests run. Not where prompts are tokenized: beartype
# draws which item of a sequence it looks at from Python's global random state, which a test of training watches.
CHECKED = (
    "models",
    "running.replay",
    "running.scores",
    "running.sites",
    "running.decoding",
    "patching.heads",
    "patching.locating",
    "patching.residual",
    "vectors.extraction",
)
install_import_hook([f"ivlens.{room}" for room in CHECKED], "beartype.beartype")

import ivlens as ivl  # noqa: E402
from tests import tiny  # noqa: E402


def pytest_configure(config):
    # transformer-lens 3.9 says so
    config.addinivalue_line("filterwarnings", "ignore:.*HookedTransformer is deprecated")


def pytest_collection_modifyitems(items):
    # The notebooks take longest, and files go to processes whole: begun last, they would leave one process without work.
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")


@pytest.fixture(scope="session", autouse=True)
def imported_for_good():
    """A collection, one of which ends every training, then leaves out the millions of objects of imported modules."""
    for name in ("accelerate", "peft", "transformer_lens", "transformers.trainer", "plotly.graph_objects"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny matrices: threads only get in each other's way."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    return tiny.save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer):
    """A folder with the tiny Llama, as `from_pretrained` reads it."""
    folder = tmp_path_factory.mktemp("base")
    tiny.hf_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def load(tokenizer):
    """`load("gpt2")`: that tiny hooked model, built once."""
    models = {}

    def loaded(name: str):
        if name not in models:
            models[name] = tiny.hooked_model(name, tokenizer)
        return models[name]

    return loaded


@pytest.fixture(scope="session")
def model(load):
    """The tiny model of tests that need just any: Llama, two key-value heads for four query heads."""
    return load("llama")


@pytest.fixture(scope="session")
def smollm2():
    return ivl.load_model("smollm2")


@pytest.fixture(scope="session")
def task():
    """Twenty-four examples in words the tiny tokenizer knows; instructions in two wordings."""
    return ivl.Task.from_records(
        [{"input": word, "output": f"{word}ed"} for word in tiny.VERBS],
        name="past",
        instruction=["Write the past form.", "Put the word into the past."],
    )


@pytest.fixture(scope="session")
def other_task():
    return ivl.Task.from_records(
        [{"input": word, "output": f"{word}s"} for word in tiny.VERBS],
        name="plural",
        instruction="Write the plural form.",
    )
