"""The order of the house: imports go down or sideways, never up, and never in a circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = (
    ("model", "version"),
    ("errors", "devices"),
    ("files", "metrics", "settings", "hub", "data", "serving", "hub_cards"),
    ("labelling", "adaptation", "export"),
    ("pretraining", "evaluation", "sklearn", "spacy"),
    ("cli",),
    ("train", "eval"),
)
"""Rooms from the ground up: folders and single files of the package, and the top-level folders."""

FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """Return dotted name → file of everything but the tests."""
    files = [p for top in ("modeling_mtpf", "hub_cards", "train", "eval") for p in (ROOT / top).rglob("*.py")]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


def imports(name: str, file: Path, known: dict[str, Path]) -> set[str]:
    """Return the modules of the project that a file imports anywhere, also inside functions."""
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # An imported submodule counts as itself, a name as the module that holds it.
            found |= {
                f"{module}.{alias.name}" if f"{module}.{alias.name}" in known else module
                for alias in node.names
            }
    return (found & set(known)) - {name}


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(name, file, known) for name, file in known.items()}


def room(name: str) -> str:
    first, *rest = name.split(".")
    return rest[0] if first == "modeling_mtpf" and rest else first


def circle(edges: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def rooms(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return which rooms each room imports; the package's own `__init__` is the public face, in no room."""
    found: dict[str, set[str]] = {}
    for name, targets in edges.items():
        if name != "modeling_mtpf":
            found.setdefault(room(name), set()).update(
                room(t) for t in targets if t != "modeling_mtpf" and room(t) != room(name)
            )
    return found


def test_every_room_has_a_floor():
    assert {room(name) for name in modules() if name != "modeling_mtpf"} <= set(FLOOR)


def test_no_import_goes_up():
    edges = graph()
    upward = [
        f"{name} imports {target}"
        for name, targets in edges.items()
        for target in targets
        if "modeling_mtpf" not in (name, target) and FLOOR[room(target)] > FLOOR[room(name)]
    ]
    assert not upward


def test_no_files_import_each_other_in_a_circle():
    edges = {
        name: targets - {"modeling_mtpf"} for name, targets in graph().items() if name != "modeling_mtpf"
    }
    assert not circle(edges)


def test_no_rooms_import_each_other_in_a_circle():
    assert not circle(rooms(graph()))


def test_the_published_code_imports_only_its_neighbours():
    for file in (ROOT / "modeling_mtpf" / "model").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module, f"{file.name}: line {node.lineno}"


def test_a_circle_and_an_upward_import_are_seen():
    assert circle({"a": {"b"}, "b": {"a"}})
    edges = graph()
    edges["modeling_mtpf.model.trunk_mtpf"] = {"modeling_mtpf.cli.main"}
    assert circle(rooms(edges))
