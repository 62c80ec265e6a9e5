"""SLA2 Save Router: a router into models/sla2, under a new name every time."""

from comfy_api.latest import io

from .load_router import Router
from .page.text import plain, show_on_node
from .training.router_files import FOLDER, checked_prefix, router_folder, save_router, saved_files


class SLA2SaveRouter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SLA2SaveRouter",
            display_name="SLA2 Save Router",
            category="model/sla2",
            description="Saves a trained router as safetensors in models/sla2, where SLA2 Load Router finds it "
            "(refresh the page's node definitions with R). Files are never overwritten: a number is appended.",
            is_output_node=True,
            search_aliases=["save sparse attention weights", "SLA2 weights"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                Router.Input("router", tooltip="From SLA2 Train Router."),
                io.String.Input(
                    "filename_prefix",
                    default="router",
                    tooltip='File name in models/sla2; may begin with a folder, such as "wan/router".',
                ),
            ],
            outputs=[],
        )

    @classmethod
    def fingerprint_inputs(cls, filename_prefix, router=None):
        """Changes when a saved file is gone: "saved as ..." must not come from the cache then."""
        return saved_files.losses(filename_prefix)

    @classmethod
    def validate_inputs(cls, filename_prefix=None):
        """Refuses a bad name when the prompt is queued, before hours of training. None: a wire, whose value comes later."""
        if filename_prefix is not None:
            checked_prefix(filename_prefix, router_folder())
        return True

    @classmethod
    def execute(cls, router, filename_prefix) -> io.NodeOutput:
        if router is None:
            raise ValueError("SLA2 Save Router: this is the untrained router, so there is nothing to save.")
        text = plain(f"saved as {save_router(router, filename_prefix)} in models/{FOLDER}")
        show_on_node(cls.hidden.unique_id, text)
        return io.NodeOutput(ui={"text": (text,)})
