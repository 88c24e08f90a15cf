"""The layering rule: imports go down only, and processes are known in few places."""

import ast
import functools
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "robust_accel"
# From the ground up: a file imports its own floor's room and what lies below, nothing above.
FLOORS = (
    {"files", "messages", "locks", "exit_codes", "hub"},
    {"plain_yaml", "console"},
    {
        "settings",
        "statistics",
        "provenance",
        "run_folder",
        "pixels",
        "attack_context",
    },
    {"attacks", "objectives", "comm", "optim"},
    {"data", "min_max", "processes"},
    {"models"},
    {"robust_model"},
    {"evaluation"},
    {"components", "recipe_file"},
    {"recipe_checks"},
    {"recipe_builder"},
    {"integrations", "recipe"},
    {"trained_model", "reporting", "reference"},
    {"training"},
    {"studies", "planning"},
    {"commands"},
    {"api"},
    {"__init__", "__main__", "trainer"},  # the doors
)
LEAVES = sorted(FLOORS[3])


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Everything that a file imports, at any depth of nesting, as absolute dotted names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # level 1 is the file's own package, each further level one above
            here = path.relative_to(PACKAGE.parent).parent.parts
            parts = list(here[: len(here) + 1 - node.level]) if node.level else []
            base = ".".join(parts + ([node.module] if node.module else []))
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return frozenset(names)


def uses_distributed(path: Path) -> bool:
    named = {
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    return any(
        name == "torch.distributed" or name.startswith("torch.distributed.")
        for name in imports(path) | named
    )


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


FILES = {path.relative_to(PACKAGE): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = {module_name(path): path for path in FILES.values()}


def test_the_walk_sees_the_package():
    assert {p.parts[0] for p in FILES} >= {*LEAVES, "robust_model.py"}
    found = imports(PACKAGE / "robust_model.py")
    assert {"torch", "robust_accel.attacks", "robust_accel.attacks.Attack"} <= found
    assert any(uses_distributed(path) for p, path in FILES.items() if "comm" in p.parts)


def room(name: str) -> str:
    """The file or folder of the package that a dotted name lies in."""
    parts = name.split(".")
    known = {name for floor in FLOORS for name in floor}
    return parts[1] if len(parts) > 1 and parts[1] in known else "__init__"


def floor(name: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room(name) in rooms)


def test_every_room_has_a_floor():
    rooms = {p.parts[0].removesuffix(".py") for p in FILES}
    assert rooms == {name for floor in FLOORS for name in floor}


def test_imports_go_down_only():
    up = {
        f"{own} imports {name}"
        for own, path in MODULES.items()
        for name in imports(path)
        if within(name, "robust_accel") and room(name) != room(own)
        if floor(name) >= floor(own)
    }
    assert not up


@pytest.mark.parametrize("family", LEAVES)
def test_a_family_imports_its_siblings_and_the_shared_settings(family):
    shared = ("settings", "messages", "exit_codes")
    allowed = (f"robust_accel.{family}", *(f"robust_accel.{name}" for name in shared))
    for path in (PACKAGE / family).rglob("*.py"):
        for name in imports(path):
            if within(name, "robust_accel"):
                assert any(within(name, a) for a in allowed), f"{path.name} imports {name}"


def test_torch_distributed_is_known_to_comm_and_where_evaluation_gathers_or_fsdp_is_met():
    known = (
        "comm",
        "evaluation",
        "integrations",
        "robust_model.py",
        "attack_context.py",
        "objectives",
        "optim",
    )
    others = {
        str(file): path
        for file, path in FILES.items()
        if file.parts[0] not in known and not file.match("training/shard*.py")
    }
    assert not {file for file, path in others.items() if uses_distributed(path)}


def test_deepspeed_is_imported_in_one_file_and_late():
    importing = {
        str(file): path
        for file, path in FILES.items()
        if any("deepspeed" in name.split(".")[0] for name in imports(path))
    }
    assert importing.keys() == {"comm/deepspeed.py"}
    at_top = ast.parse(importing["comm/deepspeed.py"].read_text()).body
    assert not any(
        "deepspeed" in ast.unparse(node).split()[1].split(".")[0]
        for node in at_top
        if isinstance(node, ast.Import | ast.ImportFrom)
    )


def test_robust_model_knows_no_particular_attack():
    names = imports(PACKAGE / "robust_model.py")
    allowed = {
        "attacks": {"Attack"},
        "objectives": {"AWP", "Adversarial", "Classifier", "Objective"},
    }
    for family, known in allowed.items():
        prefix = f"robust_accel.{family}."
        assert {n.removeprefix(prefix) for n in names if n.startswith(prefix)} <= known


def test_no_import_goes_round():
    below = {
        name: {n for n in imports(path) if n in MODULES and n != name}
        for name, path in MODULES.items()
    }
    # a package's own __init__ gathers its files, and they import one another directly
    below = {
        name: {n for n in names if not name.startswith(n + ".")} for name, names in below.items()
    }
    while leaves := [name for name, names in below.items() if not names]:
        for leaf in leaves:
            del below[leaf]
        for names in below.values():
            names.difference_update(leaves)
    assert not below, f"imports that go round: {sorted(below)}"


def test_no_file_is_too_long_to_be_read_in_one_sitting():
    root = PACKAGE.parent
    folders = ("robust_accel", "tests", "benchmarks", "examples", "recipes")
    texts = [
        p for f in folders for kind in ("py", "md", "yaml") for p in (root / f).rglob(f"*.{kind}")
    ]
    lengths = {str(p.relative_to(root)): len(p.read_text().splitlines()) for p in texts}
    assert len(lengths) > 100
    assert not {name: length for name, length in lengths.items() if length > 400}
