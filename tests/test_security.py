"""What SECURITY.md promises of the package's own code: nothing that it reads is executed."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from datasets.exceptions import DatasetsError

from robust_accel.data import DataSettings, load_test

PACKAGE = Path(__file__).parent.parent / "robust_accel"
FORBIDDEN = {
    "builtins.eval", "builtins.exec", "builtins.__import__",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.safe_load",
    "pickle.load", "pickle.loads", "dill.load", "dill.loads", "cloudpickle.load", "joblib.load",
    "cloudpickle.loads", "marshal.load", "marshal.loads", "shelve.open", "pandas.read_pickle",
    "os.system", "os.popen", "subprocess.getoutput", "torch.hub.load", "torch.jit.load",
}  # fmt: skip
NEVER_TRUE = ("allow_pickle", "shell", "trust_remote_code")
ONE_PLACE = {  # and who may
    "importlib.import_module": {"__init__.py", "__main__.py", "components.py"},
    "runpy.run_path": {"commands/wrap.py"},
    "pickle.Unpickler": {"data/array_pickle.py", "training/shard_files.py"},
}


def imported(tree: ast.Module) -> dict[str, str]:
    """What the names of a module stand for."""
    found = {name.partition(".")[2]: name for name in FORBIDDEN if name.startswith("builtins.")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                found[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return found


def unsafe(text: str, file: str = "any.py") -> Iterator[str]:
    """Where a module could execute what a file holds."""
    tree = ast.parse(text)
    names = imported(tree)

    def meant(node: ast.expr) -> str:
        first, dot, rest = ast.unparse(node).partition(".")
        return names.get(first, first) + dot + rest

    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            name = meant(node)
            if name in FORBIDDEN or file not in ONE_PLACE.get(name, {file}):
                yield f"{name} in line {node.lineno}"
        if isinstance(node, ast.Call):
            said = {k.arg: ast.unparse(k.value) for k in node.keywords}
            bare = meant(node.func) == "torch.load" and said.get("weights_only") != "True"
            if bare or any(said.get(key, "False") != "False" for key in NEVER_TRUE):
                yield f"{ast.unparse(node)} in line {node.lineno}"


@pytest.mark.parametrize(
    "text",
    [
        "import yaml\nyaml.load(f, Loader=yaml.SafeLoader)",
        "import yaml as y\ny.unsafe_load(f)",
        "from yaml import safe_load\nsafe_load(f)",
        "import pickle\npickle.loads(b)",
        "from pickle import load as read\nread(f)",
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "from torch import load\nload(f)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import pandas as pd\npd.read_pickle(f)",
        "eval(text)",
        "list(map(eval, texts))",
        "exec(text)",
        "__import__(name)",
        "import importlib\nimportlib.import_module(name)",
        "from importlib import import_module\nimport_module(name)",
        "import os\nos.system(text)",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "import datasets\ndatasets.load_dataset(path, trust_remote_code=True)",
    ],
)
def test_unsafe_calls_are_seen(text: str) -> None:
    assert list(unsafe(text))


def test_the_package_makes_none() -> None:
    texts = {p.relative_to(PACKAGE).as_posix(): p.read_text() for p in PACKAGE.rglob("*.py")}
    assert len(texts) > 100
    found = {file: list(unsafe(text, file)) for file, text in texts.items()}
    assert not {file: calls for file, calls in found.items() if calls}


def test_a_data_sets_loading_script_is_not_run(tmp_path: Path) -> None:
    for folder in (tmp_path / "images", tmp_path / "images" / "train"):
        folder.mkdir()
        (folder / "images.py").write_text(f"open({str(tmp_path / 'victim')!r}, 'w')\nraise OSError")
    for path in (tmp_path / "images", tmp_path / "images" / "images.py"):
        with pytest.raises((ValueError, OSError, RuntimeError, DatasetsError)):
            load_test(DataSettings(path=str(path)))
    assert not (tmp_path / "victim").exists()
