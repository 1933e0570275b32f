"""What the README and the guide show runs as it stands there.

Each page is one namespace, in which its Python blocks run in order. The flags and settings of each
command line are parsed as the command does; nothing is trained, but in slow tests.
"""

import configparser
import fnmatch
import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import app, flags

import attention
from support import ROOT
from support.marks import slow_but

DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for path in sorted(x for place in ("", "docs/", "results/") for x in ROOT.glob(f"{place}*.md"))
}
RUN_DIRECTORY = "docs/run-directory.md"
"""Its blocks read what a sweep has written."""


def blocks(page):
    """The Python of a page, block by block."""
    return re.findall(r"^```python\n(.*?)^```", DOCUMENTS[page], re.DOTALL | re.MULTILINE)


def run(page):
    """The namespace of a page after its blocks."""
    scope = {"__name__": "page"}
    for number, code in enumerate(blocks(page), 1):
        exec(compile(code, f"{page}, block {number}", "exec", dont_inherit=True), scope)
    return scope


def commands():
    """(page, module, arguments) of each 'python -m experiments.<module> ...', as a shell reads it.

    '...' stands for the config and the work directory.
    """
    whole = {"--config=...": "--config=configs/mine.py", "--workdir=...": "--workdir=runs/mine"}
    for page, text in DOCUMENTS.items():
        lines = re.findall(r"^    (.*)", text.replace("\\\n", " "), re.MULTILINE)
        lines += re.findall(r"`([^`\n]+)`", text)
        for line in lines:
            _, command, rest = line.partition("python -m experiments.")
            if command:
                module, *arguments = shlex.split(rest, comments=True)
                arguments = [whole.get(argument, argument) for argument in arguments]
                if "..." in arguments:
                    at = arguments.index("...")
                    arguments[at : at + 1] = whole.values()
                yield page, module, arguments


COMMANDS = list(commands())


@pytest.mark.parametrize("page", DOCUMENTS)
def test_no_block_and_no_command_is_left_out(page):
    text = DOCUMENTS[page]
    fences = re.findall(r"^ *(?:```|~~~)(.*)", text, re.MULTILINE)
    assert fences == ["python", ""] * len(blocks(page))
    of_page = [command for command in COMMANDS if command[0] == page]
    assert len(of_page) == text.count("python -m experiments.")


WITH_BLOCKS = [page for page in DOCUMENTS if blocks(page) and page != RUN_DIRECTORY]


LONG = ("docs/kernels.md", "docs/models.md")  # to compile


@pytest.mark.parametrize("page", slow_but(set(WITH_BLOCKS) - {*LONG}, WITH_BLOCKS))
def test_the_blocks_of_a_page_run(page):
    run(page)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the commands read: configs/, also mine.py, and a cell's config.json."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "configs").mkdir()
    for path in (*ROOT.glob("configs/*.py"), ROOT / "configs/reference"):
        (folder / "configs" / path.name).symlink_to(path)
    (config,) = (code for code in blocks("README.md") if "def get_config" in code)
    (folder / "configs/mine.py").write_text(config)
    cell = folder / "runs/mine/cells/base"
    cell.mkdir(parents=True)
    (cell / "config.json").write_text('{"task": {"name": "recall"}}')
    return folder


@pytest.fixture
def start(place, monkeypatch):
    """Starts an entry point in `place` up to where it has its flags: -> its main, if it has any."""
    own_flags = set(flags.FLAGS)
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # of the process that runs tests

    def start(module, arguments):
        mains = []
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        monkeypatch.setattr(app, "run", lambda main, **_: mains.append(main))
        runpy.run_module(f"experiments.{module}", run_name="__main__")
        assert flags.FLAGS(sys.argv)[1:] == []
        assert mains or not arguments, "it takes no flags"
        return mains

    yield start
    flags.FLAGS.unparse_flags()
    for name in set(flags.FLAGS) - own_flags:
        delattr(flags.FLAGS, name)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize(
    "module, arguments",
    [command[1:] for command in COMMANDS],
    ids=[f"{page}: {' '.join([module, *arguments])}" for page, module, arguments in COMMANDS],
)
def test_every_command_is_one(module, arguments, start, capsys):
    mains = start(module, arguments)
    if "--dry_run" in arguments:
        mains[0](sys.argv)
        assert "base.normalizer=entmax15" in capsys.readouterr().out


