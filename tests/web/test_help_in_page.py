"""The help that the page's info button opens, in the language of the browser."""

import pytest
from canvas import Canvas

from tooling.paths import ROOT

pytestmark = pytest.mark.web
DOCS = ROOT / "web" / "docs"
NODES = sorted(path.stem for path in DOCS.glob("*.md"))


@pytest.fixture(scope="module", params=["zh-CN", "fr-FR"])
def foreign(request, server, browser, pictures):
    """(page, language)"""
    context = browser.new_context(viewport={"width": 1400, "height": 900}, locale=request.param)
    yield Canvas(context.new_page(), server.url, pictures), request.param.split("-")[0]
    context.close()


def written(node, language):
    translated = DOCS / node / f"{language}.md"
    return (translated if translated.exists() else DOCS / f"{node}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("node", NODES)
def test_help_comes_in_the_browsers_language_and_else_in_english(foreign, node):
    canvas, language = foreign
    canvas.load_prompt({"1": {"class_type": node, "inputs": {}}})
    canvas.js(f"app.canvas.selectNode({canvas.node(node)})")
    canvas.page.get_by_test_id("info-button").click()
    shown = canvas.page.locator(".node-help-content")
    headings = [line.lstrip("# ") for line in written(node, language).splitlines() if line.startswith("#")]
    shown.get_by_role("heading", name=headings[0], exact=True).wait_for()
    canvas.picture(f"help_{node}_{language}")
    assert shown.locator("h1, h2").all_inner_texts() == headings
    assert "**" not in shown.inner_text() and "|---|" not in shown.inner_text()
    assert canvas.errors == []


def test_the_schedule_map_speaks_the_browsers_language(foreign):
    canvas, language = foreign
    canvas.load_prompt({"1": {"class_type": "SLA2ApplyAttention", "inputs": {"preset": "custom"}}})
    words = {"zh": "时间表图"}.get(language, "Schedule as a map")
    canvas.page.locator("summary", has_text=words).wait_for()
    assert canvas.errors == []
