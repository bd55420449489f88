"""Sequences of tasks from published benchmarks."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from ivlens.common.hints import hint
from ivlens.continual.layouts import EXPECTED, READERS, sample
from ivlens.tasks.suite import TaskSuite, load_tasks

__all__ = ["RECIPES", "Recipe", "check_known", "load_sequence"]


@dataclass(frozen=True)
class Recipe:
    """A benchmark's sequence of tasks and where it comes from.

    Attributes
    ----------
    tasks
        In the order of training. Of Super-NaturalInstructions the numbers, such as `task363`.
    layout
        `built-in`, or how its files lie: `trace`, `o-lora`, `natural-instructions`.
    url
        Where to download it.
    licence
        As its publisher states it.
    hub
        Dataset on the Hugging Face hub; None where there is none that its authors stand for.
    """

    tasks: tuple[str, ...]
    layout: str
    url: str
    licence: str
    hub: str | None = None


def _natural_instructions(*numbers: int) -> Recipe:
    tasks, url = tuple(f"task{number:03d}" for number in numbers), "https://github.com/allenai/natural-instructions"
    return Recipe(tasks, "natural-instructions", url, "Apache-2.0", hub="Muennighoff/natural-instructions")


_LONG = ("yelp", "amazon", "MNLI", "CB", "COPA", "QQP", "RTE", "IMDB")
_LONG += ("SST-2", "dbpedia", "agnews", "yahoo", "MultiRC", "BoolQA", "WiC")
RECIPES = {
    "func": Recipe(
        ("last_then_spanish", "alphabetically_first", "object_counting", "synonym_choice"),
        "built-in",
        "https://github.com/ivlens/ivlens",
        "MIT",
    ),
    "trace": Recipe(
        ("C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten"),
        "trace",
        "https://github.com/BeyonderXX/TRACE",
        "Apache-2.0; its sources have licences of their own, FOMC (CC BY-NC 4.0) and ScienceQA (CC BY-NC-SA 4.0) among them",
    ),
    "long": Recipe(
        _LONG,  # as its code runs them; `suite.subset([...])` gives another order
        "o-lora",
        "https://github.com/cmnfriend/O-LoRA",
        "those of the fifteen data sets",
    ),
    "ni-c1": _natural_instructions(195, 1343, 1310, 1292, 363),
    "ni-g1": _natural_instructions(618, 1290, 589, 511, 1357),
    "ni-m1": _natural_instructions(360, 363, 1290, 339, 1510),
}


def load_sequence(
    name: str, folder: str | Path | None = None, *, n_train: int | None = None, n_test: int | None = None, seed: int = 0
) -> TaskSuite:
    """A benchmark's tasks in its order of training.

    Parameters
    ----------
    name
        One of `RECIPES`: `func` (built in), `trace`, `long`, `ni-c1`, `ni-g1`, `ni-m1`.
    folder
        The benchmark as it is published; None downloads it from the hub, where it is there.
    n_train, n_test
        At most so many examples of each task's train and test split; None takes them all.
    seed
        Of all that is drawn at random; global random states are left alone. Here: which examples these are.

    Notes
    -----
    Texts are kept whole. TRACE's prompts are split after their first line, where all of a task share it: that's the instruction.
    Validation examples that also stand in the test split are left out; where none remain, a fifth of train takes their place.

    Examples
    --------
    >>> load_sequence("func", n_train=20, n_test=50).names
    ['last_then_spanish', 'alphabetically_first', 'object_counting', 'synonym_choice']

    Raises
    ------
    ValueError, FileNotFoundError
        If the name is unknown, or a file is missing, empty or broken; the message names the layout that is expected.
    """
    check_known(name, RECIPES, "recipe")
    recipe = RECIPES[name]
    if recipe.layout == "built-in":
        if folder is not None:
            raise ValueError(f"recipe {name!r} is built in; leave folder={str(folder)!r} out")
        tasks = load_tasks(recipe.tasks).values()
    else:
        place = _download(name, recipe) if folder is None else Path(folder)
        if not place.is_dir():
            by_hand = f"download {recipe.url} and pass the folder with {EXPECTED[recipe.layout]}"
            raise FileNotFoundError(f"no folder {place}; {by_hand}")
        tasks = [READERS[recipe.layout](place, task) for task in recipe.tasks]
    sampled = []
    for task in tasks:
        train = sample(task.train, n_train, seed=seed, name=task.name, argument="n_train")
        test = sample(task.test, n_test, seed=seed, name=task.name, argument="n_test")
        sampled.append(replace(task, train=train, test=test))
    return TaskSuite(sampled)


def _download(name: str, recipe: Recipe) -> Path:
    by_hand = f"download {recipe.url} and pass its folder to load_sequence({name!r}, folder): {EXPECTED[recipe.layout]}"
    if recipe.hub is None:
        raise ValueError(f"recipe {name!r} isn't on the hub; {by_hand}")
    from huggingface_hub import snapshot_download

    patterns = [f"*/{task}_*" for task in recipe.tasks]
    try:
        return Path(snapshot_download(recipe.hub, repo_type="dataset", allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise OSError(f"can't get {recipe.hub} from the hub ({error}); try again, or {by_hand}") from error


def check_known(name: str, known: Collection[str], what: str) -> None:
    """Raise ValueError, with near names, if a name is not among those known."""
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; {hint(name, known)}")
