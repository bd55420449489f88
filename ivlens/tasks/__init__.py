"""Tasks: instruction paraphrases and examples with fixed train, valid and test splits."""

from ivlens.tasks.suite import TaskSuite, load_tasks
from ivlens.tasks.task import Example, Task

__all__ = ["Example", "Task", "TaskSuite", "load_tasks"]
