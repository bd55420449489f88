"""Continual learning: a sequence of tasks by several methods, scored after every stage.

`ivl.continual.run(["present_past", ...], methods=["lora", "iv"], folder="runs")`
"""

from ivlens.continual.config import read_config
from ivlens.continual.general import GENERAL, load_general
from ivlens.continual.recipes import RECIPES, load_sequence
from ivlens.continual.results import ContinualResults
from ivlens.continual.runner import collect, run

__all__ = ["GENERAL", "RECIPES", "ContinualResults", "collect", "load_general", "load_sequence", "read_config", "run"]
