"""The error that ends a training, with one sentence for the user."""


class TrainingError(RuntimeError):
    """Training cannot go on: the message names the layer and what was wrong with it. What was trained so far is kept."""
