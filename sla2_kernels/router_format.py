"""The router file's format: what its safetensors header and metadata must say, checked before any tensor is read.

Router files are downloaded and not trusted. Whatever is wrong with one becomes a RouterFileError: one sentence with the tensor
or metadata entry and what was expected of it.
"""

import json
import math

from .router import K_BLOCK, QUERY_BLOCKS
from .support import PRECISIONS

FORMAT = "sla2_router"
FORMAT_VERSION = 2
FLOAT32_VERSION = 1  # what is written where every tensor is float32: earlier releases read that
TOKEN_ORDERS = ("raster",)
KINDS = ("proj_q", "proj_k", "alpha_logits")
MAX_HEADER_BYTES = 4 * 2**20
MAX_FILE_BYTES = 4 * 2**30  # ten times what 50 layers of 56 heads of head_dim 128 need
MAX_COUNT = 4096  # layers, heads and head_dim: generous for any model, small enough to be harmless


class RouterFileError(ValueError):
    """A router file (or router) that cannot be used; the message is one sentence for the user."""


def tensor_name(layer, kind):
    return f"layers.{layer}.{kind}"


def read_header(file, size):
    """(facts of RouterWeights plus num_layers, tensor names) of an open router file, checked; no tensor is read."""
    start = file.read(9)
    # a safetensors header of 640 bytes begins like a pickle, but "{" follows
    if start[8:] != b"{":
        _refuse_other_formats(start)
    length = int.from_bytes(start[:8], "little")
    if len(start) < 9 or not 2 <= length <= size - 8:
        raise RouterFileError("it must be safetensors, but it is not, or it is cut short.")
    if length > MAX_HEADER_BYTES:
        raise RouterFileError(
            f"its safetensors header must be at most {MAX_HEADER_BYTES} bytes for a router, but it is {length}."
        )
    try:
        header = json.loads(start[8:] + file.read(length - 1))
    except (ValueError, RecursionError) as error:
        raise RouterFileError("it must be safetensors, but its header is not JSON.") from error
    if not isinstance(header, dict):
        raise RouterFileError("it must be safetensors, but its header is not a table of tensors.")
    facts, listed = _parse_metadata(header.pop("__metadata__", None))
    _check_names(header, listed, facts["num_layers"])
    last = 0
    for name, entry in header.items():
        dtype, shape, end = _entry(name, entry)
        check_tensor(name, dtype, shape, facts["num_heads"], facts["head_dim"], len(facts["sparsities"]))
        if end > size - 8 - length:
            raise RouterFileError(
                f"it is cut short: tensor {name} must end at byte {8 + length + end}, but the file has {size} bytes."
            )
        last = max(last, end)
    if size != 8 + length + last:
        raise RouterFileError(f"it must end with its last tensor at byte {8 + length + last}, but has {size} bytes.")
    if size > MAX_FILE_BYTES:
        raise RouterFileError(
            f"it must have at most {MAX_FILE_BYTES} bytes, which any router keeps to, but has {size}."
        )
    return facts, header.keys()


def _refuse_other_formats(start):
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") or start[:4] == b"PK\x03\x04":
        raise RouterFileError(
            "it must be safetensors, but it is a Python pickle (.pt, .pth, .ckpt), which can run foreign code and is never opened."
        )
    if start.startswith(b"version "):
        raise RouterFileError("it must be safetensors, but it is a Git LFS pointer: download the file itself.")


def _parse_metadata(metadata):
    """Metadata of the file (strings) -> (keyword arguments of RouterWeights plus num_layers, names of the tensors it must hold)."""
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise RouterFileError(f'its metadata must say format "{FORMAT}": it is not a router made by SLA2TrainRouter.')
    version = _count(metadata, "format_version")
    if version > FORMAT_VERSION:
        raise RouterFileError(
            f"its format_version is {version}, and this version of the pack reads {FORMAT_VERSION}: update the pack."
        )
    facts = {name: _count(metadata, name) for name in ("num_layers", "num_heads", "head_dim", "q_block", "k_block")}
    facts["model_family"] = metadata.get("model_family")
    facts["token_order"] = metadata.get("token_order")
    facts["precision"] = metadata.get("precision")
    facts["keep_diagonal"] = _flag(metadata, "keep_diagonal")
    sparsities = _json_list(metadata, "sparsities")
    if not all(isinstance(s, (int, float)) and not isinstance(s, bool) and 0 <= s < 1 for s in sparsities):
        raise RouterFileError("metadata sparsities must be a list of numbers from 0 to below 1.")
    facts["sparsities"] = tuple(float(s) for s in sparsities)
    names = _json_list(metadata, "tensors")
    if not all(isinstance(name, str) for name in names):
        raise RouterFileError("metadata tensors must be a list of tensor names.")
    check_facts(facts)
    return facts, set(names)


