"""Folders that scripts and tests agree on."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_OUTPUT = ROOT / "demo_output"
PACK_FOLDER = "sla2-attention"  # the pack's name in custom_nodes
