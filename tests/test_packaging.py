"""The wheel holds what runs without the repository."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_wheel_brings_package_recipes_and_types(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    recipes = {str(p.relative_to(ROOT)) for p in (ROOT / "recipes").rglob("*.yaml")}
    code = {str(p.relative_to(ROOT)) for p in (ROOT / "robust_accel").rglob("*.py")}
    assert len(recipes) > 30
    assert {f"robust_accel/{path}" for path in recipes} <= held
    assert (
        code
        | {
            "robust_accel/py.typed",
            "robust_accel/recipes/schema.json",
            "robust_accel/reporting/page.html.j2",
        }
        <= held
    )
    outside = {path for path in held if not path.startswith("robust_accel")}
    assert not outside
