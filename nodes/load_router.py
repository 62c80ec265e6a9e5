"""SLA2 Load Router: a trained router file from models/sla2."""

import os

import folder_paths
from comfy_api.latest import io

from ..sla2_kernels.weights import load_router
from .training.router_files import FOLDER

UNTRAINED = "none (untrained)"

Router = io.Custom("SLA2_ROUTER")


def register_router_folder():
    """Makes models/sla2 known, beside folders that extra_model_paths.yaml may have named already."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {".safetensors"})


def file_state(name):
    """What changes when a router file does."""
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        return name
    status = os.stat(path)
    return f"{path}|{status.st_mtime_ns}|{status.st_size}"


class SLA2LoadRouter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SLA2LoadRouter",
            display_name="SLA2 Load Router",
            category="model/sla2",
            description="Loads a trained SLA2 router from models/sla2: which key blocks to keep, and the mixing ratios.",
            search_aliases=["SLA2 weights", "router loader", "load sparse attention weights"],
            inputs=[
                io.Combo.Input(
                    "router_name",
                    options=[UNTRAINED, *folder_paths.get_filename_list(FOLDER)],
                    tooltip="A router file made for exactly this model. Untrained: blocks are selected by their mean keys, "
                    "and the mixing ratio is fitted while sampling.",
                )
            ],
            outputs=[
                Router.Output(display_name="router", tooltip="For SLA2 Apply Attention, or to continue training.")
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, router_name):
        """A file saved over the one it was loaded from is read again. router_name: None where a wire brings it: any file may be it."""
        if router_name == UNTRAINED:
            return router_name
        names = folder_paths.get_filename_list(FOLDER) if router_name is None else [router_name]
        return "; ".join(map(file_state, names))

    @classmethod
    def execute(cls, router_name) -> io.NodeOutput:
        if router_name == UNTRAINED:
            return io.NodeOutput(None)
        return io.NodeOutput(load_router(folder_paths.get_full_path_or_raise(FOLDER, router_name)))
