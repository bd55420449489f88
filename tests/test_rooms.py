"""The rooms of the package: an import only ever points down, and nothing goes in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "ivlens"
ROOMS = [
    "common", "models", "tasks", "running", "patching", "vectors", "steering", "dynamics", "training", "continual",
    "plots", "report", "explore", "demo", "cli", "__main__",
]  # fmt: skip


def _modules() -> dict[str, Path]:
    return {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts): p for p in sorted(PACKAGE.rglob("*.py"))}


def _imports() -> list[tuple[str, str, str]]:
    """(module, what it imports, the function it stands in) for every import within the package, in functions too."""
    modules, found = _modules(), []

    def visit(node: ast.AST, name: str, inside: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            within = child.name if isinstance(child, ast.FunctionDef) else inside
            if isinstance(child, ast.ImportFrom) and child.module and child.module.split(".")[0] == "ivlens":
                assert child.level == 0
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    target = next((m for m in (whole, child.module) if m in modules), f"{child.module}.__init__")
                    found.append((name, target, inside))
            elif isinstance(child, ast.Import):
                found.extend((name, a.name, inside) for a in child.names if a.name.split(".")[0] == "ivlens")
            visit(child, name, within)

    for name, path in modules.items():
        visit(ast.parse(path.read_text(encoding="utf-8")), name, "")
    return found


def _room(module: str) -> str:
    return module.split(".")[1]


def test_imports_point_down():
    up = [
        f"{module}:{inside or '(top)'} imports {target}"
        for module, target, inside in _imports()
        if _room(module) != "__init__" and _room(target) != "__init__"  # `ivlens` itself only lists names
        if ROOMS.index(_room(target)) > ROOMS.index(_room(module))
        if not (inside == "plot" and _room(target) == "plots")
    ]
    assert not up, "\n".join(up)


def test_nothing_goes_in_a_circle():
    below: dict[str, set[str]] = {}
    for module, target, inside in _imports():
        if not (inside == "plot" and _room(target) == "plots") and not target.endswith("__init__"):
            below.setdefault(module, set()).add(target)
    done: set[str] = set()

    def follow(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in sorted(below.get(module, ())):
                follow(target, (*path, module))
            done.add(module)

    for module in sorted(below):
        follow(module, ())


def test_no_two_classes_of_one_name():
    names = [
        node.name
        for path in _modules().values()
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    ]
    assert sorted(names) == sorted(set(names))


def test_files_are_short():
    long = {p.name: n for p in _modules().values() if (n := len(p.read_text(encoding="utf-8").splitlines())) > 300}
    assert not long
