"""The command line: the same words as the library. Every command writes to a folder and prints a table."""

from ivlens.cli import continual, evaluate, steer, train
from ivlens.cli.app import app

__all__ = ["app", "continual", "evaluate", "steer", "train"]
