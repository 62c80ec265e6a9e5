"""What the recipes are made of: nodes, their wires, and the parts that all of them share."""

from dataclasses import dataclass, field

PRESET = "automatic"
SEED = 82628696717253
EXAMPLE = "example.png"  # in every ComfyUI's input folder


@dataclass(frozen=True)
class Wire:
    """From an output of the node with that key."""

    node: str
    output: int = 0


@dataclass
class Node:
    """key: its name in the recipe's wires. inputs: {name: value or Wire}, set in this order.

    models: of the files that it loads, as the page offers them: [{"name", "url", "directory"}].
    """

    key: str
    kind: str
    title: str | None = None
    inputs: dict = field(default_factory=dict)
    models: list = field(default_factory=list)
    width: int = 330


def file(name, repository, directory, folder=None):
    """What the page offers to download; folder: where it lies in its repository, if not in ``directory``."""
    place = directory if folder is None else folder
    parts = ["https://huggingface.co", repository, "resolve/main", *([place] if place else []), name]
    return {"name": name, "url": "/".join(parts), "directory": directory}


def loader(key, kind, models, title=None, **inputs):
    return Node(key, kind, title, inputs, models, width=420)


def diffusion_model(model, key="model", title=None):
    return loader(key, "UNETLoader", [model], title, unet_name=model["name"], weight_dtype="default")


def text_encoder(model, kind):
    return loader("clip", "CLIPLoader", [model], clip_name=model["name"], type=kind, device="default")


def vae(model, key="vae", title=None):
    return loader(key, "VAELoader", [model], title, vae_name=model["name"])


def lora(model, source="model", key="lora", title=None, strength=1.0):
    inputs = {"model": Wire(source), "lora_name": model["name"], "strength_model": strength}
    return loader(key, "LoraLoaderModelOnly", [model], title, **inputs)


def image(key="image", title=None):
    return Node(key, "LoadImage", title, {"image": EXAMPLE}, width=300)


def sla2(source, key="", title="", on=None):
    """SLA2 Apply Attention and the switch behind it: off is the model as it comes. on: a Wire of a switch for several."""
    named = f" ({title})" if title else ""
    inputs = {"on_false": Wire(source), "on_true": Wire(f"sla2{key}"), "switch": on or True}
    return [
        Node(f"switch{key}", "ComfySwitchNode", f"SLA2 on, or dense{named}", inputs, width=400),
        Node(
            f"sla2{key}",
            "SLA2ApplyAttention",
            f"SLA2 Apply Attention{named}",
            {"model": Wire(source), "preset": PRESET},
            width=400,
        ),
    ]


def report(switch, sampler, key="report", title=None):
    inputs = {"model": Wire(switch), "samples": Wire(sampler)}
    return Node(key, "SLA2Report", title, inputs, width=480)


def video(name, images, sound=None, fps=24):
    inputs = {"images": Wire(images)} | ({"audio": Wire(sound)} if sound else {}) | {"fps": fps}
    return [
        Node("video", "CreateVideo", None, inputs),
        Node("save", "SaveVideo", None, {"video": Wire("video"), "filename_prefix": f"video/{name}"}, width=620),
    ]


# the note's common part once more; the page translates no note
IN_CHINESE = (
    "开关 *SLA2 on, or dense* 在 SLA2 与稠密之间选择；种子不变，两段视频从同一份噪声开始。运行后“SLA2 应用注意力”会说明跳过了多少、误差多大，"
    f"“SLA2 报告”会说明哪些调用为何以稠密方式运行。预设 *{PRESET}* 按 token 数选择跳过的比例；"
    "从噪声开始、步数很少时，第一步保持稠密，节点会说明所选的值。步数这么少的视频质量只在微型模型上测量过，请先与稠密视频比较。"
)


def note(title, first, *more):
    """The note that a workflow begins with. title: what it makes. first: what is special about it, a sentence or two."""
    text = (
        f"# {title}, dense or with SLA2\n\n{first}\n\nThe switch *SLA2 on, or dense* chooses; the seed stays, so both videos start from "
        "the same noise. SLA2 Apply Attention says after a run how much was skipped and what it cost in accuracy; SLA2 Report says why a "
        f"call ran dense.\n\nThe preset *{PRESET}* chooses what is skipped by the number of tokens, and keeps the first of a few steps dense "
        "where sampling starts from noise; the node says what it chose. How good videos of so few steps are was measured on a miniature "
        "model alone: compare with the dense video before you rely on it."
    )
    return Node("note", "MarkdownNote", "Start here", {"": "\n\n".join([text, *more, "---", IN_CHINESE])}, width=420)
