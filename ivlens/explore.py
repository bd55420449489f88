"""`ivl.explore`: a live panel in a notebook, in which vectors, layer, scale and heads are changed while one looks."""

from __future__ import annotations

import asyncio
import html
import math
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import pandas as pd

from ivlens.common.hints import reason
from ivlens.models.head import Head
from ivlens.patching.effects import HeadEffects
from ivlens.plots import maps
from ivlens.plots.clickable import clickable_map, map_content
from ivlens.plots.colours import MARK
from ivlens.plots.words import plain, with_minus
from ivlens.running.injection import POSITIONS
from ivlens.steering.exploration import SAID, Exploration, Setting, View
from ivlens.steering.generate import Generations
from ivlens.tasks.prompts import Prompt
from ivlens.tasks.suite import TaskSuite
from ivlens.tasks.task import Task
from ivlens.vectors.vector import InstructionVector

__all__ = ["Panel", "explore"]

PAUSE = 0.005  # seconds between two tokens in which the kernel hears of newer movements
DENSE = "line-height:20px"
CELL = "padding:4px 10px;text-align:left;vertical-align:top;white-space:pre-wrap"


def explore(
    model: Any,
    vectors: InstructionVector | Mapping[str, InstructionVector],
    *,
    effects: HeadEffects | None = None,
    tasks: TaskSuite | Mapping[str, Task] | None = None,
    prompt: str | Prompt | None = None,
    max_new_tokens: int | None = None,
) -> Panel | View:
    """A live panel: type a prompt, choose vectors, drag layer and scale, and read what the model writes with and without.

    A click on a head in the map adds it to the chosen vectors or drops it from them, and shows its effect, its share of the vector and the
    tokens that it writes. Needs `pip install "ivlens[notebook]"`; where no widget can be shown, the result is a `View` of the same.

    Parameters
    ----------
    model
        A hooked model, such as `load_model` gives.
    vectors
        One vector, or several by name; several chosen are injected together. The panel starts with the first, as it was tuned.
    effects
        Of `locate_heads`, for the map; without, it shows the heads' shares.
    tasks
        Your own tasks by name. A head that isn't among a vector's is read on the prompts which that was made of, once; of built-in
        tasks they are known.
    prompt
        What to begin with; of a `Prompt`, typing replaces the query. Default: the first test question of the first vector's task.
    max_new_tokens
        As in `generate`.

    Returns
    -------
    Panel or View
        `panel.prompt` and `panel.vectors` are what is set: `ivl.generate(model, panel.prompt, vector=panel.vectors)` writes the same.

    Raises
    ------
    ValueError
        If there is no vector, or vectors or effects belong to a model of another shape.
    """
    exploration = Exploration(model, vectors, effects=effects, tasks=tasks)
    setting = exploration.start(prompt)
    if not _can_show_widgets():
        return exploration.view(setting, max_new_tokens)
    return Panel(exploration, setting, max_new_tokens)


