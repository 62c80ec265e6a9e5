"""A schedule means the same in the page (web/js/schedule.js) as in a run (nodes/settings/schedule.py), text by text."""

import pytest

from tooling.paths import PACK_FOLDER

pytestmark = pytest.mark.web
LAYERS = 6
PLACES = [(None, None), (None, 1), *((number / 16, 1 + number // 2) for number in range(17))]
READABLE = [
    "",
    " ; \n;",
    "0%-20%: dense; 20%-100%: 0.8 -> 0.97\nlayers 0-3, 5: 0.85",
    "0%-100%: 0 -> 0.99",
    "0%-100%: 0.25->0.75",
    "layer 2: .5",
    "layers 0 - 2,,4 : 0.9",
    "layers -1: dense;layers -6--4: 0.5",
    "12.5%-50%, layers 1: 0.9",
    "layers 1, 50%-100%: 0.7",
    "layers 1,\r2: 0.7",
    "0%-50%: dense\r\n50 % - 100 %: 0.9\r\n",
    "\t0%-.5%:dense;;;",
    "0%-50%:\u00a00.9",
    "layers\u30001: 0.9",
    "\ufeff0%-50%: 0.9",
    "0%-50%: 0.9\x85; \x1clayers 3: dense",
    "layers ,: 0.5",
    "layers 1,\u20282: 0.5",
    "layers -0: 0.5",
    "0%-50%: 0.99999999999999994",
    "step 1: dense",
    "steps 2-4: 0.8 -> 0.95; step 1, layers 0-2: dense",
    "layers 1,steps 1 - 3: .5\n0%-10%: dense",
    "step 00003: 0.8 -> 0.9",
    "steps\u30001-2 , layers 3: 0.9",
    "steps 1-99999: 0.25->0.75",
    "0%-50%\uff1a 0.9",
    "0\uff05-20\uff05\uff1adense\uff1blayers 0-3\uff0c5\u30014\uff1a0.85",
    "step 1\uff0clayers 0-2\uff1adense",
]
UNREADABLE = [
    "0.9",
    ": 0.9",
    "first half: 0.9",
    "50%-20%: 0.9",
    "50%-50%: 0.9",
    "0%-120%: 0.9",
    "0%-50%: 1.0",
    "0%-50%: 0.99999999999999999",
    "0%-50%: -0.5",
    "0%-50%: 1e-1",
    "0%-50%: Dense",
    "0%-50%: dense -> 0.9",
    "0%-50%: 0.5 -> 0.6 -> 0.7",
    "0%-50%: 0.",
    "0%-50%:",
    "\uff10%-50%: 0.9",
    "layers \uff13: 0.9",
    "layers \u0663: 0.9",
    "layers 3-1: 0.9",
    "layers 6: 0.9",
    "layers -7: 0.9",
    "layers 1.5: 0.9",
    "layers 0000001: 0.9",
    "layers: 0.9",
    "layers1: 0.9",
    "0%-50%, 50%-100%: 0.9",
    "layers 1 0%-50% 2: 0.9",
    "layers " + "1, " * 100 + "1: 0.9",
    "x" * 301 + ": 0.9",
    "step 0: dense",
    "steps 0-2: dense",
    "steps 3-2: dense",
    "step: dense",
    "step1: dense",
    "steps 1-2-3: dense",
    "steps 1, 2: dense",
    "step 123456: dense",
    "step \uff11: dense",
    "step -1: dense",
    "my step 1: dense",
    "0%-20%, step 1: dense",
    "step 1, 0%-20%: dense",
]
IN_THE_PAGE = """
import('/extensions/' + a.folder + '/js/schedule.js').then(({ parseSchedule, sparsityOf }) => a.texts.map((text) => {
  let rules;
  try { rules = parseSchedule(text, a.layers); } catch (error) { return error.message; }
  return Array.from({ length: a.layers }, (_, layer) => a.places.map(([at, step]) => sparsityOf(rules, layer, at, 0.625, step)));
}))
"""


@pytest.fixture(scope="module")
def in_the_page(canvas):
    texts = [*READABLE, *UNREADABLE]
    asked = {"folder": PACK_FOLDER, "texts": texts, "layers": LAYERS, "places": PLACES}
    return dict(zip(texts, canvas.js(IN_THE_PAGE.strip(), asked), strict=True))


@pytest.mark.parametrize("text", READABLE, ids=ascii)
def test_the_page_and_the_run_give_every_call_the_same_sparsity(pack_module, in_the_page, text):
    schedule, settings = pack_module("nodes.settings.schedule"), pack_module("nodes.settings.values")
    rules = schedule.parse_schedule(text, LAYERS, settings.parse_layers)
    expected = [[schedule.sparsity_of(rules, layer, at, 0.625, step) for at, step in PLACES] for layer in range(LAYERS)]
    assert in_the_page[text] == expected


@pytest.mark.parametrize("text", UNREADABLE, ids=ascii)
def test_what_a_run_refuses_the_page_refuses_in_a_sentence(pack_module, in_the_page, text):
    schedule, settings = pack_module("nodes.settings.schedule"), pack_module("nodes.settings.values")
    with pytest.raises(ValueError, match="schedule|dense_layers"):
        schedule.parse_schedule(text, LAYERS, settings.parse_layers)
    assert isinstance(in_the_page[text], str) and in_the_page[text].endswith(".")
