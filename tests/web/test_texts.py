"""Help, tooltips, search words and translations of every node, as the real server hands them to the page."""

import ast
import itertools
import json
import re
import urllib.request

import pytest

from tooling.locales import english
from tooling.paths import PACK_FOLDER, ROOT

NODES = sorted(path.stem for path in (ROOT / "web" / "docs").glob("*.md"))
LANGUAGES = sorted(path.name for path in (ROOT / "locales").iterdir())
TRANSLATED = [language for language in LANGUAGES if language != "en"]


@pytest.fixture(scope="module")
def nodes(server):
    return {name: info for name, info in server.get("/object_info").items() if name in english({name: info})}


def named_inputs(info):
    return {name: spec for part in ("required", "optional") for name, spec in info["input"].get(part, {}).items()}


def test_every_node_has_help_and_every_help_has_a_node(nodes):
    assert sorted(nodes) == NODES


def served_help(server, page):
    with urllib.request.urlopen(f"{server.url}/extensions/{PACK_FOLDER}/docs/{page}.md", timeout=60) as answer:
        return answer.read().decode()


@pytest.mark.parametrize("node", NODES)
def test_help_is_served_and_names_every_input(server, nodes, node):
    text = served_help(server, node)
    assert text.startswith(f"# {nodes[node]['display_name']}\n")
    assert "## When it looks wrong" in text
    assert [name for name in named_inputs(nodes[node]) if name not in text] == []


def shape(page):
    """Headings, paragraphs, table rows and list entries of a page, in order; a heading with its level."""
    kinds = {"|": "row", "-": "entry"}
    lines = (line for block in page.split("\n\n") for line in starts(block))
    return [line.split()[0] if line[0] == "#" else kinds.get(line[0], "paragraph") for line in lines]


def starts(block):
    """Lines of a block that begin something: all but the lines that go on."""
    lines = [line for line in block.strip().splitlines() if not line.startswith(" ")]
    return lines if lines[0][0] in "#|-" else lines[:1]


def code(page):
    return {" ".join(words.split()) for words in re.findall(r"`([^`]+)`", page)}


def numbers(page):
    return set(re.findall(r"\d+(?:[.,]\d+)*", page))


def mentioned(page, names):
    """Nodes whose name, with any line breaks in it, stands on a page."""
    flat = " ".join(page.split())
    return {node for node, name in names.items() if name in flat}


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("language", TRANSLATED)
def test_translated_help_is_served_and_says_the_same(server, nodes, language, node):
    page, original = served_help(server, f"{node}/{language}"), served_help(server, node)
    texts = server.get("/i18n")[language]["nodeDefs"]
    titles = {name: texts[name]["display_name"] for name in NODES}
    assert page.startswith(f"# {titles[node]}\n")
    shown = {name: texts[node]["inputs"][name]["name"] for name in named_inputs(nodes[node])}
    called = [f"{word}（{name}）" if word != name else name for name, word in shown.items()]
    assert [words for words in called if words not in page] == []
    assert shape(page) == shape(original)
    assert numbers(page) == numbers(original)
    assert code(page) >= code(original), "text of the page, of files and of settings stays as it is"
    english_titles = {name: nodes[name]["display_name"] for name in NODES}
    assert mentioned(page, titles) == mentioned(original, english_titles)


@pytest.mark.parametrize("node", NODES)
def test_an_english_page_gets_the_same_help_as_every_other(server, node):
    assert served_help(server, f"{node}/en") == served_help(server, node), "run python -m tooling.locales"


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_translation_is_left_of_a_page_that_is_gone(language):
    translated = {path.parent.name for path in (ROOT / "web" / "docs").glob(f"*/{language}.md")}
    assert translated == set(NODES)


@pytest.mark.parametrize("node", NODES)
def test_every_input_has_a_tooltip_and_the_node_can_be_searched(nodes, node):
    info = nodes[node]
    assert [name for name, spec in named_inputs(info).items() if not spec[1].get("tooltip")] == []
    assert all(info["output_tooltips"] or [])
    if "search_aliases" in info:
        assert len(info["search_aliases"]) >= 2


def test_english_texts_are_the_nodes_own(nodes):
    written = json.loads((ROOT / "locales/en/nodeDefs.json").read_text(encoding="utf-8"))
    assert written == english(nodes), "run python -m tooling.locales"


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_names_every_node_input_and_output(server, nodes, language):
    served = server.get("/i18n")[language]["nodeDefs"]

    def keys(texts):
        return {
            (name, kind, key)
            for name, entry in texts.items()
            for kind in ("inputs", "outputs")
            for key in entry.get(kind, {})
        }

    own = {name: entry for name, entry in served.items() if name in nodes}
    assert keys(own) == keys(english(nodes)), f"complete locales/{language}/nodeDefs.json"
    for name, entry in own.items():
        assert entry["display_name"] and entry["description"], name
        texts = [text for kind in ("inputs", "outputs") for text in entry.get(kind, {}).values()]
        assert all(text["name"].strip() and text["tooltip"].strip() for text in texts), name


