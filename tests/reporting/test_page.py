"""report.html in a real browser: it draws, complains of nothing, loads nothing, runs no text."""

import json
import math
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from pictures import only_named
from reporting_rows import (
    DIGITS,
    MODEL,
    by_class,
    clean,
    pgd,
    write_examples,
    write_run,
    write_whole,
)

from robust_accel.reporting import report
from robust_accel.reporting.charts import Chart
from robust_accel.reporting.figures import draw
from robust_accel.reporting.page import page
from robust_accel.reporting.report import write_report
from robust_accel.reporting.views import read_runs

EVIL = "<img src=x onerror=evil()></script><script>window.evil=1</script>"
TAGS = "<b>1</b> &lt;"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium is installed: nothing to render report.html in")
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of one run, of two, and of one with names that try to be code."""
    folder = tmp_path_factory.mktemp("pages")
    runs = [write_whole(folder / name).path for name in ("quickstart", "other")]
    names = [EVIL, TAGS, *(f"class {i}" for i in range(2, 10))]
    rows = [
        clean(source=DIGITS | {"path": EVIL}, warnings=[EVIL], **by_class(0.9, names=names)),
        pgd(source=DIGITS | {"path": EVIL}, **by_class(0.5, names=names)),
    ]
    evil = write_run(folder / "evil", rows, model=MODEL | {"class_names": names, "name": EVIL})
    write_examples(evil)
    paths = {"one": runs[:1], "two": runs, "evil": [evil.path]}
    found = {}
    for name, of in paths.items():
        found[name] = folder / f"{name}.html"
        found[name].write_text(page(read_runs(of)))
    return found


PLOTS = {"one": 11, "two": 27, "evil": 2}


def check_drawn(browser: Browser, pages: dict[str, Path], name: str, width: int) -> None:
    """A page is opened, and has all its plots without a complaint or a request."""
    url, plots = pages[name].as_uri(), PLOTS[name]
    browser.open(url, width, dark=width == 400)
    assert browser.complaints() == []
    assert browser.requests() == [url]
    drawn = "[...document.querySelectorAll('[data-plot]')].filter(box => {}).length"
    assert browser.value(drawn.format("box.matches('.js-plotly-plot')")) == plots
    assert browser.value(drawn.format("box.querySelector('.main-svg')")) == plots
    # nothing is wider than the window, and every plot fills its own place
    assert browser.value("document.documentElement.scrollWidth") == width
    fits = "Math.abs(box.querySelector('.main-svg').clientWidth - box.clientWidth) < 2"
    assert browser.value(drawn.format(fits)) == plots


@pytest.mark.parametrize(
    ("name", "width"),
    [
        pytest.param("one", 400, marks=pytest.mark.long),  # a page of two has its charts, too
        ("two", 400),
        ("two", 1400),
        ("evil", 400),
    ],
)  # the others at 1400: below
def test_the_page_draws_all_its_plots_without_a_complaint_or_a_request(
    browser: Browser, pages: dict[str, Path], name: str, width: int
) -> None:
    check_drawn(browser, pages, name, width)


def test_text_of_strangers_is_text(browser: Browser, pages: dict[str, Path]) -> None:
    check_drawn(browser, pages, "evil", 1400)
    assert browser.value("typeof window.evil") == "undefined"
    assert browser.value("document.querySelectorAll('img[src=x]').length") == 0
    assert EVIL in browser.value("document.body.textContent")
    ticks = "[...document.querySelectorAll('.ytick text')].map(text => text.textContent)"
    assert {f"{EVIL[:15]}…", TAGS} <= set(browser.value(ticks))  # plotly has tags of its own
    assert browser.value("document.querySelectorAll('script').length") == 3


def test_images_are_flipped_by_a_press_and_all_together(
    browser: Browser, pages: dict[str, Path]
) -> None:
    check_drawn(browser, pages, "one", 1400)
    shown = "[...document.querySelectorAll('.images img')].filter(i => i.checkVisibility())"
    kinds = f"{shown}.map(image => image.className).join(' ')"
    assert browser.value(kinds) == " ".join(["x_adv"] * 8)
    browser.value("document.querySelector('.images button').focus()")
    for event in ("keyDown", "keyUp"):  # what the keyboard does to a button
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        browser.call("Input.dispatchKeyEvent", type=event, **key)
    assert browser.value(kinds) == " ".join(["perturbation", *["x_adv"] * 7])
    browser.value("document.querySelector('[data-show=x]').click()")
    assert browser.value(kinds) == " ".join(["x"] * 8)


def test_measurements_are_sorted_by_a_column(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["one"].as_uri(), 1400)
    column = (
        "[...document.querySelectorAll('.sortable tbody tr')].map(r => +r.cells[4].textContent)"
    )
    press = "document.querySelectorAll('.sortable th button')[4].click()"
    browser.value(press)
    found = browser.value(column)
    assert found == sorted(found) and len(set(found)) > 2
    browser.value(press)
    assert browser.value(column) == sorted(found)[::-1]


def test_numbers_that_are_none_are_gaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines without them, with null, and with the NaN that was once written."""
    folder = write_whole(tmp_path / "run")
    at = {"step": 400, "epoch": 17.0}
    with folder.metrics.open("a") as file:
        for line in (at | {"loss": math.nan}, at | {"loss": None, "robust_batch_accuracy": None}):
            file.write(json.dumps(line) + "\n")
    text = page(read_runs([folder.path])).split('id="plots">')[1].split("</script>")[0]

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    plots = json.loads(text, parse_constant=refuse)
    (loss,) = [p for p in plots if p["data"][0].get("name") == "loss"]
    assert loss["data"][0]["y"][-3:] == [pytest.approx(2.3 * 0.97**64), None, None]

    def loss_alone(chart: Chart, path: Path) -> Path:
        return (draw if chart.name == "training_loss" else only_named)(chart, path)

    monkeypatch.setattr(report, "draw", loss_alone)
    write_report(folder)
    assert (folder.path / "figures" / "training_loss.png").stat().st_size > 0


class Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("name", ["one", "two", "evil"])
def test_all_that_is_shown_is_in_the_page_and_has_words(pages: dict[str, Path], name: str) -> None:
    elements = Elements(pages[name].read_text()).found
    links = [
        attrs.get(key) or "" for _, attrs in elements for key in ("src", "href") if key in attrs
    ]
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert not any(tag in ("link", "iframe", "object") for tag, _ in elements)
    assert all(attrs.get("alt") for tag, attrs in elements if tag == "img")
    assert all(attrs.get("aria-label") for _, attrs in elements if attrs.get("role") == "img")
    assert all(attrs.get("scope") for tag, attrs in elements if tag == "th")
    (policy,) = [a["content"] for t, a in elements if t == "meta" and "http-equiv" in a]
    assert policy is not None and policy.startswith("default-src 'none'")
