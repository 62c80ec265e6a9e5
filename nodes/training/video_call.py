"""One self-attention call of a model in training: the video's part of it, and where text, sound or references stand."""

from ..attention.call import read_call
from ..attention.sparse_call import video_part


def read_video_call(call, args, kwargs):
    """(AttentionCall, ExactTokens, VideoPart, None), or (None, None, None, one sentence) where SLA2 cannot take the call.

    call: ModelCall. Keys that a text mask hides are left out. args, kwargs: of ComfyUI's attention function.
    """
    request, reason = read_call(args, kwargs)
    if reason is None:
        request, exact, reason = call.hook.exact(call, request)
    if reason is not None:
        return None, None, None, reason
    return request, exact, video_part(request, exact), None
