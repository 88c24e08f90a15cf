"""The documentation: it builds without a warning, and what can be read off the code is in it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import robust_accel
from robust_accel.reference import all_keys

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")  # an extra, without which the oldest versions are tried
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.long
def test_every_key_and_public_name_has_its_place(site: Path) -> None:
    keys = (site / "reference/keys.html").read_text()
    for key in all_keys():
        assert f"<code>{key.dotted.split('.', 1)[-1]}</code>" in keys, key.dotted
    names = (site / "reference/python.html").read_text()
    for name in robust_accel.__all__:
        assert re.search(rf'id="robust_accel\.[\w.]*\.{name}"', names), name
    commands = (site / "reference/commands.html").read_text()
    for command in ("train", "recipe copy", "explain", "study"):
        assert f"usage: robust-accel {command} " in commands


@pytest.mark.long
def test_the_site_fetches_nothing(site: Path) -> None:
    for page in site.rglob("*.html"):
        fetched = re.findall(r'<(?:script|img|iframe)[^>]*src="(https?:[^"]*)"', page.read_text())
        fetched += re.findall(
            r'<link[^>]*rel="stylesheet"[^>]*href="(https?:[^"]*)"', page.read_text()
        )
        assert fetched == [], page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    generated = {"keys", "commands", "recipes", "python"}
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        path = page.parent / target
        made = path.parent.name == "reference" and path.stem in generated
        made |= path.resolve() == ROOT / "docs/paper/index.md"
        assert target.startswith("http") or path.exists() or made, target


def test_the_readme_is_one_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert "<<<<" not in text and "make quickstart" in text and "make test" in text


def test_what_lazy_imports_name_is_there() -> None:
    for name in robust_accel.__all__:
        assert getattr(robust_accel, name).__module__.startswith("robust_accel."), name
    assert {*robust_accel.__all__} <= {*dir(robust_accel)}
    with pytest.raises(AttributeError, match="no attribute 'PDG'"):
        _ = robust_accel.PDG
