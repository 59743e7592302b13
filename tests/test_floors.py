"""Imports go down the floors only, read from the source with ast: nothing is run."""

import ast
import json
import sys
from pathlib import Path

import pytest
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "influence_nb"
FLOOR = {"fingerprint": 0, "task": 0, "scores": 0, "data": 1, "raw": 1, "models": 1, "train": 1, "newton": 1,
         "parameters": 1, "blocks": 1, "layers": 1, "pullback": 1, "gradients": 1, "curvature": 1, "kronecker": 1,
         "solve": 1, "sketch": 1, "removal": 1, "head": 1, "replay": 1, "embedding": 1, "distances": 1, "atlas": 1,
         "attribute": 2, "truth": 3, "store": 3, "metrics": 3, "prune": 3, "labels": 3, "confusions": 3, "checks": 3,
         "plots": 4, "widgets": 4, "__init__": 5}
CORE = {"torch", "numpy", "scipy", "sklearn", "matplotlib", "umap", "ipywidgets", "traitlets", "IPython", "anywidget",
        "tqdm", "PIL"}  # the core dependencies, and what ipywidgets and matplotlib always bring


def modules():
    """{dotted name below the package: source}; a folder's own file is called attribute.__init__."""
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    return {".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts): path.read_text() for path in files}


def room(module):
    return module.split(".")[0]


def imports(module, source, known):
    """The modules of the package that `module` imports, wherever in the file, in the names of `known`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = [PACKAGE, *module.split(".")][:-node.level] if node.level else []
            names = [".".join([*above, *filter(None, [node.module]), alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == PACKAGE:  # the longest prefix that is a module; what follows is a name in it
                below = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)] + ["__init__"]
                candidates = [form for part in below for form in (part, f"{part}.__init__")]
                found.add(next(form for form in candidates if form in known))
    return found - {module}


def violations(files):
    """Every import that goes up, sideways inside attribute/, or from plots and widgets into floors 1 and 2."""
    wrong = [f"{module} has no floor in this test" for module in files if room(module) not in FLOOR]
    for module in files.keys() if not wrong else ():
        for other in sorted(imports(module, files[module], files)):
            here, there = FLOOR[room(module)], FLOOR[room(other)]
            inside = room(module) == room(other) == "attribute"
            if there > here:
                wrong.append(f"{module} [{here}] imports {other} [{there}]: up")
            elif inside and "attribute.__init__" != module:
                wrong.append(f"{module} imports {other}: methods do not import each other")
            elif here == 4 and there in (1, 2):
                wrong.append(f"{module} imports {other} [{there}]: it takes arrays and callables instead")
    return wrong


def cycle(files):
    """A module that comes back to itself through its imports, or None."""
    graph = {module: imports(module, source, files) for module, source in files.items()}
    while leaves := [module for module, others in graph.items() if not others & graph.keys()]:
        graph = {module: others for module, others in graph.items() if module not in leaves}
    return min(graph, default=None)


def public_names(files, module):
    """Names without underscore that `module` defines at its top, the modules below it, and what an __init__ gathers."""
    folder = module.removesuffix("__init__")
    below = [other.removeprefix(folder) for other in files if module != folder and other.startswith(folder)]
    names = {name.split(".")[0] for name in below}
    for node in ast.parse(files[module]).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            names |= {leaf.id for leaf in ast.walk(node) if isinstance(leaf, ast.Name) and type(leaf.ctx) is ast.Store}
        elif isinstance(node, ast.ImportFrom) and module.endswith("__init__"):
            names |= {alias.asname or alias.name for alias in node.names}
    return {name for name in names if not name.startswith("_")}


def not_public(source, files):
    """What the code of a notebook takes that is not public, or comes from outside the core dependencies."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            wrong.append(f"uses .{node.attr}")
        tops = ([alias.name for alias in node.names] if isinstance(node, ast.Import)
                else [node.module or "."] if isinstance(node, ast.ImportFrom) else [])
        for name in tops:
            top, _, below = name.partition(".")
            if top != PACKAGE:
                wrong += [f"imports {name}"] if top not in CORE | set(sys.stdlib_module_names) else []
                continue
            form = next((form for form in (below, f"{below}.__init__".lstrip(".")) if form in files), None)
            if form is None or any(part.startswith("_") for part in below.split(".")):
                wrong.append(f"imports {name}, no public module")
            elif isinstance(node, ast.ImportFrom):
                public = public_names(files, form)
                wrong += [f"imports {a.name} from {name}" for a in node.names if a.name not in public]
    return wrong


def code(path):
    """The Python of a notebook, magics translated."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    return "\n".join(TransformerManager().transform_cell("".join(cell["source"])) for cell in cells)


def test_imports_go_down_the_floors():
    files = modules()
    assert "task" in files and "__init__" in files
    assert violations(files) == []


def test_imports_have_no_cycle():
    assert cycle({name: source for name, source in modules().items() if not name.endswith("__init__")}) is None


def test_module_level_imports_are_core_dependencies():
    """What needs an extra, or a package that a user may have, is imported where it is used."""
    for module, source in modules().items():
        for node in ast.parse(source).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else (
                [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])
            for name in names:
                assert name.split(".")[0] in CORE | {PACKAGE} | set(sys.stdlib_module_names), f"{module}: {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_import_public_names_only(path):
    assert not_public(code(path), modules()) == []


PLANTED = {"__init__": "from .attribute import CG", "task": "", "solve": "from . import task", "data": "",
           "attribute.__init__": "from .cg import CG", "attribute.cg": "from ..solve import cg",
           "widgets.__init__": "from .explorer import Explorer",
           "widgets.explorer": "from influence_nb.task import Task"}


@pytest.mark.parametrize("module, source, said", [
    ("task", "def f():\n    from .solve import cg", "up"),
    ("attribute.tracin", "from .cg import CG", "do not import each other"),
    ("attribute.tracin", "from influence_nb.attribute import cg", "do not import each other"),
    ("attribute.tracin", "from influence_nb import CG", "up"),
    ("widgets.explorer", "from influence_nb.data import load", "takes arrays"),
    ("plots", "import influence_nb.attribute.cg", "takes arrays"),
    ("extra", "", "has no floor"),
])
def test_a_planted_violation_is_found(module, source, said):
    assert violations(PLANTED) == []
    (found,) = violations(PLANTED | {module: source})
    assert said in found and found.startswith(module)


def test_a_planted_cycle_is_found():
    assert cycle(PLANTED) is None
    assert cycle(PLANTED | {"data": "from .solve import cg", "task": "from .data import load"}) is not None


@pytest.mark.parametrize("source", [
    "from influence_nb import cg", "from influence_nb.solve import task_", "from influence_nb.hidden import f",
    "from influence_nb.attribute.cg import cg", "scores._values", "import helper", "from tests import conftest"])
def test_a_name_that_is_not_public_is_found(source):
    assert not_public("from influence_nb import CG, solve\nimport influence_nb.task\nimport numpy as np", PLANTED) == []
    assert len(not_public(source, PLANTED)) == 1
