"""SLA2 Load SLA Model: a TurboDiffusion checkpoint (Wan with SLA v1 weights inside) as MODEL and SLA weights."""

import folder_paths
import torch
from comfy_api.latest import io

from ..sla2_kernels.router_format import printable
from ..sla2_kernels.sla_v1 import take_sla_weights

SLAWeightsType = io.Custom("SLA2_SLA_WEIGHTS")


class SLA2LoadSLAModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SLA2LoadSLAModel",
            display_name="SLA2 Load SLA Model",
            category="model/sla2",
            description="Loads a TurboDiffusion checkpoint (TurboWan2.1, TurboWan2.2) from models/diffusion_models: the "
            "model, and the SLA weights that it was trained with. Use the files without -quant in their names.",
            search_aliases=["TurboDiffusion", "TurboWan", "SLA checkpoint", "rCM", "4 steps"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folder_paths.get_filename_list("diffusion_models"),
                    tooltip="A TurboDiffusion file, such as TurboWan2.1-T2V-1.3B-480P.pth, in models/diffusion_models.",
                )
            ],
            outputs=[
                io.Model.Output(tooltip="The model: through SLA2 Apply Attention to the sampler."),
                SLAWeightsType.Output(display_name="sla_weights", tooltip="For SLA2 Apply Attention's sla_weights."),
            ],
        )

    @classmethod
    def execute(cls, model_name) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise("diffusion_models", model_name)
        state, weights = read_checkpoint(path, model_name)
        model = _model_of(state, model_name)
        model.cached_patcher_init = (_load_again, (path, model_name))
        return io.NodeOutput(model, weights)


def read_checkpoint(path, name):
    """(tensors as ComfyUI's Wan has them, SLAWeights) of a TurboDiffusion file; ValueError with one sentence."""
    state = _tensors_of(path, name)
    if any(key.endswith(".int8_weight") for key in state):
        raise ValueError(f"{name} is one of TurboDiffusion's quantised files: load the one without -quant in its name.")
    weights = take_sla_weights(state, name)
    for key in [key for key in state if ".attn_op." in key or key.startswith("rope_position_embedding.")]:
        del state[key]
    patch = state.get("patch_embedding.weight")
    if (
        patch is not None and patch.dim() == 2 and patch.shape[1] % 4 == 0
    ):  # theirs is a linear layer over patches of 1 x 2 x 2 cells
        state["patch_embedding.weight"] = patch.unflatten(1, (-1, 1, 2, 2))
    return state, weights


def _tensors_of(path, name):
    """Tensors by name, without the prefix "net.". Pickles are read by torch's unpickler for weights alone: no code runs."""
    import comfy.utils

    try:
        state = comfy.utils.load_torch_file(path, safe_load=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch.load raises errors of many kinds for a damaged file
        said = str(error).split("\n")[0]
        raise ValueError(f"{name} cannot be read, it is damaged or not a checkpoint: {printable(said)}.") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{name} holds no table of tensors: it is not a checkpoint.")
    return {
        key.removeprefix("net."): tensor
        for key, tensor in state.items()
        if isinstance(key, str) and isinstance(tensor, torch.Tensor)
    }


def _model_of(state, name, **options):
    import comfy.sd

    model = comfy.sd.load_diffusion_model_state_dict(state, **options)
    if model is None:
        raise ValueError(f"ComfyUI does not know the model in {name}.")
    return model


def _load_again(path, name, **options):
    """For ComfyUI, which loads a second copy of a model to train on it."""
    return _model_of(read_checkpoint(path, name)[0], name, **options)