def test_the_score_of_ones_own_has_values_gradients_and_second_derivatives():
    scope = {}
    exec(blocks("README.md")[0], scope)
    mechanism = attention.Mechanism(score=scope["Manhattan"]())
    x = jax.random.normal(jax.random.key(0), (1, 4, 2, 3))
    params = mechanism.init(jax.random.key(0), num_heads=2, head_dim=3)

    def loss(params, x):
        return jnp.sum(attention.attend(mechanism, params, x, x, x) ** 2)

    _, aux = attention.attend(mechanism, params, x, x, x, aux=("weights",))
    rows = np.asarray(x[0, :, 1], np.float64)
    scores = -np.abs(rows[:, None] - rows[None]).sum(-1)
    expected = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(aux["weights"][0, 1], expected, rtol=1e-5)
    gradient = jax.grad(loss)(params, x)["score"]["gain"]
    assert gradient.shape == (2,) and np.all(np.asarray(gradient) != 0)
    _, second = jax.jvp(jax.grad(lambda p: loss(p, x)), (params,), (params | {"score": {
        "gain": jnp.ones(2)}},))  # fmt: skip
    step = 1e-2
    ahead, behind = (jax.grad(loss)({**params, "score": {"gain": jnp.full(2, s)}}, x)
                     for s in (step, -step))  # fmt: skip
    numeric = (ahead["score"]["gain"] - behind["score"]["gain"]) / (2 * step)
    np.testing.assert_allclose(second["score"]["gain"], numeric, rtol=2e-2, atol=1e-3)


@pytest.mark.slow
def test_the_score_of_ones_own_runs_tiled():
    scope = {}
    exec(blocks("README.md")[0], scope)
    mechanism = attention.Mechanism(score=scope["Manhattan"](), mask=attention.masks.Causal())
    x = jax.random.normal(jax.random.key(0), (20, 2, 3))
    params = mechanism.init(jax.random.key(0), num_heads=2, head_dim=3)
    tangent = {**params, "score": {"gain": jnp.ones(2)}}

    def derivatives(**options):
        def loss(params, x):
            return jnp.sum(attention.attend(mechanism, params, x, x, x, **options) ** 2)

        gradient = jax.grad(loss, argnums=(0, 1))
        return gradient(params, x), jax.jvp(lambda p: gradient(p, x), (params,), (tangent,))[1]

    tiled = derivatives(implementation="tiled", block_sizes=(8, 8))
    dense = derivatives(implementation="dense")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), tiled, dense)
    # One query and one key differ in as many numbers as they are wide; a long text is tiled.
    long = jax.ShapeDtypeStruct((2048, 2, 64), jnp.float32)
    assert "tiled: runs" in attention.explain(mechanism, long, long, long)


@pytest.mark.parametrize("page", ["README.md", "docs/parts.md"])
def test_every_part_is_listed(page):
    listed = {name.replace("_", "") for name in re.findall(r"`([a-z_0-9]+)`", DOCUMENTS[page])}
    for kind, module in (
        ("Score", attention.scores),
        ("Position", attention.positions),
        ("Mask", attention.masks),
        ("Normalizer", attention.normalizers),
    ):
        for name, part in vars(module).items():
            if not (isinstance(part, type) and issubclass(part, getattr(attention, kind))):
                continue
            if not (name.startswith("_") or name in NOT_BY_NAME or inspect.isabstract(part)):
                assert name.lower() in listed, name


NOT_BY_NAME = ("NoPE", "And", "Or", "Not", "Sum", "Position")
"""Written as none, &, |, ~, +; and the base class that is not abstract."""


