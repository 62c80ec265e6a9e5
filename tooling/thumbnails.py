"""Draws the pictures of the bundled workflows that the template browser shows: python -m tooling.thumbnails [NAME ...]

Run it after a workflow was added or the results that a card shows were measured again. Needs Playwright and Chromium.
"""

import argparse

from .browser import find_chromium, open_chromium
from .environment import say
from .paths import ROOT
from .recipes.cards import CARDS, SIZE, card

WORKFLOWS = ROOT / "workflows"
MAX_BYTES = 100_000  # bytes: 14 of them are a small part of every clone


def draw(browser, name, path):
    """Writes the JPEG of one workflow's card."""
    page = browser.new_page(viewport=SIZE)
    page.set_content(card(name))
    for quality in (90, 80, 70, 60, 50):
        page.screenshot(path=path, type="jpeg", quality=quality)
        if path.stat().st_size <= MAX_BYTES:
            break
    page.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=sorted(CARDS), metavar="NAME", help="workflows (all)")
    names = parser.parse_args().names
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = open_chromium(driver, find_chromium())
        for name in names:
            draw(browser, name, WORKFLOWS / f"{name}.jpg")
            say(f"workflows/{name}.jpg")
        browser.close()


if __name__ == "__main__":
    main()
