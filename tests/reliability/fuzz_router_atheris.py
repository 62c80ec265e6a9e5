"""Coverage-guided fuzzing of the router file's reader: python tests/reliability/fuzz_router_atheris.py [SECONDS]

Needs atheris (pip install atheris), which has no wheel for every Python, so that the test suite runs hypothesis instead. Starts
from sound files; each input must load as a sound router or be refused by RouterFileError in one line. Ends with the counts.
"""

import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

with atheris.instrument_imports(include=["sla2_kernels.router_format", "sla2_kernels.weights"]):
    from sla2_kernels import router_format, weights

import torch

counts = Counter()


def sound_files(folder):
    """A few valid router files, for libFuzzer to change."""
    eye = torch.eye(4)
    layers = (weights.RouterLayer(eye, eye.expand(2, 4, 4).contiguous(), torch.zeros(1, 2, 1)), weights.RouterLayer())
    weights.RouterWeights(layers, "wan", 2, 4, sparsities=(0.9,), keep_diagonal=True).save(folder / "trained")
    weights.identity_router("wan", 3, 2, 4).save(folder / "identity")


def main():
    seconds = sys.argv[1] if len(sys.argv) > 1 else "60"
    folder = Path(tempfile.mkdtemp())
    (folder / "corpus").mkdir()
    sound_files(folder / "corpus")
    file = folder / "fuzzed.safetensors"

    def read(data):
        file.write_bytes(data)
        try:
            router = weights.load_router(file)
        except router_format.RouterFileError as error:
            counts["refused"] += 1
            assert "\n" not in str(error) and str(file) in str(error), error
            return
        counts["loaded"] += 1
        for layer in router.layers:
            tensors = (layer.proj_q, layer.proj_k, layer.alpha_logits)
            assert all(torch.isfinite(tensor).all() for tensor in tensors if tensor is not None)

    # libFuzzer ends the process itself, without Python's own ends
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        print((folder / "counts").read_text(encoding="utf-8"))
        sys.exit(os.waitstatus_to_exitcode(status))

    def counted(data):
        try:
            read(data)
        finally:
            if sum(counts.values()) % 100 == 0 or seconds == "1":
                (folder / "counts").write_text(str(dict(counts)), encoding="utf-8")

    atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", "-max_len=8192", str(folder / "corpus")], counted)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
