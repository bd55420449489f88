"""Training under FSDP, whose processes each hold a part of every weight, is training in one. Run as a module, this is one of them.

Accelerate knows FSDP on GPUs only, so here it is told that there are some; torch shards on CPUs as well, over gloo.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

import ivlens as ivl
from ivlens.models.head import Head
from tests import tiny
from tests.test_processes import launch

CASES = ("every weight", "averaging", "guided", "guided every weight")
SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_TORCH_DEVICE": "cpu",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def options(case: str) -> dict[str, Any]:
    from ivlens.training.methods import Averaging, Guided

    theta = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    vector = ivl.InstructionVector(theta.sum(0), (Head(0, 1), Head(2, 3)), theta, layer=1, scale=1.5)
    resumed = {
        "save_every": 2,
        "optim": "adamw_torch",
        "learning_rate": 3e-3,
    }  # torch reloads no optimizer without a state
    lora = LoraConfig(r=2, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return {
        "every weight": {"lora": False},
        "averaging": {"lora": lora, "method": Averaging(0.5, every=0.5)},
        "guided": {"lora": lora, "method": Guided(), "vectors": {"past": vector}, **resumed},
        "guided every weight": {"lora": False, "method": Guided(keep_teacher=None), "vectors": {"past": vector}},
    }[case]


def tune(folder: Path, base: str, case: str, batch_size: int, **more: Any) -> ivl.TrainingRun:
    records = [{"input": verb, "output": f"{verb}ed"} for verb in tiny.VERBS]
    task = ivl.Task.from_records(records, name="past", instruction="Write the past form.")
    training = {"steps": 4, "batch_size": batch_size, "learning_rate": 0.03, "optim": "sgd", "logging_steps": 1}
    return ivl.fine_tune(base, task, folder=folder / case, **{**training, **options(case), **more}, progress=False)


def stopped(folder: Path, base: str, batch_size: int) -> None:
    """Interrupted behind its first checkpoint, in every process."""
    from transformers import Trainer

    original = Trainer._maybe_log_save_evaluate

    def cut(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.state.global_step == 3:
            raise KeyboardInterrupt

    Trainer._maybe_log_save_evaluate = cut
    with pytest.raises(KeyboardInterrupt):
        tune(folder, base, "guided", batch_size, use_cpu=False)
    Trainer._maybe_log_save_evaluate = original


def work(folder: Path, base: str) -> None:
    from accelerate.state import DistributedType, PartialState

    from ivlens.training.methods import EWC

    torch.set_num_threads(1)
    os.environ.update(SHARDED)
    PartialState._prepare_backend = lambda *args, **options: ("gloo", DistributedType.MULTI_GPU)
    stopped(folder, base, 2)
    for case in CASES:
        tune(folder, base, case, 2, use_cpu=False)
    refused = []
    for version, more in (("2", {"method": EWC()}), ("1", {})):
        os.environ["FSDP_VERSION"] = version
        try:
            tune(folder / "refused" / version, base, "averaging", 2, use_cpu=False, **more)
        except ValueError as error:
            refused.append(str(error))
    (folder / f"refused-{os.environ['RANK']}.json").write_text(json.dumps(refused))
    gc.collect()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("sharded")
    assert launch(2, folder, base, module="tests.test_sharded") == [0, 0]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_sharded_training_is_that_of_one_process(case, folder, base, tmp_path):
    run = tune(tmp_path, base, case, 4)
    file = "model.safetensors" if options(case)["lora"] is False else "adapter_model.safetensors"
    one, two = (load_file(at / case / "final" / file) for at in (tmp_path, folder))
    assert one.keys() == two.keys() and max(value.abs().max() for value in one.values()) > 1e-3
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-4)
    sharded = ivl.TrainingRun.load(folder / case)
    for a, b in zip(run.log, sharded.log, strict=True):
        assert {k: b[k] for k in b if k.endswith("loss")} == pytest.approx(
            {k: a[k] for k in a if k.endswith("loss")}, rel=1e-4
        )
    assert len(run.checkpoints) == len(sharded.checkpoints) == (3 if case == "guided" else 1)


@pytest.mark.slow
def test_what_cannot_be_sharded_is_refused(folder):
    for index in range(2):
        of_method, of_version = json.loads((folder / f"refused-{index}.json").read_text())
        assert of_method.startswith("EWC(") and "looks at every weight in training" in of_method
        assert of_version.startswith("version 1 of FSDP") and "fsdp_version: 2" in of_version


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2])