def _can_show_widgets() -> bool:
    """Whether this is a cell of a Jupyter kernel, with the widgets installed."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if getattr(shell, "kernel", None) is None or None in map(find_spec, ("anywidget", "ipywidgets")):
        return False
    with suppress(RuntimeError):  # no loop: a kernel whose cells don't run in one
        return asyncio.get_running_loop() is not None and threading.current_thread() is threading.main_thread()
    return False


class Panel:
    """The widgets of `explore`. Shows itself in a notebook.

    The model only runs on the kernel's main thread and between cells, a token at a time: where widgets are heard in another thread (in
    JupyterLab's subshells), that one only says that something moved. So nothing of ours is ever on the model while a cell runs.
    """

    def __init__(self, exploration: Exploration, setting: Setting, max_new_tokens: int | None = None):
        import ipywidgets as w

        self.exploration, self._first, self._most = exploration, setting, max_new_tokens
        self._loop, self._task, self._asked, self._clicks = asyncio.get_running_loop(), None, 0, []
        self._heads_are_old, self._last_click = True, None
        bound = max(4.0, 2 * abs(setting.scale))
        whole, row = w.Layout(width="98%"), w.Layout(flex_flow="row wrap", align_items="center")
        slider = {"layout": w.Layout(width="340px"), "style": {"description_width": "60px"}}
        place = {"max": exploration.shape[0] - 1, "value": setting.layer}
        size = {"min": -bound if setting.scale < 0 else 0.0, "max": bound, "step": 0.1, "value": setting.scale}
        text = setting.prompt if isinstance(setting.prompt, str) else setting.prompt.query.input
        self._text = w.Textarea(value=text, description="prompt", rows=3, layout=whole, style=slider["style"])
        self._names = {n: w.ToggleButton(value=n in setting.names, description=n) for n in exploration.given}
        self._layer = w.IntSlider(description="layer", **place, **slider)
        self._scale = w.FloatSlider(description="scale", **size, **slider)
        at = {
            "options": POSITIONS,
            "value": setting.positions,
            "style": {"button_width": "96px", "description_width": "60px"},
        }
        self._positions = w.ToggleButtons(description="positions", **at)
        self._said, self._about, self._likely, self._heads = (w.HTML(layout=whole) for _ in range(4))
        self._map = clickable_map(_map(exploration, setting))
        for control in (self._text, self._layer, self._scale, self._positions):
            control.observe(self._moved, "value")
        for button in self._names.values():
            button.observe(self._chosen, "value")
        self._map.observe(self._clicked, "clicked")
        numbers = w.VBox([self._likely, self._heads], layout=w.Layout(flex="1 1 0", overflow="auto"))
        places = w.Box([*self._names.values(), self._layer, self._scale, self._positions], layout=row)
        self.widget = w.VBox([self._text, places, self._said, self._about, w.HBox([self._map, numbers])])
        self._moved()

    # -- what is set ------------------------------------------------------------------------------------------------
    @property
    def setting(self) -> Setting:
        names = tuple(name for name, button in self._names.items() if button.value)
        place = {"layer": self._layer.value, "scale": self._scale.value, "positions": self._positions.value}
        return replace(self._first, names=names, **place).asking(self._text.value)

    @property
    def prompt(self) -> str | Prompt:
        """What is typed, as `ivl.generate` takes it."""
        return self.setting.prompt

    @property
    def vectors(self) -> list[InstructionVector]:
        """The chosen vectors, of the heads that are in them, with the layer, scale and positions that are set."""
        return self.exploration.vectors_at(self.setting)

    def view(self) -> View:
        """What is shown, as tables that stay as they are."""
        return self.exploration.view(self.setting, self._most)

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        return self.widget._repr_mimebundle_(**options)

    def __repr__(self) -> str:
        return f"Panel({', '.join(self.exploration.given)} in {self.exploration.backend.name})"

    # -- heard, in whichever thread ---------------------------------------------------------------------------------
    def _moved(self, change: Any = None) -> None:
        self._asked += 1
        self._loop.call_soon_threadsafe(self._wake)

    def _chosen(self, change: Any) -> None:
        self._heads_are_old = True
        self._moved()

    def _clicked(self, change: Any) -> None:
        layer, head, _ = change["new"]
        self._clicks.append(self.exploration.backend.check_head(layer, head))
        self._moved()

    # -- answered, on the kernel's main thread ----------------------------------------------------------------------
    def _wake(self) -> None:
        if self._task is None or self._task.done():
            self._task = self._loop.create_task(self._answer())

    async def _answer(self) -> None:
        """Answer the newest movement; one that comes meanwhile stops the answer between two tokens."""
        answered = 0
        while answered != self._asked:
            answered = self._asked
            with closing(self._steps()) as steps:
                try:
                    for _ in steps:
                        await asyncio.sleep(PAUSE)
                        if answered != self._asked:
                            break
                except Exception as error:
                    self._about.value = f'<b style="color:{MARK}">{html.escape(reason(error))}</b>'

    def _steps(self) -> Iterator[None]:
        setting = self.setting
        where = f"after layer {setting.layer} · scale {plain(setting.scale)} · positions: {setting.positions}"
        while self._clicks:
            self._about.value = f"reading what {self._clicks[0]} writes …"
            yield
            self._last_click, self._heads_are_old = self._clicks.pop(0), True
            try:
                self.exploration.toggle(self._last_click, setting.names)
            except ValueError as error:
                where += f'<br><b style="color:{MARK}">{html.escape(str(error))}</b>'
        for said, likely in self.exploration.write(setting, self._most):
            self._said.value, self._likely.value = _texts(said, setting), _probabilities(likely)
            self._about.value = f"{where} · writing …"
            yield
            if self._heads_are_old:
                self._show_heads(setting)
                yield
        self._about.value = where

    def _show_heads(self, setting: Setting) -> None:
        more = [] if self._last_click is None else [self._last_click]
        self._heads.value = _heads(self.exploration.about_heads(setting, more), self._last_click)
        self._map.content = _map(self.exploration, setting)
        self._heads_are_old = False


def _map(exploration: Exploration, setting: Setting) -> dict[str, Any]:
    """Every head's effect, or where none are given its share; outlined those that are in the chosen vectors."""
    values, shares = np.zeros(exploration.shape), [exploration.shares(name) for name in setting.names]
    inside = {head for each in shares for head in each}
    known = exploration.effects is not None
    if known:
        values = maps.numbers(exploration.effects)
    else:
        for head in inside:
            values[head] = sum(each.get(head, 0.0) for each in shares) / len(shares)
    return map_content(values, inside, "Effect of each head" if known else "Share of each head")


