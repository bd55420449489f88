"""The command line: the same words as the library. Every command writes to a folder and prints a table."""

from ivlens.cli import checkup, continual, evaluate, steer, train
from ivlens.cli.app import app

__all__ = ["app", "checkup", "continual", "evaluate", "steer", "train"]
