# The public interface, in the order a user meets it. `__init__.py` reads this file.
# ruff: noqa: I001

from . import (
    common as common,
    models as models,
    tasks as tasks,
    running as running,
    patching as patching,
    vectors as vectors,
    steering as steering,
    dynamics as dynamics,
    training as training,
    continual as continual,
    plots as plots,
    report as report,
    demo as demo,
    cli as cli,
)
from .models.loading import load_model as load_model
from .tasks.task import Task as Task, Example as Example
from .tasks.suite import TaskSuite as TaskSuite, load_tasks as load_tasks
from .tasks.prompts import Prompt as Prompt, build_prompts as build_prompts
from .patching.locating import locate_heads as locate_heads
from .patching.effects import HeadEffects as HeadEffects
from .models.head import Head as Head
from .vectors.extraction import extract_vector as extract_vector
from .vectors.vector import InstructionVector as InstructionVector
from .steering.inject import inject as inject
from .steering.generate import generate as generate
from .steering.tuning import tune_injection as tune_injection
from .steering.evaluation import evaluate as evaluate, Evaluation as Evaluation
from .dynamics.probabilities import (
    AnswerProbabilities as AnswerProbabilities,
    answer_probabilities as answer_probabilities,
    compare_probabilities as compare_probabilities,
)
from .training.finetune import fine_tune as fine_tune
from .training.run import TrainingRun as TrainingRun
from .dynamics.tracking import compare as compare, track as track
from .dynamics.change import Change as Change
from .dynamics.restoring import recover as recover
from .dynamics.recovery import Recovery as Recovery
from .dynamics.checkup import checkup as checkup
from .dynamics.diagnosis import Checkup as Checkup
from .training.trainer import IVTrainer as IVTrainer
from .training.guidance import Guidance as Guidance
from .vectors.export import export_vector as export_vector, import_vector as import_vector
from .explore import explore as explore
from .report import Section as Section, write_report as write_report
from .tasks.checks import passes as passes, register_check as register_check
from .running.answers import with_own_answers as with_own_answers
from .steering.generate import Generations as Generations
from .steering.gate import Gate as Gate, fit_gate as fit_gate
from .common.processes import alone as alone

__version__: str
