import json, sys

SPARSITY, SHIFT, GUIDANCE = (int(x) if float(x) == int(float(x)) else float(x) for x in sys.argv[1:4])
core = {"cnr_id": "comfy-core", "ver": "0.19.3"}


def node(id, kind, pos, size, link, out, widgets):
    return {
        "id": id,
        "type": kind,
        "pos": pos,
        "size": size,
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [{"localized_name": "model", "name": "model", "type": "MODEL", "link": link}]
        + [{"localized_name": n, "name": n, "type": "FLOAT", "widget": {"name": n}, "link": None} for n in widgets],
        "outputs": [{"localized_name": "MODEL", "name": "MODEL", "type": "MODEL", "links": out}],
        "properties": {"Node name for S&R": kind, **core},
        "widgets_values": list(widgets.values()),
        "widgets_values_named": widgets,
    }


def load(name):
    return json.load(open(f"workflows/{name}.json"))


def save(name, w):
    open(f"workflows/{name}.json", "w").write(json.dumps(w, indent=2, ensure_ascii=False) + "\n")


def by(w, kind):
    return [n for n in w["nodes"] if n["type"] == kind]


def widgets(n, **values):
    for name, value in values.items():
        n["widgets_values_named"][name] = value
    names = list(n["widgets_values_named"])
    for name, value in values.items():
        i = (
            names.index(name)
            if n["type"] != "KSampler"
            else {"seed": 0, "steps": 2, "cfg": 3, "sampler_name": 4, "scheduler": 5, "denoise": 6}[name]
        )
        n["widgets_values"][i] = value


def insert(w, chain):
    """chain: [(kind, pos, size, widgets)] between the loader and its consumers."""
    (loader,) = by(w, "UNETLoader")
    out = loader["outputs"][0]["links"]
    last = loader
    for k, (kind, pos, size, values) in enumerate(chain):
        w["last_node_id"] += 1
        w["last_link_id"] += 1
        link = w["last_link_id"]
        new = node(w["last_node_id"], kind, pos, size, link, [], values)
        w["links"].append([link, last["id"], 0, new["id"], 0, "MODEL"])
        last["outputs"][0]["links"] = [link]
        w["nodes"].append(new)
        last = new
    last["outputs"][0]["links"] = out
    for l in w["links"]:
        if l[0] in out:
            l[1] = last["id"]


name = "First look, nothing to download"
w = load(name)
if not by(w, "ScaleROPE"):
    (loader,) = by(w, "UNETLoader")
    loader["pos"] = [-460, 40]
    insert(
        w,
        [
            (
                "ScaleROPE",
                [-460, 200],
                [390, 200],
                {"scale_x": 3, "shift_x": 0, "scale_y": 3, "shift_y": 0, "scale_t": 1, "shift_t": 0},
            ),
            ("ModelSamplingSD3", [0, 40], [390, 60], {"shift": 12}),
        ],
    )
(e,) = by(w, "EmptyHunyuanLatentVideo")
widgets(e, width=160, height=160, length=45)
for k in by(w, "KSampler"):
    widgets(k, steps=20, cfg=GUIDANCE, sampler_name="euler")
for k in by(w, "ModelSamplingSD3"):
    widgets(k, shift=SHIFT)
(a,) = by(w, "SLA2ApplyAttention")
widgets(a, sparsity=SPARSITY, dense_layers="")
(note,) = by(w, "MarkdownNote")
pc = f"{100 * SPARSITY:g}%"
note["widgets_values"] = [
    f"""**Everything at once, on any machine, nothing to download**

The miniature is a small trained video model that comes with a clone of this pack. Run: the same noise becomes a dense video and an SLA2 video, and the report draws which blocks were computed.

160 x 160 x 45 takes about a minute on a CPU. Skipping {pc} of so short a video costs as much accuracy as 97% of a whole one. On a GPU take 832 x 480 x 81, scale_x and scale_y 1 and sparsity 0.97. ScaleROPE has 480 / height: the miniature was trained that way. Neither length gains time: what this shows is what SLA2 does.

---

什么都不用下载，任何机器都能运行：微型模型随本仓库的克隆附带。运行后，同一份噪声得到一段稠密视频和一段 SLA2 视频，报告画出哪些块被计算。160 x 160 x 45 在 CPU 上约需一分钟；这么短的视频跳过 {pc}，误差相当于完整视频跳过 97%。在显卡上请用 832 x 480 x 81，scale_x 和 scale_y 设为 1，稀疏度 0.97。ScaleROPE 的值为 480 / 高度：微型模型就是这样训练的。这么小的模型不会省时间：这里展示的是 SLA2 做了什么。"""
]
save(name, w)

name = "Miniature, both stages beside dense"
w = load(name)
if not by(w, "ModelSamplingSD3"):
    (loader,) = by(w, "UNETLoader")
    loader["pos"] = [-460, 40]
    insert(w, [("ModelSamplingSD3", [0, 40], [390, 60], {"shift": 12})])
(e,) = by(w, "EmptyHunyuanLatentVideo")
widgets(e, width=832, height=480, length=81)
for k in by(w, "KSampler"):
    widgets(k, steps=20, cfg=GUIDANCE, sampler_name="euler")
for k in by(w, "ModelSamplingSD3"):
    widgets(k, shift=SHIFT)
(note,) = by(w, "MarkdownNote")
t = note["widgets_values"][0]
t = t.replace(
    "320 x 320 x 81 is the size that stage 2 was trained at. On a CPU 192 x 192 x 49 is quicker, but there 97% leaves one block of 30, which is too little for either.",
    "832 x 480 x 81 is the size that both stages were trained at, and takes a GPU. For a smaller picture put ScaleROPE behind Load Diffusion Model, with scale_x and scale_y 480 / height, and skip less.",
)
t = t.replace(
    "第二阶段在 320 x 320 x 81 下训练。",
    "两个阶段都在 832 x 480 x 81 下训练，需要显卡。更小的画面请在“加载扩散模型”之后接 ScaleROPE（scale_x 和 scale_y 为 480 / 高度），并降低稀疏度。",
)
note["widgets_values"] = [t]
save(name, w)
