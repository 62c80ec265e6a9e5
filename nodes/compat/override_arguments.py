"""The arguments with which ComfyUI calls an attention override: their names, and in which order they come."""

PARAMETERS = ("q", "k", "v", "heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape")
KEYWORDS = ("transformer_options", "_inside_attn_wrapper", "low_precision_attention", "scale", "enable_gqa")


def by_name(args, kwargs):
    """{name: value} of a call's arguments."""
    return dict(zip(PARAMETERS, args, strict=False)) | kwargs


def with_queries(args, kwargs, q):
    """(args, kwargs) of the same call with other queries."""
    return ((q, *args[1:]), kwargs) if args else (args, {**kwargs, "q": q})
