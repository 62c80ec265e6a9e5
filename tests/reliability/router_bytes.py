"""A good router file in bytes, and the many ways in which one arrives broken."""

import json
import struct

import torch
from hypothesis import strategies as st

from sla2_kernels.weights import RouterLayer, RouterWeights

HEADS, DIM, LAYERS = 2, 4, 2
SPARSITIES = (0.97, 0.9)


def good_router(**changes):
    generator = torch.Generator().manual_seed(0)
    layer = RouterLayer(
        torch.randn(DIM, DIM, generator=generator),
        torch.randn(HEADS, DIM, DIM, generator=generator),
        torch.randn(len(SPARSITIES), HEADS, 1, generator=generator),
    )
    facts = {"model_family": "wan", "num_heads": HEADS, "head_dim": DIM, "sparsities": SPARSITIES, "precision": "int8"}
    return RouterWeights(**{"layers": (layer, RouterLayer()), **facts, **changes})


def parts(content):
    """(header as a dict, tensor bytes) of a sound file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header, data, claim=None):
    """header: a dict or raw bytes. claim: the header length that the file states, its own where None."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(encoded) if claim is None else claim).to_bytes(8, "little") + encoded + data


NAMES = ["layers.0.proj_q", "layers.0.proj_k", "layers.0.alpha_logits", "layers.1.proj_q"]
ALIEN = [
    "../../../etc/passwd",
    "layers.0.proj_q/../x",
    "layers.00.proj_q",
    "layers.-1.proj_q",
    "",
    "\x00",
    "<b>x</b>",
    "ä" * 500,
]
numbers = st.integers(-(2**65), 2**65) | st.sampled_from([0, 1, 2**31, 2**63 - 1, 2**63, 2**64])
json_values = st.recursive(
    st.none() | st.booleans() | numbers | st.floats() | st.text(max_size=8),
    lambda v: st.lists(v, max_size=3),
    max_leaves=6,
)


@st.composite
def cut(draw, content):
    return content[: draw(st.integers(0, len(content) - 1))]


@st.composite
def flipped_bits(draw, content):
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 8))):
        changed[draw(st.integers(0, len(content) - 1) | st.integers(0, 64))] ^= 1 << draw(st.integers(0, 7))
    return bytes(changed)


@st.composite
def moved_bytes(draw, content):
    start, end = sorted(draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    return draw(
        st.sampled_from(
            [content[:start] + content[end:], content[:end] + content[start:], content + content[start:end]]
        )
    ) + draw(st.binary(max_size=9))


@st.composite
def claimed_header(draw, content):
    header, data = parts(content)
    return joined(header, data, draw(st.integers(0, 2**64 - 1) | st.integers(0, 3000)))


@st.composite
def other_offsets(draw, content):
    """Overlapping, reversed, with holes, far outside."""
    header, data = parts(content)
    for name in draw(st.lists(st.sampled_from(NAMES[:3]), min_size=1, max_size=3)):
        header[name]["data_offsets"] = draw(
            st.lists(numbers, max_size=3) | st.lists(st.integers(0, len(data)), min_size=2, max_size=2)
        )
    return joined(header, data)


@st.composite
def other_tensor(draw, content):
    header, data = parts(content)
    entry = header[draw(st.sampled_from(NAMES[:3]))]
    entry["dtype"] = draw(st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "X"]) | json_values)
    entry["shape"] = draw(st.permutations(entry["shape"]) | st.lists(numbers, max_size=5) | json_values)
    return joined(header, data)


@st.composite
def not_finite(draw, content):
    header, data = parts(content)
    place = 4 * draw(st.integers(0, len(data) // 4 - 1))
    value = struct.pack("<f", draw(st.sampled_from([float("nan"), float("inf"), float("-inf")])))
    return joined(header, data[:place] + value + data[place + 4 :])


@st.composite
def other_names(draw, content):
    """Alien keys, and keys that stand in the header twice with unlike entries."""
    header, data = parts(content)
    name = draw(st.sampled_from(NAMES[:3]))
    if draw(st.booleans()):
        header[draw(st.sampled_from(ALIEN) | st.text(max_size=20))] = header.pop(name)
        return joined(header, data)
    again = dict(header[name], shape=draw(st.just([1]) | json_values))
    text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(again)}" + "}"
    return joined(text.encode(), data)


@st.composite
def other_metadata(draw, content):
    header, data = parts(content)
    field = draw(st.sampled_from(sorted(header["__metadata__"])))
    header["__metadata__"][field] = draw(
        json_values | st.text(max_size=30) | st.sampled_from(["0", "1e999", "[[]]", "[NaN]", "4096", "999999"])
    )
    return joined(header, data)


WAYS = [
    cut,
    flipped_bits,
    moved_bytes,
    claimed_header,
    other_offsets,
    other_tensor,
    not_finite,
    other_names,
    other_metadata,
]
