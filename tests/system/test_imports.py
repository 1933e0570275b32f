"""What imports what: the library little, rooms those below them, no module itself."""

import ast
import configparser
import graphlib
import importlib.metadata
import re
import subprocess
import sys

import pytest

from experiments import ROOMS
from support import ROOT

SOURCES = [
    path
    for folder in ("attention", "experiments", "configs", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
HEAVY = "flax tensorflow tensorflow_datasets grain matplotlib orbax ml_collections optax absl rich"


def run(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light():
    code = "import attention, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    imported = set(run(code).split())
    assert "attention" in imported
    assert not imported & set(HEAVY.split())


ONLY_JAX = """
import importlib.machinery, sys

class OnlyJax:
    def find_spec(self, name, path=None, target=None):
        top = name.partition('.')[0]
        allowed = {'attention', 'jax', 'jaxlib', 'numpy', 'scipy', 'ml_dtypes', 'opt_einsum'}
        if top in allowed | sys.stdlib_module_names or top.startswith('_'):
            return importlib.machinery.PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [
    importlib.machinery.BuiltinImporter, importlib.machinery.FrozenImporter, OnlyJax()
]
try:
    import hypothesis
except ModuleNotFoundError:
    pass
else:
    raise AssertionError('nothing is blocked')

import jax
import attention

mechanism = attention.Mechanism(attention.parse('score', 'additive(hidden=2)'))
params = mechanism.init(jax.random.key(0), num_heads=2, head_dim=4)
x = jax.numpy.ones((3, 2, 4))
assert attention.attend(mechanism, params, x, x, x).shape == (3, 2, 4)
assert attention.dot_product_attention(x, x, x, is_causal=True).shape == (3, 2, 4)
assert 'dense: runs' in attention.explain(mechanism, x, x, x)
assert all(hasattr(attention, name) for name in attention.__all__)
"""


def test_jax_and_numpy_are_enough():
    """jax brings jaxlib, ml_dtypes, opt_einsum and scipy; nothing else can be imported."""
    run(ONLY_JAX)


def nodes(tree, functions):
    """All nodes below; those inside functions only if `functions`."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from nodes(node, functions)


def imports(path, functions=True):
    """Dotted names of all that the file imports: `from a import b` is a.b, whatever b is."""
    for node in nodes(ast.parse(path.read_text()), functions):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            # importlib.import_module("..."), __import__("..."), pytest.importorskip("...")
            function = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
            function = function.id if isinstance(function, ast.Name) else function
            if "import" in str(function):
                yield str(node.args[0].value)
        assert not getattr(node, "level", 0), f"{path}: write imports in full"


def test_imports_are_found(tmp_path):
    path = tmp_path / "example.py"
    path.write_text(
        "import a.b as x, c\nclass C:\n  from d import *\n  def f():\n    from e.f import g\n"
        "    importlib.import_module('h.i')\n    __import__('j')\n    print('k')\n"
    )
    assert sorted(imports(path)) == ["a.b", "c", "d.*", "e.f.g", "h.i", "j"]
    assert sorted(imports(path, functions=False)) == ["a.b", "c", "d.*"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sources(path):
    """TensorFlow nowhere; in the library, outside nn and models, not even a lazy import.

    No test module is imported: what several share is in tests/support.
    """
    names = {name.partition(".")[0] for name in imports(path)}
    assert not names & {"tensorflow", "tensorflow_text", "tf_keras", "keras"}
    assert not any(name.startswith("test") for name in names)
    inside = path.relative_to(ROOT).parts
    if inside[0] == "attention" and inside[1] not in ("nn", "models"):
        assert names <= {"attention", "jax", "numpy"} | sys.stdlib_module_names
    if inside[0] == "attention":
        assert not names & {"experiments", "configs", "support"}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path
    for path in SOURCES
    if path.relative_to(ROOT).parts[0] in ("attention", "experiments")
}


def modules_imported(path, functions=True):
    """Those of MODULES that the file imports; the packages that they lie in do not count."""
    for name in imports(path, functions):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        if name:
            yield name


def room(module):
    """The index in ROOMS; that of an entry point is above all."""
    name = module.split(".")[1]
    return ROOMS.index(name) if name in ROOMS else len(ROOMS)


def test_rooms_are_all_folders_of_experiments():
    folders = {path.parent.name for path in (ROOT / "experiments").glob("*/__init__.py")}
    assert folders == set(ROOMS)


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("experiments.")])
def test_rooms_import_those_below_them(module):
    """Inside functions too; nobody imports an entry point."""
    for name in modules_imported(MODULES[module]):
        if name.startswith("experiments."):
            assert room(name) <= room(module) and room(name) < len(ROOMS), f"{module}: {name}"


@pytest.mark.parametrize("package", ["attention", "experiments"])
def test_no_module_imports_itself_by_way_of_others(package):
    """What is imported inside a function comes later and does not count."""
    graph = {
        name: set(modules_imported(path, functions=False)) - {name}
        for name, path in MODULES.items()
        if name.partition(".")[0] == package
    }
    assert sum(map(len, graph.values())) > len(graph)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_what_is_imported_is_declared():
    """Also what another package brings today."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    declared = {re.split(r"[\[<>=]", line)[0] for text in lines for line in text.split()}
    declared = {name.lower().replace("_", "-") for name in declared}
    packages = importlib.metadata.packages_distributions()
    # Of this project, or of Python 3.14 and what an error tells to install before.
    others = sys.stdlib_module_names | {"attention", "experiments", "compression", "zstandard"}
    for path in SOURCES:
        if path.relative_to(ROOT).parts[0] in ("attention", "experiments"):
            for name in {name.partition(".")[0] for name in imports(path)} - others:
                names = {each.lower().replace("_", "-") for each in packages.get(name, [name])}
                assert names & declared, f"{path} imports {name}: declare it in setup.cfg"
