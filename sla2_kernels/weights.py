"""The router file: trained projections and ratios of one model, as safetensors with metadata that says what they fit.

Router files are downloaded and not trusted. Nothing in them is executed, the header is checked before any tensor is read, and
whatever is wrong becomes a RouterFileError: one sentence with the file, the tensor and what was expected.
"""

import json
import os
import stat
from dataclasses import dataclass, field, fields

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from .arguments import checked_count, checked_sparsity
from .router import K_BLOCK, Q_BLOCK
from .router_format import (
    FLOAT32_VERSION,
    FORMAT,
    FORMAT_VERSION,
    KINDS,
    RouterFileError,
    check_facts,
    check_tensor,
    printable,
    read_header,
    tensor_name,
)
from .whole_file import write_whole

STORAGES = ("auto", "float32", "float16")
MAX_FLOAT32_BYTES = 128 * 2**20  # of projections: "auto" stores more than that in float16
MAX_LOGIT = 16.0  # the sigmoid of anything larger is 1 in float32


@dataclass(frozen=True, eq=False)
class RouterLayer:
    """Router of one attention layer.

    proj_q, proj_k: (D, D), shared by the heads, or (H, D, D), applied as x @ W^T; None is the identity. float32, or float16 as
    a large router is stored: the operator computes in float32 either way.
    alpha_logits: float32 (S, H, A), S trained sparsities, A knots along the query axis; None estimates the ratio.
    """

    proj_q: Tensor | None = None
    proj_k: Tensor | None = None
    alpha_logits: Tensor | None = None

    def ratio(self, sparsity_index, next_index=None, weight=0.0):
        """Ratios (H, A) in (0, 1) at one trained sparsity, or ``weight`` of the way from it to the next one; None without logits."""
        if self.alpha_logits is None:
            return None
        logits = self.alpha_logits[sparsity_index]
        if next_index is not None:
            logits = torch.lerp(logits, self.alpha_logits[next_index], weight)
        return torch.sigmoid(logits.clamp(-MAX_LOGIT, MAX_LOGIT))


@dataclass(frozen=True, eq=False)
class RouterWeights:
    """Routers of all layers of one model, and what they were trained for. Raises RouterFileError if inconsistent.

    layers: one RouterLayer per attention layer. sparsities: shares of skipped key blocks trained at, in the order of
    alpha_logits' first dimension. precision: trained at, or None. source: the file it was loaded from, or "".
    q_block: query tokens that share a selection, query_block of sla2_attention. keep_diagonal: as there. A router is used as it
    was trained.
    """

    layers: tuple[RouterLayer, ...]
    model_family: str
    num_heads: int
    head_dim: int
    q_block: int = Q_BLOCK
    k_block: int = K_BLOCK
    token_order: str = "raster"
    sparsities: tuple[float, ...] = ()
    precision: str | None = None
    source: str = field(default="", repr=False)
    keep_diagonal: bool = False

    def __post_init__(self):
        object.__setattr__(self, "layers", _all_of("layers", "RouterLayers", self.layers, _checked_layer))
        object.__setattr__(self, "sparsities", _all_of("sparsities", "numbers", self.sparsities, float))
        facts = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("layers", "source")}
        check_facts({**facts, "num_layers": len(self.layers)})
        for index, layer in enumerate(self.layers):
            for kind in KINDS:
                tensor = getattr(layer, kind)
                if tensor is not None:
                    name = tensor_name(index, kind)
                    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
                        raise RouterFileError(
                            f"tensor {name} must be a dense tensor that holds values, got {_kind(tensor)}."
                        )
                    dtype = str(tensor.dtype).removeprefix("torch.")
                    check_tensor(name, dtype, tensor.shape, self.num_heads, self.head_dim, len(self.sparsities))
                    if not bool(torch.isfinite(tensor).all()):
                        raise RouterFileError(
                            f"tensor {name} must hold finite numbers, but NaN or infinity is among them."
                        )

    @property
    def num_layers(self):
        return len(self.layers)

    def ratio(self, layer, sparsity):
        """Mixing ratios (H, A) in (0, 1) of ``layer`` at ``sparsity``, or None where they are estimated from the run.

        Logits are interpolated linearly between the trained sparsities; outside them the nearest one counts. Raises
        ValueError where ``sparsity`` is not a number, 0 <= sparsity < 1, or the router has no such layer.
        """
        sparsity = checked_sparsity(sparsity)
        if not -self.num_layers <= checked_count("layer", layer) < self.num_layers:
            raise ValueError(f"{self._name()} has layers 0 to {self.num_layers - 1}, not {layer}.")
        order = sorted(range(len(self.sparsities)), key=self.sparsities.__getitem__)
        above = next((i for i in order if self.sparsities[i] >= sparsity), None)
        below = next((i for i in reversed(order) if self.sparsities[i] <= sparsity), None)
        if above is None or below is None or above == below:
            nearest = above if below is None else below
            return None if nearest is None else self.layers[layer].ratio(nearest)
        low, high = self.sparsities[below], self.sparsities[above]
        return self.layers[layer].ratio(below, above, (sparsity - low) / (high - low))

    def require_model(self, *, model_family, num_layers, num_heads, head_dim):
        """Raises RouterFileError with the first mismatch between this router and a model."""
        pairs = (
            ("model family", self.model_family, model_family),
            ("number of layers", self.num_layers, num_layers),
            ("number of heads", self.num_heads, num_heads),
            ("head_dim", self.head_dim, head_dim),
        )
        for what, ours, models in pairs:
            if ours != models:
                raise RouterFileError(
                    f"{self._name()} was trained for another model: its {what} is {ours}, this model's is {models}."
                )

    def _name(self):
        return f"Router file {self.source}" if self.source else "This router"

    def save(self, path, *, overwrite=True, storage="auto"):
        """Writes the router to ``path`` whole or not at all.

        storage: "float32", "float16" (projections alone), or "auto": float16 where the projections have more than 128 MiB
        in float32, as those of MiniMax H3 (350 MiB) and Wan 14B (200 MiB) do. Projections that do not fit float16's range stay.

        Raises RouterFileError; FileExistsError where ``overwrite`` is False and there is such a file, which stays.
        """
        if storage not in STORAGES:
            raise ValueError(f'storage must be "auto", "float32" or "float16", got {storage!r}.')
        path = _checked_path(path)
        tensors = self._tensors()
        if storage == "float32":
            tensors = {name: tensor.float() for name, tensor in tensors.items()}
        elif storage == "float16" or (storage == "auto" and _projection_bytes(tensors) > MAX_FLOAT32_BYTES):
            tensors = {name: _stored_in_half(name, tensor) for name, tensor in tensors.items()}
        data = safetensors.torch.save(tensors, metadata=self._metadata(tensors))

        def write(draft):
            with open(draft, "wb") as file:
                file.write(data)
                file.flush()

        try:
            write_whole(path, write, overwrite=overwrite)
        except FileExistsError:
            raise
        except OSError as error:
            raise RouterFileError(f"Router file {path} cannot be written: {error.strerror or error}.") from error

    def _tensors(self):
        named = {tensor_name(i, kind): getattr(layer, kind) for i, layer in enumerate(self.layers) for kind in KINDS}
        # safetensors refuses tensors that share memory, which proj_q and proj_k may
        return {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in named.items()
            if tensor is not None
        }

    def _metadata(self, tensors):
        whole = all(tensor.dtype == torch.float32 for tensor in tensors.values())
        metadata = {
            "format": FORMAT,
            "format_version": str(FLOAT32_VERSION if whole else FORMAT_VERSION),
            "model_family": self.model_family,
            "num_layers": str(self.num_layers),
            "num_heads": str(self.num_heads),
            "head_dim": str(self.head_dim),
            "q_block": str(self.q_block),
            "k_block": str(self.k_block),
            "token_order": self.token_order,
            "sparsities": json.dumps(self.sparsities),
            "keep_diagonal": json.dumps(self.keep_diagonal),
            # an absent tensor means identity or an estimated ratio: the list distinguishes it from a lost tensor
            "tensors": json.dumps(sorted(tensors)),
        }
        if self.precision is not None:
            metadata["precision"] = self.precision
        return metadata


