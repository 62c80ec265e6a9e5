"""SLA2 attention for ComfyUI: what ComfyUI imports. Everything else is imported inside the entrypoint."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from comfy_api.latest import ComfyExtension

    from .nodes.apply_attention import SLA2ApplyAttention
    from .nodes.compare import SLA2Compare
    from .nodes.load_router import SLA2LoadRouter, register_router_folder
    from .nodes.load_sla import SLA2LoadSLAModel
    from .nodes.miniature import miniature_nodes
    from .nodes.report import SLA2Report
    from .nodes.save_router import SLA2SaveRouter
    from .nodes.train_lora import SLA2TrainLora
    from .nodes.train_router import SLA2TrainRouter

    register_router_folder()

    class SLA2Extension(ComfyExtension):
        async def get_node_list(self):
            return [
                SLA2LoadRouter,
                SLA2ApplyAttention,
                SLA2Report,
                SLA2Compare,
                SLA2TrainRouter,
                SLA2SaveRouter,
                SLA2LoadSLAModel,
                SLA2TrainLora,
                *miniature_nodes(),
            ]

    return SLA2Extension()
