"""The panel in a real JupyterLab, in Chromium: what is moved there, and what then stands there against `ivl.generate`."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import ivlens as ivl

ROOT = Path(__file__).parents[1]
MISSING = [m for m in ("jupyterlab", "anywidget", "ipywidgets", "nbformat", "selenium") if find_spec(m) is None]
MISSING += [p for p in ("chromium", "chromedriver") if shutil.which(p) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}; see CONTRIBUTING.md"),
]

# What the notebook's first cell runs, and the test too.
MODELS = {
    "tiny": """
import torch
from transformers import AutoTokenizer
import ivlens as ivl
from tests import tiny
model = tiny.hooked_model("llama", AutoTokenizer.from_pretrained({folder!r}))
records = [{{"input": word, "output": word + end}} for word in tiny.VERBS for end in ("ed", "s")]
tasks = [ivl.Task.from_records(records[i::2], name=name, instruction="Do.") for i, name in enumerate(("past", "plural"))]
vectors = {{t.name: ivl.extract_vector(model, t, [(0, 1), (1, 0), (2, 3)], shots=2, n_prompts=6) for t in tasks}}
vectors = {{name: 20 * v / v.norm() for name, v in vectors.items()}}
values = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(0))
effects = ivl.HeadEffects(values, torch.zeros(4), ("past",) * 4)
""",
    "smollm2": """
