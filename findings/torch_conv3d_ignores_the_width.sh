#!/usr/bin/env bash
# torch 2.13.0, float32 on a CPU: whether a 3D convolution of one video runs in oneDNN depends on batch * channels * frames * height,
# the width left out: up to 20,480 PyTorch takes its own im2col ("slow_conv3d"), several times as long here, however wide the
# picture is; the test was written for 4-dimensional tensors. Two videos at a time, or one row more, take oneDNN. So video VAEs that
# work frame by frame (causal ones, with few channels or in small tiles) decode slowly on a CPU one video at a time, and as a batch
# not. torch.ops.aten.mkldnn_convolution takes oneDNN for every size.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip "$@"; }
pip install -q torch==2.13.0 numpy==2.3.5
cat > "$folder/path.py" <<'PY'
import time

import torch

torch.set_num_threads(1)
CHANNELS, FRAMES = 40, 4
KERNEL = torch.randn(CHANNELS, CHANNELS, 3, 3, 3)


def operator(video):
    """What convolves this video, by PyTorch's profiler."""
    with torch.profiler.profile() as profile:
        torch.nn.functional.conv3d(video, KERNEL, padding=1)
    names = {event.key for event in profile.key_averages()}
    (found,) = names & {"aten::slow_conv3d", "aten::mkldnn_convolution"}
    return found


def milliseconds(convolve):
    times = []
    for _ in range(4):
        start = time.perf_counter()
        convolve()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


slow, quick = "aten::slow_conv3d", "aten::mkldnn_convolution"
with torch.no_grad():
    for batch, height, width, expected in ((1, 128, 256, slow), (1, 128, 1024, slow), (1, 129, 256, quick), (2, 128, 256, quick)):
        video = torch.randn(batch, CHANNELS, FRAMES, height, width)
        found = operator(video)
        size = batch * CHANNELS * FRAMES * height
        print(f"{batch} x {CHANNELS} channels x {FRAMES} frames x {height} x {width} ({size} without the width): {found}")
        assert found == expected, "another operator is chosen now"
    video = torch.randn(1, CHANNELS, FRAMES, 128, 256)
    ones = [1, 1, 1]
    plain = lambda: torch.nn.functional.conv3d(video, KERNEL, padding=1)
    onednn = lambda: torch.ops.aten.mkldnn_convolution(video, KERNEL, None, ones, ones, ones, 1)
    assert (plain() - onednn()).norm() < 1e-5 * plain().norm()
    print(f"the first of them: {milliseconds(plain):.0f} ms, in oneDNN {milliseconds(onednn):.0f} ms")
print("as seen before: the width does not count")
PY
"$folder/venv/bin/python" -W ignore "$folder/path.py" || { echo "torch no longer chooses so"; exit 1; }