def shown_by_the_page():
    """Texts of t`...` in web/js, with {0}, {1} ... for their values."""
    for file in sorted((ROOT / "web/js").glob("*.js")):
        for text in re.findall(r"(?<![\w$])t`((?:\$\{[^{}]*\}|[^`$])*)`", file.read_text(encoding="utf-8")):
            pieces = re.split(r"\$\{[^{}]*\}", text)
            yield pieces[0] + "".join(f"{{{number}}}{piece}" for number, piece in enumerate(pieces[1:]))


@pytest.mark.parametrize("language", TRANSLATED)
def test_every_text_of_the_page_is_translated_with_all_its_values(language):
    table = json.loads((ROOT / "locales" / language / "main.json").read_text(encoding="utf-8"))["sla2"]
    example = "{0} of {1} layers"  # in the comment of texts.js
    texts = set(shown_by_the_page()) - {example}
    assert len(texts) > 50 and texts == set(table)
    assert [text for text in texts if set(re.findall(r"{\d}", text)) != set(re.findall(r"{\d}", table[text]))] == []


def said_by_the_server():
    """Strings of our Python, f-strings with {0}, {1} ... for their values."""
    for file in sorted([*(ROOT / "nodes").rglob("*.py"), *(ROOT / "sla2_kernels").rglob("*.py")]):
        yield from strings_in(ast.parse(file.read_text(encoding="utf-8")))


def strings_in(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            values = itertools.count()
            yield "".join(
                part.value if isinstance(part, ast.Constant) else f"{{{next(values)}}}" for part in node.values
            )


@pytest.mark.parametrize("language", TRANSLATED)
def test_every_translated_sentence_of_the_server_is_still_said(language):
    table = json.loads((ROOT / "locales" / language / "main.json").read_text(encoding="utf-8"))["sla2Server"]
    assert len(table) > 50 and sorted(set(table) - set(said_by_the_server())) == []
    assert [text for text in table if set(re.findall(r"{\d}", text)) != set(re.findall(r"{\d}", table[text]))] == []


def raised_by_the_nodes():
    """Sentences with which a node's name begins, as they are raised, with {0}, {1} ... for their values."""
    for file in sorted((ROOT / "nodes").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                yield from (text for text in strings_in(node.exc) if text.startswith("SLA2 ") and text.endswith("."))


@pytest.mark.parametrize("language", TRANSLATED)
def test_every_sentence_that_a_node_raises_is_translated(language):
    table = json.loads((ROOT / "locales" / language / "main.json").read_text(encoding="utf-8"))["sla2Server"]
    raised = set(raised_by_the_nodes())
    assert len(raised) > 20 and sorted(raised - set(table)) == []


@pytest.mark.web
def test_what_the_server_says_is_shown_in_the_pages_language(canvas):
    table = json.loads((ROOT / "locales/zh/main.json").read_text(encoding="utf-8"))
    texts = f"import('/extensions/{PACK_FOLDER}/js/texts.js')"
    canvas.js(f"({texts}).then((m) => m.setTranslations(a[0], a[1]))", [table["sla2"], table["sla2Server"]])
    shown = canvas.js(
        f"({texts}).then((m) => a.map(m.fromServer))",
        [
            "saved 41 s of attention in this run · skips 90%, keeps 10% · attention error 0.12 (layers 0.08 to 0.31)",
            "3 calls ran dense: the sequence has 768 tokens, minimum_tokens is 8192",
            "SLA2: 6 of 9 self-attention calls ran sparse (skips 75%, keeps 25%), attention error 0.15",
            "a sentence of tomorrow, and its end",
        ],
    )
    canvas.js(f"({texts}).then((m) => m.setTranslations({{}}))")
    assert shown == [
        "本次运行节省注意力时间 41 秒 · 跳过 90%，保留 10% · 注意力误差 0.12（各层 0.08 到 0.31）",
        "3 次调用以稠密方式运行：序列有 768 个 token，minimum_tokens 为 8192",
        "SLA2：9 次自注意力调用中 6 次以稀疏方式运行（跳过 75%，保留 25%），注意力误差 0.15",
        "a sentence of tomorrow, and its end",
    ]
