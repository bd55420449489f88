"""Several processes that do one thing together, as `accelerate launch` starts them: each does its part, and all have the whole.

Whether there are any is for accelerate's `PartialState` to say. Where nobody made one, or it knows one process only, nothing here
does anything.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

__all__ = ["alone", "everyones", "gathered", "here", "hidden", "is_main", "joined", "on_main"]

T = TypeVar("T")
SIZES = (
    "WORLD_SIZE",
    "PMI_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_SIZE",
)  # what launchers say in the environment
MODES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
DEVICE = "ACCELERATE_TORCH_DEVICE"
RANKS = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def here() -> tuple[int, int]:
    """Which process this is, counted from 0, and of how many."""
    accelerate = sys.modules.get("accelerate.state")
    state = {} if accelerate is None else accelerate.PartialState._shared_state
    return state.get("process_index", 0), state.get("num_processes", 1)


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return here()[0] == 0


def hidden(progress: bool) -> bool:
    """Whether a bar isn't drawn in this process."""
    return not (progress and is_main())


@contextmanager
def joined() -> Iterator[None]:
    """Inside, the processes that a launcher started with this one, if any, know of each other."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    # Of other launchers' variables a cluster's scheduler may have left some; of these only accelerate's own on CPUs uses any.
    started = SIZES if on_cpu else SIZES[:1] if "LOCAL_RANK" in os.environ else ()
    if max((int(os.environ.get(name, 1)) for name in started), default=1) == 1:
        yield
        return
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=on_cpu or not torch.cuda.is_available())
    try:
        yield
    finally:
        _group.cache_clear()
        state.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works by itself, on what none of the others need do; for accelerate and a `Trainer`, too."""
    if here()[1] == 1:
        yield
        return
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = [each._shared_state for each in (PartialState, AcceleratorState, GradientState)]
    kept, device = [dict(state) for state in states], str(PartialState().device)
    told = {name: os.environ.pop(name) for name in (*SIZES, *RANKS, *MODES, DEVICE) if name in os.environ}
    os.environ[DEVICE] = device
    for state in states:
        state.clear()
    try:
        yield
    finally:
        for state, known in zip(states, kept):
            state.clear()
            state.update(known)
        del os.environ[DEVICE]
        os.environ.update(told)


def gathered(item: T, what: str, *, hours: float = 0.5) -> list[T]:
    """What each process gives, by their numbers.

    `what` is being done, with all that tells it apart; `hours` the others are waited for.

    Raises
    ------
    RuntimeError
        If the processes do different things, whose results are no whole, or one doesn't come.
    """
    index, count = here()
    if count == 1:
        return [item]
    import torch.distributed as dist

    found: list[Any] = [None] * count
    try:
        dist.all_gather_object(found, (what, item), group=_group(dist.group.WORLD, hours))
    except RuntimeError as error:
        said = f"process {index} of {count} has waited in vain for the others ({error})"
        raise RuntimeError(f"{said}; {TOGETHER}") from error
    for other, (theirs, _) in enumerate(found):
        if theirs != what:
            said = f"process {other} of {count} came to something else ({theirs}) than process {index} ({what})"
            raise RuntimeError(f"{said}; {TOGETHER}")
    return [given for _, given in found]


TOGETHER = (
    "under accelerate every process must make the same calls with the same model, prompts and options, whose work is then split; "
    "calls of one process only belong into `with ivlens.alone():`"
)


@cache
def _group(world: Any, hours: float) -> Any:
    """For messages: over gloo, which takes them from memory, whatever gradients go over."""
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=timedelta(hours=hours))


def on_main(work: Callable[[], T], what: str, *, hours: float = 0.5) -> T:
    """What `work` gives, or raises, in the main process; in all of them."""
    if here()[1] == 1:
        return work()
    return _told(gathered(_outcome(work) if is_main() else None, what, hours=hours)[0])


def everyones(mine: Iterator[T], what: str, *, hours: float = 0.5) -> Iterator[T]:
    """What every process has, in rounds, one of each after the other; an error of one is raised in all."""
    if here()[1] == 1:
        yield from mine
        return
    while True:
        outcomes = gathered(_outcome(lambda: next(mine)), what, hours=hours)
        if all(said == "over" for said, _ in outcomes):
            return
        yield from [_told(outcome) for outcome in outcomes if outcome[0] != "over"]


def _outcome(work: Callable[[], Any]) -> tuple[str, Any]:
    try:
        return "done", work()
    except StopIteration:
        return "over", None
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # with arguments of its own
            return "failed", RuntimeError(f"{type(error).__name__}: {error}")
        return "failed", error


def _told(outcome: tuple[str, Any]) -> Any:
    said, found = outcome
    if said == "failed":
        raise found
    return found
