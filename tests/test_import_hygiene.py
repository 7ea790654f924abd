"""What may be imported when: nothing heavy by the command line, and nothing against the order of DESIGN.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import mmhub
from tests.fake_plugins import ROOT, Site

HEAVY = {
    "torch",
    "torchvision",
    "torchaudio",
    "transformers",
    "timm",
    "datasets",
    "huggingface_hub",
    "numpy",
    "pyarrow",
}
SLOW_START = {"msgspec", "pluggy", "importlib.metadata", "tomllib", "dataclasses", "pathlib", "packaging", "difflib"}
PROBE = """
import sys
sys.argv = ["mmhub", *{args}]
from mmhub.cli.main import main
try:
    main()
except SystemExit as leave:
    assert not leave.code, leave.code
print(*sys.modules, file=sys.stderr)
"""

# From the bottom up; modules of one line know nothing of each other. `mmhub` itself (the version) is below them all.
LAYERS = """
errors lazy
files stdout reading
spec hookspecs
records
manifests
distributions
discovery
hashes feature_cache
plugins
registry requirements
names
install
config
device batch
interfaces
layers conversation
fusion embedding
guard
model
weights
adapters
quantize
checkpoint
lineage
hub
data metrics
optim
build
generate
speech
zero_shot
evaluation
perplexity
bulk
index verification report overlap
engine explain
testing demo
cli
__main__
"""
# Imports inside a function that may point upward, and why.
LATE = {
    ("config", "interfaces"): "the names of tasks are checked where a recipe is read",
    ("model", "checkpoint"): "Model.save is where people look for it",
    ("model", "generate"): "Model.generate and Model.chat are where people look for them",
    ("model", "speech"): "recordings are longer than what a model hears at once",
    ("model", "perplexity"): "Model.score is where people look for it",
    ("model", "explain"): "Model.explain is where people look for it",
    ("evaluation", "perplexity"): "what is measured of a language model is perplexity",
    ("checkpoint", "hub"): "the base of an adapter may have to be fetched",
}
RANK = {name: rank for rank, line in enumerate(LAYERS.split("\n")) for name in line.split()}
RING_0 = (
    "errors", "stdout", "spec", "hookspecs", "records", "manifests", "distributions", "discovery", "plugins",
    "requirements", "registry", "names", "install", "config", "cli", "__init__",
)  # fmt: skip


def modules_after(site: Site, *args: str) -> set[str]:
    done = site.python("-c", PROBE.format(args=list(args)))
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "args", [["--help"], ["--version"], ["plugins", "ls"], ["models", "ls"], ["models", "which", "a/b"], ["env"]]
)
def test_commands_that_only_list_import_no_heavy_library(tmp_path: Path, args: list[str]) -> None:
    site = Site(tmp_path)
    site.install("mmhub-fake", parts="import torch", init="import torch")
    assert not HEAVY & modules_after(site, *args)


def test_a_part_that_nobody_has_is_reported_before_torch_loads(tmp_path: Path) -> None:
    site = Site(tmp_path)
    recipe = '[model.encoders.text]\nuse = "lstn"\n[data]\ntrain = "train.csv"\ntarget = "label"\n'
    (site.work / "recipe.toml").write_text(f'task = "classification"\n{recipe}')
    code = PROBE.format(args=["train", "recipe.toml"]).replace("assert not leave.code", "assert leave.code == 3")
    done = site.python("-c", code)
    assert done.returncode == 0, done.stderr
    first, modules = done.stderr.split("\n", 1)
    assert first.startswith("error: there is no text_encoder 'lstn'")
    assert not {"torch", "pyarrow"} & set(modules.split())


def test_help_from_the_cache_imports_little_more_than_click(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.install("mmhub-fake", 'api = 1\n[[commands]]\nname = "sniff"\nfactory = "{package}.parts:sniff"\n')
    assert modules_after(site, "--help") & SLOW_START  # the first one scans
    by_click = set(site.python("-c", "import sys, click; print(*sys.modules)").stdout.split())
    assert not (modules_after(site, "--help") & SLOW_START) - by_click


def test_importing_mmhub_imports_nothing_and_scans_nothing(tmp_path: Path) -> None:
    site = Site(tmp_path)
    bare = set(site.python("-c", "import sys; print(*sys.modules)").stdout.split())
    after = set(site.python("-c", "import sys, mmhub; print(*sys.modules)").stdout.split())
    assert after - bare <= {"mmhub", "__future__", "typing"} | by_typing(site)
    assert not site.cache.exists()


def by_typing(site: Site) -> set[str]:
    return set(site.python("-c", "import sys, typing; print(*sys.modules)").stdout.split())


def test_the_public_names_are_these_and_no_module_takes_one_of_them() -> None:
    assert set(mmhub.__all__) == {
        "Model", "__version__", "compose", "evaluate", "load", "pull", "push", "train",
    }  # fmt: skip
    modules = {path.stem for path in (ROOT / "mmhub").iterdir()}
    assert not modules & set(mmhub.__all__)
    assert set(mmhub.__all__) <= set(dir(mmhub))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = mmhub.trian


def sources() -> list[Path]:
    return [path for path in (ROOT / "mmhub").rglob("*.py") if "demo" not in path.parts[:-1]]


def layer_of(path: Path) -> str:
    """The layer a file belongs to: the module or package directly under mmhub/."""
    return path.relative_to(ROOT / "mmhub").parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[int, str, bool]]:
    """(line, module, inside a function?) of every import; those for type checkers alone are left out."""
    pending: list[tuple[ast.AST, bool]] = [(ast.parse(path.read_text(encoding="utf-8")), False)]
    while pending:
        node, late = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += [(child, late) for child in node.orelse]
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            targets = [f"mmhub.{alias.name}" for alias in node.names] if node.module == "mmhub" else [str(node.module)]
            yield from ((node.lineno, target, late) for target in targets)
        late = late or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        pending += [(child, late) for child in ast.iter_child_nodes(node)]


def test_every_module_has_its_place_in_the_order() -> None:
    unplaced = {layer_of(path) for path in sources()} - set(RANK) - {"__init__"}
    assert not unplaced, f"put them into LAYERS, and docs: {sorted(unplaced)}"


def test_imports_point_downward() -> None:
    wrong, used = [], set()
    for path in sources():
        layer = layer_of(path)
        for line, module, late in imports(path) if layer in RANK else ():
            target = module.removeprefix("mmhub.").split(".")[0]
            if not module.startswith("mmhub.") or target not in RANK or target == layer:
                continue
            if late and (layer, target) in LATE:
                used.add((layer, target))
            elif RANK[target] >= RANK[layer]:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {layer} imports {target}")
    assert not wrong, "\n".join(wrong)
    assert used == set(LATE), "an exception is no longer needed"


def test_ring_0_imports_no_heavy_library_at_module_level() -> None:
    for path in sources():
        if layer_of(path) in RING_0:
            named = {module.split(".")[0] for _, module, late in imports(path) if not late}
            assert not named & HEAVY, path
