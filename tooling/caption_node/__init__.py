"""A text encoder's stand-in for the demo: the caption of the miniature world as conditioning. Lives in the demo's own
ComfyUI folder only, beside a copy of miniature/captions.py."""

from .captions import embed


class SLA2DemoCaption:
    CATEGORY = "SLA2 demo"
    FUNCTION = "encode"
    RETURN_TYPES = ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING", {"default": ""})}}

    def encode(self, text):
        return ([[embed(text), {}]],)


NODE_CLASS_MAPPINGS = {"SLA2DemoCaption": SLA2DemoCaption}
