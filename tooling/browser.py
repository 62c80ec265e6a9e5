"""The Chromium that tests/web and the thumbnails drive."""

import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_chromium():
    """Path of the first Chromium on the PATH, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def open_chromium(driver, chromium):
    """A browser of Playwright's ``driver``; chromium: of find_chromium()."""
    # its sandbox refuses to start for root, who runs tests in many containers
    return driver.chromium.launch(executable_path=chromium, headless=True, args=["--no-sandbox"])
