"""A map of heads that hears clicks, for notebooks."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any

import numpy as np

from ivlens.models.head import Head
from ivlens.plots import maps
from ivlens.plots.colours import INK
from ivlens.plots.style import tick_step
from ivlens.plots.words import signed

__all__ = ["clickable_map", "map_content"]

# Of our own, not plotly's widget: that sends five megabytes, which a busy browser doesn't load in the two seconds that anywidget gives it.
SCRIPT = """
function render({ model, el }) {
  const make = (parent, name, attributes, text) => {
    const made = parent.appendChild(document.createElementNS("http://www.w3.org/2000/svg", name));
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const draw = () => {
    const { colours, hover, outlined, ink, caption, width, height, steps } = model.get("content");
    const rows = colours.length, columns = colours[0].length, left = 46, top = 24 + 18 * caption.length;
    const x = (head) => left + head * width, y = (layer) => top + (rows - 1 - layer) * height;
    const size = { width: left + columns * width + 8, height: top + rows * height + 40 };
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const style = "font: 13px sans-serif; fill: var(--jp-ui-font-color1, #1f2328)";
    for (const key in size) svg.setAttribute(key, size[key]);
    svg.setAttribute("style", style);
    svg.setAttribute("class", "ivl-map");
    caption.forEach((line, i) => make(svg, "text", { x: 4, y: 18 + 18 * i, "font-weight": i ? "normal" : "bold" }, line));
    const cell = { width: width - 1, height: height - 1, style: "cursor: pointer" };
    for (let layer = 0; layer < rows; layer++)
      for (let head = 0; head < columns; head++) {
        const at = { x: x(head), y: y(layer), fill: colours[layer][head], "data-head": `L${layer}H${head}` };
        const drawn = make(svg, "rect", { ...at, ...cell });
        make(drawn, "title", {}, hover[layer][head]);
        drawn.addEventListener("click", () => { model.set("clicked", [layer, head, Date.now()]); model.save_changes(); });
      }
    for (const [layer, head] of outlined)
      make(svg, "rect", { x: x(head), y: y(layer), width: width - 1, height: height - 1, fill: "none", stroke: ink,
                          "stroke-width": 2, "pointer-events": "none" });
    for (let head = 0; head < columns; head += steps[1])
      make(svg, "text", { x: x(head) + width / 2, y: top + rows * height + 16, "text-anchor": "middle" }, head);
    for (let layer = 0; layer < rows; layer += steps[0])
      make(svg, "text", { x: left - 6, y: y(layer) + height / 2 + 4, "text-anchor": "end" }, layer);
    make(svg, "text", { x: left, y: top + rows * height + 34 }, "head →  layer ↑");
    el.replaceChildren(svg);
  };
  model.on("change:content", draw);
  draw();
}
export default { render };
"""


def map_content(values: np.ndarray, outlined: Collection[Head], what: str) -> dict[str, Any]:
    """What a clickable map shows: values [layer head] by colour, heads outlined, and `what` it is."""
    from plotly.colors import sample_colorscale

    scale = maps.diverging([values])
    bound = scale["zmax"]
    share = np.clip((values / bound + 1) / 2, 0, 1)
    width, height = maps.map_size(*values.shape, room=400, smallest=(0, 0))
    cell = max(6, width // values.shape[1]), max(6, height // values.shape[0])
    return {
        "colours": [sample_colorscale(scale["colorscale"], list(row)) for row in share],
        "hover": maps.hover_heads(values, np.full(values.shape, np.nan)),
        "outlined": sorted([head.layer, head.head] for head in outlined),
        "ink": INK,
        "caption": [what, f"red {signed(-bound)}, white 0, blue {signed(bound)}", "outlined: in the vector"],
        "width": cell[0],
        "height": cell[1],
        "steps": [
            tick_step(values.shape[0], values.shape[0] * cell[1] // 18),
            tick_step(values.shape[1], values.shape[1] * cell[0] // 22),
        ],
    }


def clickable_map(content: dict[str, Any]) -> Any:
    """A widget with the traits `content` (of `map_content`) and `clicked` ([layer, head, when])."""
    return _widget()(content=content)


@cache
def _widget() -> type:
    import anywidget
    import traitlets

    class HeadMap(anywidget.AnyWidget):
        _esm = SCRIPT
        content = traitlets.Dict().tag(sync=True)
        clicked = traitlets.List().tag(sync=True)

    return HeadMap
