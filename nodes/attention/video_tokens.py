"""Which tokens of a self-attention call are the video's, and which come before (prefix) and after them (suffix).

Text and sound tokens are few and matter to every query: as keys they are always attended, as queries they run dense. A layout's
``prefix`` function counts the tokens before the video's (None: the video is last); the suffix is what remains. Its ``references``
function says which of them are reference images and videos, guides or poses. There can be as many of these as of the video's
own tokens, so their queries run sparse. ``inputs`` are the arguments of one model call by name.
"""

import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

from ...sla2_kernels import Q_BLOCK
from .run_dense import RunDense


def call_inputs(function, args, kwargs):
    """The arguments of ``function`` by name, its extra keywords among them."""
    inputs = dict(inspect.signature(function).bind_partial(*args, **kwargs).arguments)
    return inputs | inputs.pop("kwargs", {})


def apply_inputs(function, args, kwargs):
    """The same for a call of ComfyUI's BaseModel, where arguments are named or packed differently."""
    inputs = call_inputs(function, args, kwargs)
    if "c_crossattn" in inputs:
        inputs["context"] = inputs.pop("c_crossattn")
    shapes = inputs.get("latent_shapes")
    if shapes is not None:
        from comfy.utils import unpack_latents

        inputs["x"] = unpack_latents(inputs["x"], shapes)
    return inputs


def latent_of(inputs):
    """The video's latent (B, C, T, H, W) or (B, C, H, W); models with sound get it first in a list."""
    latent = inputs["x"]
    return latent[0] if isinstance(latent, (list, tuple)) else latent


def latent_grid(inputs, patch_size):
    """(t, h, w) tokens of the latent itself."""
    shape = tuple(latent_of(inputs).shape[2:])
    return tokens_of((1,) * (3 - len(shape)) + shape, patch_size)


def tokens_of(shape, patch_size):
    return tuple(math.ceil(cells / size) for cells, size in zip(shape, patch_size, strict=True))


def grid_after_first_frame(inputs, patch_size):
    frames, height, width = latent_grid(inputs, patch_size)
    return frames - 1, height, width


def ltx_grid(inputs, patch_size):
    """LTX appends its guides as latent frames: they are references, not video, and some of their tokens may be dropped."""
    frames, height, width = latent_grid(inputs, patch_size)
    guides = inputs.get("keyframe_idxs")
    guide_frames = 0 if guides is None else guides.shape[2] // (height * width)
    return frames - guide_frames, height, width


def no_prefix(model, inputs, patch_size):
    return 0


def video_last(model, inputs, patch_size):
    return None


def first_frame(model, inputs, patch_size):
    """Animate-2: the reference image is the latent's first frame."""
    _, height, width = latent_grid(inputs, patch_size)
    return height * width


def wan_reference(model, inputs, patch_size):
    """Fun control and Animate put one reference image first, if the model has the weights for it."""
    reference = inputs.get("reference_latent")
    if reference is None or getattr(model, "ref_conv", None) is None:
        return 0
    return math.prod(size // patch for size, patch in zip(reference.shape[-2:], patch_size[1:], strict=True))


def scail_reference(model, inputs, patch_size):
    """SCAIL's reference frames come first, its pose tokens last."""
    reference = inputs.get("reference_latent")
    return 0 if reference is None else math.prod(tokens_of(tuple(reference.shape[2:]), patch_size))


def hunyuan_prefix(model, inputs, patch_size):
    """Text and reference come first, in ComfyUI before 0.4 the text last."""
    if not getattr(model.double_blocks[0], "flipped_img_txt", False):
        return None
    reference = inputs.get("ref_latent")
    return 0 if reference is None else math.prod(tokens_of(tuple(reference.shape[2:]), patch_size))


def text_prefix(model, inputs, patch_size):
    """Flux and Qwen-Image: text, image, references."""
    return inputs["context"].shape[1]


def no_references(inputs):
    """A function (prefix, video, all tokens) -> ((start, stop), ...) of the references in a call; here none."""
    return lambda prefix, video, tokens: ()


def all_beside(inputs):
    """The prefix is one reference and the suffix another: images, guides or poses."""

    def ranges(prefix, video, tokens):
        return tuple((start, stop) for start, stop in ((0, prefix), (prefix + video, tokens)) if start < stop)

    return ranges


H3_PICTURES = ("cond", "ref_img")  # key frames, reference images and videos
H3_PICTURE_TAG = 0  # of text tokens


def h3_references(inputs):
    """MiniMax H3 lists the segments of its sequence, the video's last; a list that does not match the call is ignored.

    The text contains every image once more, in as many tokens, which the model itself treats as video.
    """
    payload = inputs.get("minimax_payload") or {}
    segments, tags = list(getattr(payload.get("layout"), "segments", ())), payload.get("text_token_tags")
    shown = [] if tags is None else _runs_of_pictures(tags.flatten().tolist())

    def ranges(prefix, video, tokens):
        if not segments or tuple(segments[-1]) != (prefix, tokens, "video"):
            return ()
        pictures = [(start, stop) for start, stop, kind in segments if kind in H3_PICTURES and start < stop]
        if tags is not None and tuple(segments[0]) == (0, tags.numel(), "text"):
            pictures += shown
        return tuple(sorted(pictures))

    return ranges


def _runs_of_pictures(tags):
    """(start, stop) of each run of text tokens that belong to an image and fill at least one query block."""
    runs, start = [], 0
    for tag, group in itertools.groupby(tags):
        stop = start + len(list(group))
        runs += [(start, stop)] if tag == H3_PICTURE_TAG and stop - start >= Q_BLOCK else []
        start = stop
    return runs


REFERENCE_QUERIES = "the queries are those of the reference image"
DENSE_BY_NATURE = {REFERENCE_QUERIES}  # dense calls that are no failure


@dataclass(frozen=True)
class ExactTokens:
    """How many prefix and suffix queries run dense, and how many prefix and suffix keys every query attends.

    references: (start, stop) of the prefix and suffix tokens that need not be exact.
    """

    query_prefix: int = 0
    query_suffix: int = 0
    key_prefix: int = 0
    key_suffix: int = 0
    references: tuple[tuple[int, int], ...] = ()

    @property
    def dense_queries(self):
        """Number of queries that run dense."""
        return self.query_prefix + self.query_suffix - sum(stop - start for start, stop in self.references)


@dataclass(frozen=True)
class VideoSpan:
    """Where the video's tokens are in one model call. grid: (t, h, w). prefix: tokens before them, None: they are last.

    references: function (prefix, video, all tokens) -> ((start, stop), ...).
    """

    grid: tuple
    prefix: int | None = 0
    by_frame: bool = False
    references: Callable = no_references({})

    def exact_tokens(self, queries, keys):
        """ExactTokens of a call with so many query and key tokens; raises RunDense where it is no such call."""
        if queries != keys and not self.by_frame:
            raise RunDense(f"the call has {queries} query tokens and {keys} key tokens")
        video = math.prod(self.grid)
        prefix = keys - video if self.prefix is None else self.prefix
        suffix = keys - video - prefix
        if video <= 0 or prefix < 0 or suffix < 0:
            needed = video + max(prefix, 0)
            raise RunDense(f"the call has {keys} key tokens, fewer than the {needed} of this model's video")
        if queries == keys:
            return ExactTokens(prefix, suffix, prefix, suffix, self.references(prefix, video, keys))
        if not suffix:
            raise RunDense(REFERENCE_QUERIES)
        return ExactTokens(0, 0, prefix, suffix)
