"""The miniature where the pack came with it (a clone, not the Registry's archive): its files in the loaders' lists, and its
captions as conditioning, for it has no text encoder."""

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from .training.router_files import FOLDER

MINIATURE = Path(__file__).resolve().parents[1] / "miniature"


def miniature_nodes():
    """[SLA2MiniatureCaption] where the miniature is there, each of its files known to the loaders of its kind; else []."""
    if not (MINIATURE / "captions.py").is_file():
        return []
    for kind in ("diffusion_models", "vae", "loras", FOLDER):
        if (folder := MINIATURE / "weights" / kind).is_dir():
            folder_paths.add_model_folder_path(kind, str(folder))
    return [SLA2MiniatureCaption]


class SLA2MiniatureCaption(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        from ..miniature.captions import BACKGROUNDS, CAMERAS, COLOURS, MOTIONS, SHAPES

        def choice(name, options, tooltip):
            return io.Combo.Input(name, options=list(options), default=options[0], tooltip=tooltip)

        return io.Schema(
            node_id="SLA2MiniatureCaption",
            display_name="SLA2 Miniature Caption",
            category="model/sla2/miniature",
            description="Chooses what the miniature shows. The miniature is a small trained video model that comes with a clone of "
            "this pack: try everything here without a download, on any machine.",
            search_aliases=["miniature prompt", "demo caption", "SLA2 demo"],
            inputs=[
                choice("colour", COLOURS, "Colour of the two objects."),
                choice("shape", SHAPES, "What the two objects are."),
                choice("motion", MOTIONS, "How they move."),
                choice("background", BACKGROUNDS, "The floor's pattern."),
                choice("camera", CAMERAS, "still, or panning to a side."),
            ],
            outputs=[
                io.Conditioning.Output("positive", display_name="positive", tooltip="The caption."),
                io.Conditioning.Output("negative", display_name="negative", tooltip="The empty caption."),
            ],
        )

    @classmethod
    def execute(cls, colour, shape, motion, background, camera) -> io.NodeOutput:
        from ..miniature.captions import Caption, embed

        caption = str(Caption(colour, shape, motion, background, camera))
        return io.NodeOutput([[embed(caption), {}]], [[embed(""), {}]])