def _count(metadata, name):
    text = metadata.get(name)
    # at most 6 digits: int() of a megabyte of digits would take minutes
    if not (isinstance(text, str) and text.isascii() and text.isdigit() and len(text) <= 6):
        raise RouterFileError(f"metadata {name} must be a whole number, got {printable(text)}.")
    return int(text)


def _flag(metadata, name):
    """A true/false entry; false in files of the first versions, which lack it."""
    text = metadata.get(name, "false")
    if text not in ("true", "false"):
        raise RouterFileError(f"metadata {name} must be true or false, got {printable(text)}.")
    return text == "true"


def _json_list(metadata, name):
    text = metadata.get(name)
    try:
        value = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, list):
        raise RouterFileError(f"metadata {name} must be a JSON list, got {printable(text)}.")
    return value


def _check_names(header, listed, num_layers):
    allowed = {tensor_name(i, kind) for i in range(num_layers) for kind in KINDS}
    for name in header:
        if name not in allowed:
            raise RouterFileError(
                f"tensor {printable(name)} does not belong in it: {num_layers} layers of {', '.join(KINDS)} are expected."
            )
    missing = sorted(listed - header.keys())
    if missing:
        raise RouterFileError(f"tensor {printable(missing[0])} is missing, though its metadata lists it.")
    unlisted = sorted(header.keys() - listed)
    if unlisted:
        raise RouterFileError(f"tensor {unlisted[0]} is not listed in its metadata.")


def _entry(name, entry):
    """(dtype name in torch's words, shape, last byte) of one tensor's header entry."""
    if isinstance(entry, dict):
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        lists = all(isinstance(x, list) and all(type(n) is int and n >= 0 for n in x) for x in (shape, offsets))
        if isinstance(dtype, str) and lists and len(offsets) == 2:
            return {"F32": "float32", "F16": "float16"}.get(dtype, dtype), shape, offsets[1]
    raise RouterFileError(f"tensor {name} must have a dtype, a shape and two offsets in the safetensors header.")


def check_tensor(name, dtype, shape, heads, dim, sparsity_count):
    """One tensor of a router against what its name promises; shape and dtype only."""
    shape = tuple(shape)
    is_ratio = name.endswith("alpha_logits")
    if dtype != "float32" and (is_ratio or dtype != "float16"):
        expected = "float32" if is_ratio else "float32 or float16"
        raise RouterFileError(f"tensor {name} must be {expected}, got {printable(dtype)}.")
    if is_ratio:
        if len(shape) != 3 or shape[:2] != (sparsity_count, heads) or shape[0] == 0 or shape[2] == 0:
            raise RouterFileError(
                f"tensor {name} must have shape ({sparsity_count} sparsities, {heads} heads, 1 or more knots), got {printable(shape)}."
            )
    elif shape not in ((dim, dim), (heads, dim, dim)):
        raise RouterFileError(
            f"tensor {name} must have shape {(dim, dim)} or {(heads, dim, dim)}, got {printable(shape)}."
        )


def check_facts(facts):
    for name in ("num_layers", "num_heads", "head_dim"):
        if type(facts[name]) is not int or not 1 <= facts[name] <= MAX_COUNT:
            raise RouterFileError(f"{name} must be a whole number from 1 to {MAX_COUNT}, got {printable(facts[name])}.")
    family = facts["model_family"]
    if not isinstance(family, str) or not family.isprintable() or not 1 <= len(family) <= 100:
        raise RouterFileError(f"model_family must be a name of 1 to 100 characters, got {printable(family)}.")
    for name, sizes in (("q_block", QUERY_BLOCKS), ("k_block", (K_BLOCK,))):
        if type(facts[name]) is not int or facts[name] not in sizes:
            expected = " or ".join(map(str, sizes))
            raise RouterFileError(
                f"{name} must be {expected}, the operator's block size, got {printable(facts[name])}."
            )
    if facts["token_order"] not in TOKEN_ORDERS:
        orders = " or ".join(f'"{order}"' for order in TOKEN_ORDERS)
        raise RouterFileError(f"token_order must be {orders}, got {printable(facts['token_order'])}.")
    if facts["precision"] is not None and facts["precision"] not in PRECISIONS:
        raise RouterFileError(f'precision must be "16bit", "int8" or "fp8", got {printable(facts["precision"])}.')
    if type(facts["keep_diagonal"]) is not bool:
        raise RouterFileError(f"keep_diagonal must be true or false, got {printable(facts['keep_diagonal'])}.")
    sparsities = facts["sparsities"]
    if not all(math.isfinite(s) and 0 <= s < 1 for s in sparsities) or len(set(sparsities)) < len(sparsities):
        raise RouterFileError(
            f"sparsities must be different numbers from 0 to below 1, got {printable(list(sparsities))}."
        )


def printable(value):
    """Text from an untrusted file on one short line."""
    text = value if isinstance(value, str) else ascii(value)
    text = ascii(text) if not text.isprintable() or not text else text
    return text if len(text) <= 120 else text[:117] + "..."
