"""What fine-tuning trains a model's velocity towards: that of the same model run dense, or the true one, of a video and its noise.

Sparse attention is worst at high noise, where a video says little about its velocity and the dense model much. At low noise the
video says nearly all, and the dense model has errors of its own.
"""

import math

# loss -> noise level (0 to 1) from which on the dense model is followed
DENSE_FROM = {"distill": 0.0, "flow": math.inf, "mixed": 0.5}
LOSSES = tuple(DENSE_FROM)
