"""A figure as an image, drawn by a browser through kaleido."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import psutil

__all__ = ["draw"]

PATIENCE = 30  # seconds until a browser that doesn't answer is given up
# Not figure.to_image: that lets the browser fetch MathJax from the network.
DRAW = """
import json, sys
sys.path = [folder for folder in sys.path if folder]  # nothing from the folder that the user stands in
import kaleido
figure, options, path = json.load(sys.stdin)
image = kaleido.calc_fig_sync(figure, opts=options, kopts={"mathjax": False})
open(path, "wb").write(image)
"""


def draw(figure: go.Figure, options: dict[str, Any]) -> bytes:
    """Drawn in a process of its own: kaleido waits forever for a browser that starts and never answers."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        image, log = Path(folder, "image"), Path(folder, "log")
        given = json.dumps([json.loads(figure.to_json()), options, str(image)]).encode()
        with log.open("wb") as told:
            process = subprocess.Popen(
                [sys.executable, "-c", DRAW],
                stdin=subprocess.PIPE,
                stdout=told,
                stderr=told,
                env={**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), folder)},
            )
            try:
                process.communicate(given, timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"it didn't answer within {PATIENCE} s") from None
            finally:
                if process.poll() is None:
                    for started in [*psutil.Process(process.pid).children(recursive=True), process]:
                        with contextlib.suppress(psutil.NoSuchProcess):
                            started.kill()
                    process.wait()
        if not image.is_file():
            raise RuntimeError((log.read_text(errors="replace").strip().splitlines() or ["it says nothing"])[-1])
        return image.read_bytes()