def headings(text):
    """The anchors of a page."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line).strip().lower().replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", DOCUMENTS)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", DOCUMENTS[page]):
        target, _, anchor = link.partition("#")
        if "://" in link:
            continue
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.is_file(), f"{link}: no such file"
        if anchor:
            assert anchor in headings(path.read_text("utf-8")), f"{link}: no such heading"


@pytest.mark.parametrize("page", ["docs/benchmarks.md", "docs/kernels.md", "docs/translation.md"])
def test_what_the_guide_quotes_stands_in_the_results(page):
    text, results = DOCUMENTS[page], DOCUMENTS[page.replace("docs/", "results/")]
    _, _, quoted = text.rpartition(f"](../results/{page.removeprefix('docs/')})")
    table = re.search(r"^\|.*?(?=\n\n|\Z)", quoted, re.DOTALL | re.MULTILINE)[0]
    numbers = re.findall(r"\d+\.\d+", table)
    assert numbers and [x for x in numbers if x not in results] == []


def test_every_target_of_make_is_one():
    makefile = (ROOT / "Makefile").read_text()
    for page, text in DOCUMENTS.items():
        for target in re.findall(r"(?:^    |`)make ([a-z-]+)", text, re.MULTILINE):
            assert f"\n{target}:" in makefile, f"{page}: make {target}"


def test_the_map_of_the_readme_is_that_of_the_repository():
    _, _, text = DOCUMENTS["README.md"].partition("## Map of the repository")
    lines = re.findall(r"^    ( *.*/.*)", text.partition("\n## ")[0], re.MULTILINE)
    assert len(lines) > 10
    above = ROOT
    for line in lines:
        folders = re.findall(r"([a-z]+)/(?= |$)", line)
        if not line.startswith(" "):
            above = ROOT
        for folder in folders:
            assert (above / folder).is_dir(), line
        if not line.startswith(" "):
            above = ROOT / folders[0]


def test_the_readme_is_short_and_its_version_is_the_packages():
    assert len(DOCUMENTS["README.md"].encode()) <= 8000
    package = configparser.ConfigParser(interpolation=None)
    package.read(ROOT / "setup.cfg")
    version = package["metadata"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.slow
def test_the_run_directory_is_as_described(tmp_path, monkeypatch):
    """Every file of a sweep is in a table of the page, and its blocks read them."""
    (tmp_path / "mine.py").write_text(TINY)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = "-m experiments.ablate --config=mine.py --workdir=runs/mine --tensorboard"
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| (`.*?) \|", DOCUMENTS[RUN_DIRECTORY], re.MULTILINE)
    patterns = [re.sub("<.*?>", "*", name) for row in rows for name in re.findall("`(.*?)`", row)]
    for path in (tmp_path / "runs/mine").rglob("*"):
        name = path.relative_to(tmp_path / "runs/mine").as_posix()
        name = re.sub("^cells/[^/]+/", "", name)
        known = any(fnmatch.fnmatch(name, f"{pattern}*") for pattern in patterns)
        assert path.is_dir() or known, f"{name} is in no table"
    monkeypatch.chdir(tmp_path)
    scope = run(RUN_DIRECTORY)
    assert scope["losses"] and scope["logits"].shape == (1, 8, 256)


TINY = """
from experiments.config import settings

def get_config():
    config = settings.config("text", context=8, max_eval_examples=4)
    config.model.update(num_layers=1, model_dim=8, num_heads=1)
    config.train.update(steps=4, batch_size=2, seeds=2, log_every=2, eval_every=2)
    return config

def sweep_normalizer():
    yield {"model.normalizer": "sigmoid"}
"""


@pytest.mark.slow
def test_the_tutorial_runs(monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook = nbformat.read(ROOT / "docs/tutorial.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear its outputs"
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(ROOT)}}).execute()
    shown = "".join(str(cell.get("outputs")) for cell in notebook.cells)
    assert shown.count("image/png") == 5 and "base.position=alibi" in shown
