"""Rows of files, every cell as it is written: nothing is guessed to be a number, a date or missing."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["KINDS", "Row", "read_rows", "read_text"]

KINDS = ("jsonl", "json", "csv", "tsv", "parquet")
EXPECTED = ".jsonl, .json, .csv, .tsv or .parquet, each also with .gz"


class Row(dict):
    """A row that knows where it stands: `place` is its file and line."""

    def __init__(self, values: Mapping[str, Any], place: str):
        super().__init__(values)
        self.place = place


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a table: `.csv` or `.tsv` (commas, semicolons or tabs), `.jsonl`, `.json` (a list of rows, a row in each line, columns
    by name, or `{"data": …}` with a list or columns), `.parquet`; each also gzipped.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, or it is of another kind, empty, truncated, ragged or not UTF-8; with file and line.
    """
    path = _found(Path(path))
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give the path of a {EXPECTED} file")
    zipped = path.suffix.lower() == ".gz"
    kind = (path.with_suffix("") if zipped else path).suffix.lower().removeprefix(".")
    if kind not in KINDS:
        raise ValueError(f"can't read {path.name}: choose a {EXPECTED} file")
    try:
        content = gzip.decompress(path.read_bytes()) if zipped else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} can't be unpacked ({error}); download or write it again") from error
    if not content.strip():
        raise ValueError(f"{path} is empty; put one record in each line")
    if kind == "parquet":
        rows = _parquet(content, path)
    elif kind == "json":
        rows = _json(_decoded(content, path), path)
    elif kind == "jsonl":
        rows = _lines(_decoded(content, path), path)
    else:
        rows = _delimited(_decoded(content, path), path, "\t" if kind == "tsv" else None)
    if not rows:
        raise ValueError(f"{path} holds no rows; put one record in each line")
    return rows


def read_text(path: Path) -> str:
    """A text file, without the mark at its beginning that some programs write."""
    return _decoded(path.read_bytes(), path)


def _found(path: Path) -> Path:
    """The path as it is; only where nothing stands there, with `~` as the home folder."""
    try:
        return path if path.exists() else path.expanduser()
    except (RuntimeError, ValueError):  # no such user; no possible path
        return path


MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def _decoded(content: bytes, path: Path) -> str:
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "UTF-8")
    try:
        return content.decode(encoding.replace("UTF-8", "utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"line {line} of {path} is not {encoding}; save the file again as UTF-8") from error


def json_value(text: str, place: str) -> Any:
    """JSON with numbers and truth values as the texts that they are written as; NaN, which some write for nothing, is none."""
    try:
        return _written(json.loads(text, parse_int=str, parse_float=str, object_pairs_hook=_object))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is truncated or not JSON ({error}); write or download it again") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"a key of {', '.join(key for key, _ in pairs)} stands twice")
    return values


def _written(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return [_written(x) for x in value]
    return {key: _written(x) for key, x in value.items()} if isinstance(value, dict) else value


def _lines(text: str, path: Path) -> list[Row]:
    lines = {f"line {i} of {path}": line for i, line in enumerate(text.split("\n"), start=1) if line.strip()}
    return [_row(json_value(line, place), place) for place, line in lines.items()]


def _json(text: str, path: Path) -> list[Row]:
    first, _, rest = text.strip().partition("\n")
    if rest and first.startswith("{") and first.rstrip().endswith("}"):
        return _lines(text, path)
    content = json_value(text, str(path))
    if isinstance(content, dict) and isinstance(content.get("data"), (list, dict)):
        content = content["data"]
    if isinstance(content, dict):
        if not content or not all(isinstance(x, list) for x in content.values()):
            raise ValueError(f"{path} holds a single record; put a list of records into it, or columns by name")
        sizes = {key: len(x) for key, x in content.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the columns of {path} are of different lengths ({sizes}); write it again")
        content = [dict(zip(content, row)) for row in zip(*content.values())]
    if not isinstance(content, list):
        raise ValueError(f"{path} holds {content!r}; put a list of records into it")
    return [_row(row, f"record {i} of {path}") for i, row in enumerate(content)]


def _row(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f'{place} is no record; write {{"input": "...", "output": "..."}}')
    return Row(row, place)


def _delimited(text: str, path: Path, delimiter: str | None) -> list[Row]:
    if text.lstrip("\r\n").partition("\n")[0].endswith("\r"):  # that system's line ends, in cells too
        text = text.replace("\r\n", "\n")
    header = re.sub('"[^"]*"', "", text.strip()).splitlines()[:1]  # none where one cell is all there is
    delimiter = delimiter or max(",;\t", key="".join(header).count)  # programs of some countries write semicolons
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        lines = [(f"line {reader.line_num} of {path}", cells) for cells in reader]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} of {path} can't be read ({error})") from error
    lines = [(place, cells) for place, cells in lines if any(cells) and (len(cells) > 1 or cells[0].strip())]
    names = lines.pop(0)[1] if lines else []
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{path} has two columns called {twice[0]!r}; rename one")
    for place, cells in lines:
        if len(cells) != len(names):
            said = f"{len(cells)} cells, but there are {len(names)} columns"
            raise ValueError(f"{place} has {said}; quote cells with {delimiter!r}")
    return [Row({name: cell or None for name, cell in zip(names, cells)}, place) for place, cells in lines]


def _parquet(content: bytes, path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is truncated or no parquet file ({error}); write or download it again") from error
    return [Row(row, f"row {i} of {path}") for i, row in enumerate(rows)]
