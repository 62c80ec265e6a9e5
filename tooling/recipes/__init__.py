"""Workflows of what people run, as data: {file name: list of columns of nodes}. python -m tooling.workflows builds them in the page."""

from .ltx_2 import LTX_2
from .minimax_h3 import MINIMAX_H3
from .wan_2_2 import WAN_2_2

RECIPES = MINIMAX_H3 | LTX_2 | WAN_2_2
