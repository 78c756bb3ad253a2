"""A model's page for everybody: accessibility, narrow and wide windows, light and dark.

python -m pytest -m browser tests/browser/test_page_access.py
FOLIO_SCREENSHOTS=/tmp/shots python -m pytest -m browser tests/browser/test_page_access.py
"""

import pytest
from helpers import LINES
from model_page import VIEWS, open_view

pytestmark = pytest.mark.browser
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

SCHEMES = ("light", "dark")
WIDTHS = (390, 768, 1280, 1600)
CHECKED = (390, 1280)  # by axe


@pytest.fixture
def open_views(trained_page, open_page):
    """Open the page in a window, and yield it with the name of each view, all details open."""

    def open_them(**options):
        page = open_page(f"{trained_page.as_uri()}#count=30&from=60&text={LINES[:70]}", **options)
        for name in VIEWS:
            open_view(page, name)
            page.evaluate("document.querySelectorAll('details').forEach((e) => (e.open = true))")
            yield page, name

    return open_them


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_view_scrolls_sideways_and_axe_finds_no_fault(open_views, picture, scheme, width):
    wide, faults = [], []
    for page, name in open_views(width=width, color_scheme=scheme):
        picture(page, f"page_{name}_{width}_{scheme}")
        size = page.evaluate("document.documentElement.scrollWidth")
        wide += [f"{name}: {size}"] if size > width else []
        if width not in CHECKED:
            continue
        for violation in axe.Axe().run(page).response["violations"]:
            for node in violation["nodes"]:
                faults.append((name, violation["id"], node["html"][:160], node["failureSummary"]))
    assert wide == []
    assert faults == []


def test_light_and_dark_are_two_looks(trained_page, open_page):
    pages = [open_page(trained_page.as_uri(), color_scheme=scheme) for scheme in SCHEMES]
    colors = {page.evaluate("getComputedStyle(document.body).backgroundColor") for page in pages}
    assert len(colors) == 2


@pytest.mark.parametrize(("motion", "has_any"), [("reduce", False), ("no-preference", True)])
def test_nothing_moves_if_the_reader_wants_no_motion(open_views, motion, has_any):
    moving = []
    for page, name in open_views(reduced_motion=motion):
        moving += page.evaluate(
            """(name) => [...document.querySelectorAll("*")].filter((each) => {
                const { transitionDuration: t, animationName: a, scrollBehavior: s } =
                    getComputedStyle(each);
                return t !== "0s" || a !== "none" || s === "smooth";
            }).map((each) => `${name}: ${each.tagName}`)""",
            name,
        )
    assert bool(moving) == has_any
