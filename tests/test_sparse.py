"""`AnswerTrainer` against `transformers.Trainer`, which computes every logit."""

from __future__ import annotations

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import ivlens as ivl
from ivlens.models.hooking import tokenizing_backend
from ivlens.tasks.prompts import build_prompts
from ivlens.training.batch import Collator
from ivlens.training.data import answer_dataset
from ivlens.training.sparse import AnswerTrainer
from tests import tiny

pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def data(tokenizer, task, other_task):
    backend = tokenizing_backend(tiny.hf_model("llama"), tokenizer, "llama")
    return answer_dataset(
        backend, [*build_prompts(task, n=7, shots=1), *build_prompts(other_task, n=7, instruction=True)]
    )


def trained(kind, name, data, tokenizer, folder, adapter=None, **arguments):
    """Weights after four steps, the logged losses, and in how many columns the last step had logits."""
    torch.manual_seed(0)
    model, widths = tiny.hf_model(name), []
    model.register_forward_hook(lambda module, args, output: widths.append(output.logits.shape[1]))
    model = model if adapter is None else get_peft_model(model, adapter)
    options = {"max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "use_cpu": True}
    options |= {"report_to": "none", "disable_tqdm": True, "remove_unused_columns": False, "max_grad_norm": 1.0}
    args = TrainingArguments(output_dir=str(folder), **{**options, **arguments})
    trainer = kind(model, args=args, train_dataset=data, eval_dataset=data, data_collator=Collator(tokenizer))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return model.state_dict(), [*losses, trainer.evaluate()["eval_loss"]], widths[3]


@pytest.mark.parametrize("arguments", [
    {"per_device_train_batch_size": 4},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
    {"per_device_train_batch_size": 4, "label_smoothing_factor": 0.2},
], ids=["plain", "accumulated", "smoothed"])  # fmt: skip
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_it_trains_as_the_trainer_does(name, arguments, data, tokenizer, tmp_path):
    weights, losses, every = trained(Trainer, name, data, tokenizer, tmp_path, **arguments)
    ours, same, some = trained(AnswerTrainer, name, data, tokenizer, tmp_path, **arguments)
    torch.testing.assert_close(ours, weights, atol=1e-5, rtol=1e-4)
    assert same == pytest.approx(losses, abs=1e-4)
    assert some == every if "label_smoothing_factor" in arguments else some < every


@pytest.mark.parametrize("config", [
    PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
], ids=["prompt", "prefix"])  # fmt: skip
def test_tokens_before_the_prompt_are_counted_by_the_model_and_not_guided(config, data, tokenizer, tmp_path):
    found = [
        trained(kind, "llama", data, tokenizer, tmp_path, adapter=config, per_device_train_batch_size=4)[1]
        for kind in (Trainer, AnswerTrainer)
    ]
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    model = get_peft_model(tiny.hf_model("llama"), config)
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True)
    guidance = ivl.Guidance(progressive=False)
    trainer = ivl.IVTrainer(
        model, vectors=None, guidance=guidance, train_dataset=data, processing_class=tokenizer, args=args
    )
    with pytest.raises(ValueError, match="tokens of its own"):
        trainer.train()


def test_smoothed_labels_are_not_guided_without_a_word(data, tokenizer, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True, label_smoothing_factor=0.1)
    guidance, common = ivl.Guidance(progressive=False), {"train_dataset": data, "processing_class": tokenizer}
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        ivl.IVTrainer(tiny.hf_model("llama"), vectors=None, guidance=guidance, args=args, **common).train()