def _all_of(name, what, values, convert):
    """convert(value) of each of ``values``, a tuple; raises RouterFileError where they are not a sequence of ``what``."""
    try:
        return tuple(map(convert, values))
    except (TypeError, ValueError, OverflowError):
        raise RouterFileError(f"{name} must be a sequence of {what}, got {printable(values)}.") from None


def _checked_layer(layer):
    # not isinstance(): a process may hold several copies of this package
    if not all(hasattr(layer, kind) for kind in KINDS):
        raise TypeError
    return layer


def _kind(value):
    """What a value is that is no dense tensor with values."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return "one on the meta device" if value.is_meta else f"layout {value.layout}"


def _checked_path(path):
    """path as text; raises RouterFileError for what can be no file's name."""
    try:
        text = os.fspath(path)
        if isinstance(text, str) and b"\0" not in os.fsencode(text):
            return text
    except (TypeError, UnicodeEncodeError):
        pass
    raise RouterFileError(f"A router file is named by its path, got {path!r}.")


def _projection_bytes(tensors):
    """What the projections take in float32."""
    return sum(4 * tensor.numel() for name, tensor in tensors.items() if not name.endswith("alpha_logits"))


def _stored_in_half(name, tensor):
    """A projection in float16, where that holds its largest entry; ratios stay float32."""
    if name.endswith("alpha_logits"):
        return tensor
    half = tensor.to(torch.float16)
    return half if bool(half.isfinite().all()) else tensor


def identity_router(model_family, num_layers, num_heads, head_dim):
    """The untrained router of any model: identity projections, own key blocks kept, ratios estimated from the run."""
    return RouterWeights(
        (RouterLayer(),) * checked_count("num_layers", num_layers),
        model_family,
        num_heads,
        head_dim,
        keep_diagonal=True,
    )


def load_router(path):
    """Reads a router file into memory (CPU, in the dtypes that it stores; the file is closed again) and checks it.

    Raises RouterFileError: one sentence with the file, the tensor and what was expected of it.
    """
    path = _checked_path(path)
    try:
        # opening a named pipe would block until someone writes to it
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise RouterFileError("it cannot be read: it must be a file, but it is a folder, a pipe or a device.")
        with open(path, "rb") as file:
            facts, names = read_header(file, os.fstat(file.fileno()).st_size)
            file.seek(0)
            tensors = safetensors.torch.load(file.read())
        layers = tuple(
            RouterLayer(**{kind: tensors[tensor_name(i, kind)] for kind in KINDS if tensor_name(i, kind) in names})
            for i in range(facts.pop("num_layers"))
        )
        return RouterWeights(layers, **facts, source=path)
    except RouterFileError as error:
        raise RouterFileError(f"Router file {path}: {error}") from None
    except OSError as error:
        raise RouterFileError(f"Router file {path} cannot be read: {error.strerror or error}.") from error
    except SafetensorError as error:
        reason = printable(str(error))
        raise RouterFileError(
            f"Router file {path}: its safetensors data is damaged or cut short ({reason})."
        ) from error
