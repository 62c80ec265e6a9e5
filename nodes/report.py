"""SLA2 Report: what the attention of one sampling run really did."""

import uuid

import folder_paths
import torch
from comfy_api.latest import io

from .attention.hook import KEY
from .attention.neighbours import attention_stack, stack_lines
from .compat.executing import executing_context
from .page.text import plain
from .runs.report_text import report_data, report_text
from .runs.run_of_samples import find_run, makers_of, still_fed
from .runs.to_paste import line_to_paste


class SLA2Report(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SLA2Report",
            display_name="SLA2 Report",
            category="model/sla2",
            description="Shows which attention calls of the sampling ran sparse, which ran dense, and why. Connect the MODEL "
            "that was sampled and the sampler's LATENT, so that the report runs after the sampling.",
            is_output_node=True,
            search_aliases=["SLA2 statistics", "attention map", "routing map", "why is it slow", "dense reasons"],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL from SLA2 Apply Attention that was sampled."),
                io.MultiType.Input(
                    "samples", types=[io.Latent, io.Image], tooltip="The sampler's output; passed through unchanged."
                ),
            ],
            outputs=[
                io.Custom("LATENT,IMAGE").Output("passed", display_name="samples", tooltip="The samples, unchanged."),
                io.String.Output("text", display_name="report", tooltip="The report as text."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **kwargs):
        """New every time: a report is never served from the cache."""
        return uuid.uuid4().hex

    @classmethod
    def execute(cls, model, samples) -> io.NodeOutput:
        hook = model.get_attachment(KEY)
        if hook is None:
            maps, stack = None, attention_stack(model)
            text, data = "This MODEL did not come through SLA2 Apply Attention: nothing was measured.", None
        else:
            runs, context = hook.runs.finished(), executing_context()
            graph, node = cls.hidden.dynprompt, cls.hidden.unique_id
            makers = makers_of(runs, graph, node, "samples")
            run, caveat = find_run(runs, samples, makers, context and context[0], still_fed(runs, graph, node))
            stack = attention_stack(model, hook, run)
            text, data = report_text(hook, run, caveat), report_data(hook, run, caveat) | {"stack": stack}
            if run is not None:
                device = torch.device(model.load_device)
                text += "\n" + line_to_paste(run, data, type(model.model).__name__, device)
            maps = run and run.maps and run.maps.for_page(folder_paths.get_temp_directory())
        text = plain("\n".join([text, *stack_lines(stack)]))
        return io.NodeOutput(samples, text, ui={"text": (text,), "sla2_report": (data,), "sla2_maps": (maps,)})
