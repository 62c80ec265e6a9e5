"""How alike two videos are: SSIM beside the miniature's PSNR."""

import torch
import torch.nn.functional as F

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2  # Wang et al. 2004, for values in [0, 1]


def ssim(a, b):
    """Mean structural similarity (Wang et al. 2004, Gaussian window of 11, sigma 1.5) over frames and channels.

    a, b: (3, F, H, W) in [-1, 1]; both are clamped first, as a player would. 1 for equal videos.
    """
    a, b = ((x.double().clamp(-1, 1) + 1).div(2).transpose(0, 1).flatten(0, 1)[:, None] for x in (a, b))
    place = torch.arange(WINDOW, dtype=torch.float64, device=a.device) - WINDOW // 2
    line = torch.exp(-place.square() / (2 * SIGMA**2))
    line = (line / line.sum())[None, None, :, None]

    def blur(x):
        return F.conv2d(F.conv2d(x, line), line.transpose(2, 3))

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    score = (2 * mean_a * mean_b + C1) * (2 * covariance + C2)
    return float((score / ((mean_a**2 + mean_b**2 + C1) * (var_a + var_b + C2))).mean())