def _texts(said: Generations, setting: Setting) -> str:
    """Continuations side by side."""
    (row,) = said.to_dataframe().drop(columns="prompt").to_dict("records")
    columns = [f'<th style="{CELL};width:{100 // len(row)}%">{html.escape(name)}</th>' for name in row]
    cells = [f'<td style="{CELL}">{html.escape(text)}</td>' for text in row.values()]
    mark = f'class="ivl-said" data-layer="{setting.layer}" data-scale="{setting.scale:g}"'
    look = f"{DENSE};width:100%;table-layout:fixed;overflow-wrap:anywhere"
    rows = f"<tr>{''.join(columns)}</tr><tr>{''.join(cells)}</tr>"
    return f'<table {mark} style="{look}">{rows}</table>'


def _probabilities(likely: pd.DataFrame) -> str:
    """The next token's, as bars."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in likely.columns)
    rows = []
    for token, row in likely.iterrows():
        bars = (f"linear-gradient(to right, #0072b240 {p:.1%}, transparent {p:.1%})" for p in row)
        cells = (f'<td style="padding:0 8px;width:90px;background:{bar}">{p:.1%}</td>' for bar, p in zip(bars, row))
        rows.append(f"<tr><td><code>{html.escape(str(token))}</code></td>{''.join(cells)}</tr>")
    return f"<table style='{DENSE}'><tr><th>next token</th>{head}</tr>{''.join(rows)}</table>"


def _heads(about: pd.DataFrame, clicked: Head | None) -> str:
    """Each head's effect, share and tokens; the one clicked last in bold."""
    rows, forms = [], {"effect": "{:+.3f}", "share": "{:.1%}"}
    for _, row in about.iterrows():
        numbers = {key: with_minus(form.format(row[key])) for key, form in forms.items() if not math.isnan(row[key])}
        shown = {key: html.escape(str(x)) for key, x in row.items()} | dict.fromkeys(forms, "–") | numbers
        cells = "".join(f'<td style="{CELL}">{text}</td>' for text in shown.values())
        rows.append(f'<tr style="font-weight:{"bold" if row["head"] == clicked else "normal"}">{cells}</tr>')
    head = "".join(f"<th>{html.escape(name)}</th>" for name in about.columns)
    return (
        f"<table class='ivl-heads' style='{DENSE}'><tr>{head}</tr>{''.join(rows)}</table><small>Tokens: {SAID}.</small>"
    )
