"""ivlens: find, extract, inject and follow the instruction vectors of language models, on TransformerLens.

Implements arXiv 2406.12227, "Interpretable Catastrophic Forgetting of Large Language Model Fine-tuning via Instruction Vector".
What it offers stands in `__init__.pyi`; each name is imported when it is first used, so that `import ivlens` costs nothing.
"""

import sys
import warnings

import lazy_loader

__version__ = "0.1.0"

if "ipykernel" in sys.modules:
    # Without ipywidgets bars are text there, about which tqdm warns once, when it is imported.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "IProgress not found")
        import tqdm.auto  # noqa: F401

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
