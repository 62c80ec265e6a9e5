"""Loads the pack in a process where other packs own its modules' names, or where it is installed twice; prints JSON.

python neighbourhood.py PACK FOLDER beside|twice [COMFYUI]
"""

import asyncio
import importlib.util
import json
import sys
from pathlib import Path

NAMES = (
    "web",
    "tooling",
    "sla2_kernels",
    "sla2_training",
    "settings",
    "report",
    "schedule",
    "kernels",
    "router",
    "weights",
)


class Foreign:
    """A module of another pack: whoever takes it for their own fails."""

    __path__ = []

    def __init__(self, name):
        self.__name__ = name
        self.__spec__ = importlib.util.spec_from_loader(name, None)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError(f"{self.__name__}.{name} is another pack's")


def load(pack, name):
    spec = importlib.util.spec_from_file_location(name, pack / "__init__.py", submodule_search_locations=[str(pack)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def beside(pack, comfyui):
    """The pack's nodes with ComfyUI's own module nodes and foreign ones under the names that the pack uses inside."""
    sys.path.insert(0, comfyui)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import nodes  # ComfyUI's

    for name in NAMES:
        sys.modules[name] = Foreign(name)
    module = load(pack, "custom_nodes.sla2")
    listed = asyncio.run(asyncio.run(module.comfy_entrypoint()).get_node_list())
    files = {name: str(getattr(module, "__file__", "")) for name, module in sys.modules.items() if name[:2] != "__"}
    # the test command's environment lies in the pack's folder
    ours = [name for name, file in files.items() if file.startswith(str(pack)) and not file.startswith(sys.prefix)]
    return {
        "nodes": [cls.define_schema().node_id for cls in listed],
        "outside": [name for name in ours if not name.startswith("custom_nodes.sla2")],
        "comfyui": Path(sys.modules["nodes"].__file__).parent == Path(comfyui)
        and hasattr(nodes, "NODE_CLASS_MAPPINGS"),
    }


def twice(pack):
    """Two installations in one process: the torch operator is registered twice."""
    import torch

    results = []
    copies = [load(pack, name) and importlib.import_module(f"{name}.sla2_kernels") for name in ("first", "second")]
    for kernels in (*copies, copies[0]):
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, 2, 200, 32, generator=generator).requires_grad_() for _ in range(3))
        out = kernels.sla2_attention(q, k, v, sparsity=0.5)
        out.square().sum().backward()
        results.append([out.detach(), q.grad, k.grad, v.grad])
    return {"equal": all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))}


if __name__ == "__main__":
    pack, folder, what, *comfyui = sys.argv[1:]
    for name in ("nodes", *NAMES):
        (Path(folder) / f"{name}.py").write_text("raise RuntimeError('another pack')\n")
    sys.path.append(folder)
    print(json.dumps(beside(Path(pack), *comfyui) if what == "beside" else twice(Path(pack))))
