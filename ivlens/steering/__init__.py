"""Injecting vectors, choosing where and how strongly, and measuring what that does beside its controls."""

from ivlens.steering.controls import CONTROLS, random_vector
from ivlens.steering.evaluation import Evaluation, evaluate
from ivlens.steering.gate import Gate, fit_gate
from ivlens.steering.generate import Generations, generate
from ivlens.steering.inject import inject
from ivlens.steering.search import InjectionSearch
from ivlens.steering.tuning import tune_injection

__all__ = [
    "CONTROLS",
    "Evaluation",
    "Gate",
    "Generations",
    "InjectionSearch",
    "evaluate",
    "fit_gate",
    "generate",
    "inject",
    "random_vector",
    "tune_injection",
]
