"""SLA2 Report: what the attention of one sampling run really did."""

import uuid

import folder_paths
from comfy_api.latest import io

from .attention_hook import KEY
from .attention_stack import attention_stack, stack_lines
from .executing import executing_context
from .progress_text import plain
from .report_text import report_data, report_text
from .run_record import difference, sample_of
from .schema_support import search_aliases

SAME_LATENT = 0.02  # the intermediate dtype may be 16 bit


class SLA2Report(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SLA2Report",
            display_name="SLA2 Report",
            category="model/sla2",
            description="Says which attention calls of the sampling ran sparse, which dense and why. Connect the MODEL "
            "that was sampled and the sampler's LATENT, so that the report comes after the sampling.",
            is_output_node=True,
            **search_aliases("SLA2 statistics", "attention map", "routing map", "why is it slow", "dense reasons"),
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL from SLA2 Apply Attention that was sampled."),
                io.MultiType.Input(
                    "samples", types=[io.Latent, io.Image], tooltip="What the sampling made; passed through unchanged."
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
            run, caveat = find_run(hook.runs.finished(), samples)
            stack = attention_stack(model, hook, run)
            text, data = report_text(hook, run, caveat), report_data(hook, run, caveat) | {"stack": stack}
            maps = run and run.maps and run.maps.for_page(folder_paths.get_temp_directory())
        text = plain("\n".join([text, *stack_lines(stack)]))
        return io.NodeOutput(samples, text, ui={"text": (text,), "sla2_report": (data,), "sla2_maps": (maps,)})


def find_run(runs, samples):
    """(run, caveat): the run that made these samples, or the newest one with a sentence why that is not certain."""
    if not runs:
        return None, None
    newest = runs[-1]
    if isinstance(samples, dict) and newest.latent_sample is not None:
        distance, run = nearest_run(runs, samples.get("samples"))
        if distance > SAME_LATENT:
            return newest, "these samples are not the direct result of a run of this model: the newest run is shown"
        newest = run
    context = executing_context()
    if context and newest.context and newest.context[0] != context[0]:
        return newest, "the sampler did not run in this prompt (its result came from the cache): its own run is shown"
    return newest, None


def nearest_run(runs, latent):
    sample = sample_of(latent)
    # of equal runs the newest
    return min(((difference(sample, run.latent_sample), run) for run in reversed(runs)), key=lambda found: found[0])
