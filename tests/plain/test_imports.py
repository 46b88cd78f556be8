"""Imports run one way, and a bare import stays light. Read from the import statements, nothing is
executed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastprune
import fastprune_kernels

PACKAGE = Path(fastprune.__file__).parent
KERNELS = Path(fastprune_kernels.__file__).parent

# layer 0 imports nothing of the package; a module may import from its own layer and from those
# before it
LAYERS = [
    {"errors"},
    {"validate", "solver"},
    {"io"},
    {"masks"},
    {"data"},
    {"plan", "objectives"},
    {"models"},
    {"costs"},
    {"engine"},
    {"workers"},
    {"evaluator"},
    {"search"},
    {"study", "exports", "integrations", "testing"},
    {"cli", "__main__"},
]
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
FREE = {
    "__init__",
    "demo",
}  # the package's face imports everything, the demo's data and training script nothing


def modules(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


def imports(path: Path, package: Path) -> list[tuple[str, str]]:
    """(dotted module, imported name or '') of every import statement in a file, relative ones
    resolved."""
    inside = (package.name, *path.relative_to(package).with_suffix("").parts)
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(inside[: len(inside) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found += [(module, alias.name) for alias in node.names]
    return found


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def own_parts(path: Path) -> set[str]:
    """First-level modules of fastprune that a file imports."""
    parts = set()
    for module, name in imports(path, PACKAGE):
        names = module.split(".")
        if names[0] == "fastprune" and path.name != "__init__.py" and names == ["fastprune"]:
            parts.add(name)
        elif names[0] == "fastprune" and len(names) > 1:
            parts.add(names[1])
    return parts


@pytest.mark.parametrize("path", modules(PACKAGE), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_run_one_way(path):
    part = part_of(path)
    if part in FREE:
        return
    assert part in LAYER_OF, f"{path}: give the new module {part!r} its place in the layers"
    for other in own_parts(path) - {part, "_native"}:
        if other == "demo":
            assert part in ("models", "study", "exports", "cli"), f"{path} imports the demo"
        elif other not in ("__version__", ""):
            assert other in LAYER_OF, f"{path} imports {other!r}, which has no place in the layers"
            assert LAYER_OF[other] <= LAYER_OF[part], (
                f"{path} imports {other!r}: the arrow runs back"
            )


def test_layers_have_no_cycles():
    """Within a layer, too, no two modules import each other, however indirectly."""
    graph: dict[str, set[str]] = {}
    for path in modules(PACKAGE):
        if part_of(path) not in FREE:
            graph.setdefault(part_of(path), set()).update(
                own_parts(path) & set(LAYER_OF) - {part_of(path)}
            )

    def reachable(part: str) -> set[str]:
        found, pending = set(), list(graph.get(part, ()))
        while pending:
            following = pending.pop()
            if following not in found:
                found.add(following)
                pending += graph.get(following, ())
        return found

    assert not [part for part in graph if part in reachable(part)]


def own_files(path: Path) -> set[Path]:
    """The other files of fastprune that a file imports, for type checkers or inside of functions
    too."""
    files = set()
    for module, name in imports(path, PACKAGE):
        names = module.split(".")
        if names[0] == "fastprune":
            place = PACKAGE.joinpath(*names[1:])
            for target in (place / f"{name}.py", place.with_suffix(".py"), place / "__init__.py"):
                if target.exists():
                    files.add(target)
                    break
    return files - {path}


FOLDERS = sorted({path.parent for path in modules(PACKAGE)} - {PACKAGE})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_of_a_folder_have_no_cycles(folder):
    """Imports that only type checkers read, and those inside of functions, count too."""
    graph = {path: own_files(path) for path in folder.rglob("*.py")}

    def reachable(start: Path) -> set[Path]:
        reached: set[Path] = set()
        pending = list(graph[start])
        while pending:
            following = pending.pop()
            if following in graph and following not in reached:
                reached.add(following)
                pending += graph[following]
        return reached

    circles = [path for path in graph if path in reachable(path)]
    assert not circles, ", ".join(str(path.relative_to(PACKAGE)) for path in circles)


def test_search_knows_its_scorer_only():
    known = {"plan", "masks", "costs", "errors", "validate", "search", "solver"}
    for path in modules(PACKAGE / "search"):
        assert own_parts(path) <= known, path
        for module, _ in imports(path, PACKAGE):
            assert module.split(".")[0] not in {"torch", "transformers", "fastprune_kernels"}, path
        source = ast.parse(path.read_text(encoding="utf-8"))
        private = [
            node.attr
            for node in ast.walk(source)
            if isinstance(node, ast.Attribute) and is_private(node)
        ]
        assert not private, f"{path} reaches into {private}"


def is_private(node: ast.Attribute) -> bool:
    """Whether an attribute such as evaluator._engine is another object's own."""
    owner = node.value.id if isinstance(node.value, ast.Name) else ""
    return (
        node.attr.startswith("_")
        and not node.attr.startswith("__")
        and owner not in ("self", "cls")
    )


@pytest.mark.parametrize("path", modules(KERNELS), ids=lambda path: str(path.relative_to(KERNELS)))
def test_kernels_never_import_fastprune(path):
    assert not [
        module for module, _ in imports(path, KERNELS) if module.split(".")[0] == "fastprune"
    ]


def test_plans_and_data_are_free_of_torch():
    free = {"plan", "masks", "objectives", "data", "solver", "errors", "validate", "io"}
    for path in modules(PACKAGE):
        if part_of(path) in free:
            roots = {module.split(".")[0] for module, _ in imports(path, PACKAGE)}
            assert not roots & {"torch", "transformers"}, path


def run(code: str) -> str:
    path = ":".join([str(PACKAGE.parent), str(KERNELS.parent)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_bare_import_is_light():
    heavy = ("torch", "transformers", "numpy", "safetensors", "triton", "matplotlib", "rich")
    assert (
        run(
            f"import sys, fastprune; print([name for name in {heavy} if name in sys.modules])"
        ).strip()
        == "[]"
    )


def test_public_names():
    names = run(
        "import fastprune; print(*[n for n in fastprune.__all__ if getattr(fastprune, n) is None])"
    )
    assert names.strip() == ""
    assert set(dir(fastprune)) == {*fastprune.__all__, "__version__"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fastprune.nothing
