"""Every code block of the documentation is true."""

from pathlib import Path

import pytest

pytest.importorskip("sybil")  # an extra

from blocks import ROOT, run_page

LONG = ("plan.md",)  # measures this machine
PAGES = [
    pytest.param(
        page,
        id=str(page.relative_to(ROOT)),
        marks=[pytest.mark.long] if page.name in LONG else [],
    )
    for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))
]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_true(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page, monkeypatch)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ("python\nassert 1 == 2", "page.md:3"),
        ("diff\n-kept = 1\n+gone = kept", "name 'kept' is not defined"),
        ("yaml\ndata: {augmented: crop_flip}", "unknown key"),
        ("yaml\nbase: quickstart\ntrain: {epochs: 0}", "train.epochs"),
        ("sh\nrobust-accel train quickstart train.epoch=3", "train.epoch"),
        ("sh\nrobust-accel evaluate runs/quickstart --verbose evaluate.eps=1", "--verbose"),
        ("sh\naccelerate launch --processes 2 -m robust_accel train quickstart", "--processes"),
        ("sh\ntorchrun --nproc-per-node 2 -m robust_accel train quickstat", "quickstat"),
        ("sh" + 2 * "\nrobust-accel train quickstart", "another training's"),
        ("sh\nmake quickstart\nrobust-accel train quickstart", "another training's"),
        (
            "sh\naccelerate launch --num_processes 3 -m robust_accel train quickstart",
            "64 images for 3",
        ),
        ("sh\nX=1 wrap-accel train quickstart", "wrap-accel"),
        ("sh\nmake quickstop", "quickstop"),
        ("sh\npython examples/none.py", "none.py"),
        ("sh\npip install -e '.[gpu]'", "gpu"),
        ("toml\nx = 1", "a block of no known kind"),
    ],
)
def test_a_wrong_block_is_found(
    block: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(f"# A page\n\n```{block}\n```\n")
    with pytest.raises((AssertionError, SystemExit)) as found:
        run_page(page, monkeypatch)
    assert said in str(found.value) + capsys.readouterr().err


def test_a_marked_block_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    marked = '<!-- skip: next "needs a hub" -->\n```python\nraise OSError\n```\n'
    page.write_text(f"{marked}\n```python\nfound = True\n```\n")
    run_page(page, monkeypatch)
    page.write_text(f"{marked}\n```python\nraise OSError('not marked')\n```\n")
    with pytest.raises(AssertionError, match="not marked"):
        run_page(page, monkeypatch)
