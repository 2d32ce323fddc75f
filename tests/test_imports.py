"""What imports what: the layers of docs/architecture.md, and losses that bring only jax along."""

import ast
import graphlib
import os
import pathlib
import subprocess
import sys

import pytest

import align_jax

PACKAGE = pathlib.Path(align_jax.__file__).parent
# From the top: a folder imports only from those after it.
LAYERS = (
    "recipes",
    "exact",
    "algorithms",
    "evaluation",
    "training",
    "rewards",
    "generation",
    "data",
    "models",
    "distributed",
    "losses",
)
# The bottom: what every folder may use. Each of these uses only those after it.
BOTTOM = ("user_code", "settings", "files", "errors", "progress", "text", "trees")
# What nobody who only starts a run or uses a part should wait for.
HEAVY = {"transformers", "datasets", "tensorflow_datasets", "matplotlib", "orbax", "wandb", "gguf"}
HEAVY |= {"tensorboardX", "huggingface_hub", "tokenizers", "vaderSentiment", "safetensors"}
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def imports(path, *, at_module_level, for_types=False):
    """Names of imported modules; those under `if TYPE_CHECKING` only with `for_types`."""
    tree = ast.parse((PACKAGE / path).read_text())
    skipped = set()
    for node in ast.walk(tree):
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and at_module_level
        checking = isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        if lazy or (checking and not for_types):
            skipped.update(ast.walk(node))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_folder_has_its_layer():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders == set(LAYERS)


@pytest.mark.parametrize("path", FILES)
def test_a_folder_imports_only_from_those_below_it(path):
    layer = path.split("/")[0].removesuffix(".py")
    ours = [name.split(".") for name in imports(path, at_module_level=False)]
    used = {name[1] for name in ours if name[0] == "align_jax" and len(name) > 1}
    if layer in BOTTOM:
        assert used <= set(BOTTOM[BOTTOM.index(layer) + 1 :]), path
        return
    if layer not in LAYERS:
        return  # the top: main, config
    assert used <= {*LAYERS[LAYERS.index(layer) :], *BOTTOM}, path


def import_graph():
    """Each module with those of ours that it imports: in a function and for types, too."""
    names = {}
    for path in FILES:
        parts = ("align_jax", *pathlib.PurePath(path).with_suffix("").parts)
        names[path] = ".".join(parts).removesuffix(".__init__")
    modules = set(names.values())
    return {
        name: modules.intersection(imports(path, at_module_level=False, for_types=True)) - {name}
        for path, name in names.items()
    }


def test_imports_make_no_circle():
    graph = import_graph()
    # Imported in a function, as a package and from a package.
    assert "align_jax.errors" in graph["align_jax.main"]
    assert "align_jax.models.families" in graph["align_jax.models.loading"]
    assert "align_jax.models.families.base" in graph["align_jax.models.families"]
    graphlib.TopologicalSorter(graph).prepare()  # CycleError shows the circle


@pytest.mark.parametrize("path", FILES)
def test_heavy_packages_are_imported_where_they_are_needed(path):
    roots = {name.split(".")[0] for name in imports(path, at_module_level=True)}
    assert not roots & HEAVY, path


def test_the_checks_above_see_imports():
    assert "align_jax.errors" in imports("main.py", at_module_level=False)
    assert "align_jax.errors" not in imports("main.py", at_module_level=True)
    assert "orbax.checkpoint" in imports("training/checkpoint.py", at_module_level=False)
    typed = "models/export.py"
    assert "transformers" in imports(typed, at_module_level=True, for_types=True)
    assert "transformers" not in imports(typed, at_module_level=False)


def run(script):
    """Seconds of processor time (other work does not lengthen it), and the words it printed."""
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    after = os.times()
    used = after.children_user + after.children_system
    return used - before.children_user - before.children_system, set(done.stdout.split())


def test_losses_bring_jax_alone_and_take_no_longer_than_jax():
    show = "\nimport sys; print(*sys.modules)"
    bare = [run("import jax, jax.numpy" + show) for _ in range(3)]
    ours = [run("from align_jax import losses" + show) for _ in range(3)]
    modules = ours[0][1]
    assert "align_jax.losses" in modules
    for package in ("flax", "optax", "transformers", "orbax", "ml_collections", "absl"):
        assert package not in modules
    assert min(ours)[0] < min(bare)[0] + 0.3


def test_the_package_has_its_public_names_without_jax():
    script = "import sys, align_jax\n"
    script += "assert set(align_jax.__all__) <= set(dir(align_jax)), dir(align_jax)\n"
    script += "assert not hasattr(align_jax, 'load_modle')\n"
    _, modules = run(script + "print(*sys.modules)")
    assert "align_jax" in modules and "jax" not in modules


def test_the_public_names_of_the_package_are_those_of_interchange_and_runs():
    from align_jax import runs
    from align_jax.models import interchange

    assert align_jax.__all__ == ["load_model", "load_tokenizer", "open_run", "save_model"]
    for name in align_jax.__all__:
        assert getattr(align_jax, name) is getattr(
            runs if name == "open_run" else interchange, name
        )
    with pytest.raises(AttributeError, match="'align_jax' has no attribute 'load_modle'"):
        _ = align_jax.load_modle
    star = {}
    exec("from align_jax import *", star)
    assert star["load_model"] is interchange.load_model


def test_the_command_line_shows_its_help_without_jax():
    _, modules = run("import sys\nimport align_jax.main\nprint(*sys.modules)")
    assert "jax" not in modules


def test_the_version_is_read_without_any_other_package():
    script = (
        "import sys, align_jax\nprint(align_jax.__version__)\n"
        "assert not {'jax', 'numpy', 'flax'} & set(sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == align_jax.__version__
    setup = (PACKAGE.parent / "setup.cfg").read_text()
    assert "version = attr: align_jax.__version__" in setup
    assert "align_jax = py.typed" in setup and (PACKAGE / "py.typed").exists()
