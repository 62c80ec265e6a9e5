"""Experiments on captured Q, K, V that the training's defaults rest on: ``python -m sla2_training.explore``.

Every figure is the hard top-k output error against dense attention on held-out captures.
"""

from .captures import Capture, Recorder, load_captures, save_captures, synthetic_captures
from .studies import run_studies

__all__ = ["Capture", "Recorder", "load_captures", "run_studies", "save_captures", "synthetic_captures"]