from dataclasses import replace
import ivlens as ivl
model, effects = ivl.load_model(), None
heads = [(14, 1), (18, 6), (20, 5), (20, 6), (24, 4)]
tasks = ivl.load_tasks(["present_past", "singular_plural"])
vectors = {{n: ivl.extract_vector(model, t, heads, n_prompts=4) for n, t in tasks.items()}}
vectors = {{n: replace(v, layer=10, scale=3.0) for n, v in vectors.items()}}
""",
}
LONG = ("smollm2",)  # whose times are those that the documentation gives
PANEL = 'panel = ivl.explore(model, vectors, effects=effects, prompt="Q: walk\\nA:")\npanel'
KERNEL = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.info && true"
TEXTS = "return [...document.querySelectorAll('.ivl-said td')].map(x => x.textContent)"
# From a key on a slider to the first words that the new setting makes.
TIMED = """
const done = arguments[arguments.length - 1], old = document.querySelector('.ivl-said').dataset.layer;
let start = null;
document.addEventListener('keydown', () => { start ??= performance.now() }, {capture: true, once: true});
const watch = new MutationObserver(() => {
    const said = document.querySelector('.ivl-said');
    if (start !== null && said && said.dataset.layer !== old && [...said.querySelectorAll('td')].some(x => x.textContent)) {
        window.ivlSeconds = (performance.now() - start) / 1000; watch.disconnect();
    }
});
window.ivlSeconds = null;
watch.observe(document.body, {childList: true, subtree: true, characterData: true, attributes: true});
done();
"""


@contextmanager
def jupyterlab(folder: Path) -> Iterator[str]:
    """A server of its own, with nothing of the user's; its address with a token."""
    quiet = folder / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    own = {f"JUPYTER_{name}_DIR": str(folder / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    own |= {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(folder / "spaces")}
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, address = secrets.token_hex(8), f"http://127.0.0.1:{port}"
    options = [f"--ServerApp.port={port}", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}"]
    options += ["--no-browser", "--allow-root", "--ServerApp.port_retries=0", "--LabApp.expose_app_in_browser=True"]
    with open(folder / "server.log", "w") as log:
        environment = {**os.environ, **own, "PYTHONPATH": paths, "IPYTHONDIR": str(folder / "ipython")}
        command = [sys.executable, "-m", "jupyterlab", *options]
        server = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    try:
        wait(lambda: _answers(f"{address}/api/status?token={token}"), "the server's answer")
        yield f"{address}/lab/tree/panel.ipynb?token={token}"
    finally:
        server.terminate()
        server.wait(60)


def _answers(address: str) -> bool:
    try:
        return urllib.request.urlopen(address, timeout=5).status == 200
    except OSError:
        return False


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking no-proxy-server"
    for flag in (*flags.split(), "disable-component-update", "disable-sync", "window-size=1400,1500"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def wait(until: Callable[[], Any], what: str, seconds: float = 240) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := until():
            return found
        time.sleep(0.05)
    raise AssertionError(f"no {what} after {seconds:.0f} s")


@dataclass
class Hand:
    """Moves what is in the panel, and knows what must then stand there."""

    driver: Any
    model: Any
    vectors: dict[str, Any]
    prompt: str = "Q: walk\nA:"
    names: tuple[str, ...] = ()
    layer: int = 0
    scale: float = 1.0
    positions: str = "last"
    seconds: list[float] = field(default_factory=list)

    def check(self) -> list[str]:
        """The texts, once they are those of `generate`."""
        place = {"layer": self.layer, "scale": self.scale, "positions": self.positions}
        chosen = [self.vectors[name] for name in self.names]
        expected = [t[0] for t in ivl.generate(self.model, self.prompt, vector=chosen, **place).texts.values()]
        try:
            wait(lambda: self.driver.execute_script(TEXTS) == expected, f"{expected}")
        except AssertionError as error:
            raise AssertionError(f"{error}; there is {self.driver.execute_script(TEXTS)} at {place}") from None
        return expected

    def slider(self, number: int) -> Any:
        return self.driver.find_elements("css selector", ".widget-slider .noUi-handle")[number]

    def key(self, step: int) -> None:
        """One layer up or down by key, the time to the first words taken."""
        self.driver.execute_async_script(TIMED)
        self.slider(0).send_keys("\ue014" if step > 0 else "\ue012")
        self.layer += step
        self.seconds.append(wait(lambda: self.driver.execute_script("return window.ivlSeconds"), "first words"))

    def drag(self, by: int) -> None:
        from selenium.webdriver import ActionChains

        actions = ActionChains(self.driver).click_and_hold(self.slider(1))
        for _ in range(5):
            actions = actions.move_by_offset(by // 5, 0)
        actions.release().perform()
        before = self.scale
        self.scale = float(self.driver.find_elements("css selector", ".widget-readout")[1].text)
        assert self.scale != before

    def button(self, text: str) -> None:
        buttons = self.driver.find_elements("css selector", ".widget-toggle-button, .widget-toggle-buttons button")
        next(b for b in buttons if b.text.strip() == text).click()

    def type(self, text: str) -> None:
        """Key by key, each of which asks for a new answer."""
        area = self.driver.find_element("css selector", ".widget-textarea textarea")
        area.clear()
        area.send_keys(text)
        self.prompt = text

    def head(self, head: Any) -> None:
        cell = self.driver.find_element("css selector", f'.ivl-map [data-head="{head}"]')
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", cell)
        cell.click()


@pytest.mark.parametrize("name", list(MODELS))
def test_ten_interactions(name, tmp_path, tokenizer_folder):
    import nbformat

    if name in LONG and "IVLENS_LONG_TESTS" not in os.environ:
        pytest.skip("takes minutes beside another test process; set IVLENS_LONG_TESTS=1 to run it")
    own: dict[str, Any] = {}
    source = MODELS[name].format(folder=str(tokenizer_folder))
    exec(source, own)
    cells = [nbformat.v4.new_code_cell(text) for text in (source, PANEL)]
    about = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=about), tmp_path / "panel.ipynb")
    first, second = own["vectors"]
    vector = own["vectors"][first]
    with jupyterlab(tmp_path) as address, chromium(tmp_path / "profile") as driver:
        driver.get(address)
        wait(lambda: driver.execute_script(f"return {KERNEL}"), "kernel")
        driver.execute_script("jupyterapp.commands.execute('filebrowser:toggle-main')")
        driver.execute_script("jupyterapp.commands.execute('notebook:run-all-cells')")
        wait(lambda: driver.execute_script(TEXTS), "panel")
        layer = own["model"].cfg.n_layers // 3 if vector.layer is None else vector.layer
        hand = Hand(driver, own["model"], dict(own["vectors"]), names=(first,), layer=layer, scale=vector.scale)
        seen = [hand.check()]

        def then(move: Callable, *given: Any) -> None:
            move(*given)
            seen.append(hand.check())
            driver.save_screenshot(str(tmp_path / f"{len(seen)}.png"))

        then(hand.key, +1)
        then(hand.key, -1)
        then(hand.key, +1)
        then(hand.drag, 30)
        hand.positions = "generated"
        then(hand.button, "generated")
        hand.positions = "all"
        then(hand.button, "all")
        then(hand.type, "Q: jump\nA:")
        hand.names = (first, second)
        then(hand.button, second)
        head = vector.heads[0]
        for i in (1, 0):  # dropped, then added again
            hand.vectors = {n: less(v, v.heads[i:]) for n, v in own["vectors"].items()}
            then(hand.head, head)
        assert len(seen) == 11 and len({tuple(x) for x in seen}) > 4
        assert str(head) in driver.find_element("css selector", ".ivl-heads").text
        print(f"\n{name}: first words after {statistics.median(hand.seconds):.2f} s (median of {len(hand.seconds)})")
        said = [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
        assert not said
        events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
        assert asked and not [
            url for url in asked if url.startswith("http") and not url.startswith("http://127.0.0.1:")
        ]


def less(vector: Any, heads: tuple) -> Any:
    """The vector of these of its heads."""
    shares = vector.shares[[vector.heads.index(head) for head in heads]]
    return replace(vector, vector=shares.sum(0), heads=heads, shares=shares)
