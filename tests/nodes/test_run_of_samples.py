"""Which run of a model SLA2 Report shows for an image or a latent."""

from types import SimpleNamespace

import pytest
import torch

NOW, BEFORE = "this prompt", "an earlier one"
IMAGE = torch.zeros(1, 64, 64, 3)
# 1 loads; 2, 3 sample; 4, 5 decode them; 6 blends both images; 7 samples on from 2, and 8 decodes that; 9 loads an image
LINKS = {"1": [], "2": ["1"], "3": ["1"], "4": ["2"], "5": ["3"], "6": ["4", "5"], "7": ["1", "2"], "8": ["7"], "9": []}


class Graph:
    """ComfyUI's DynamicPrompt over LINKS, with a report behind ``source``; "3.0.1" was put into the graph by node 3."""

    def __init__(self, source):
        self.nodes = {name: {"inputs": {f"in{n}": [s, 0] for n, s in enumerate(own)}} for name, own in LINKS.items()}
        self.nodes["report"] = {"inputs": {"samples": [source, 0], "model": ["1", 0]}}

    def has_node(self, node):
        return node in self.nodes

    def get_node(self, node):
        return self.nodes[node]

    @staticmethod
    def get_real_node_id(node):
        return node.split(".")[0]


def run(number, node, prompt=NOW, latent=None, record=None):
    sample = None if latent is None else record.sample_of(latent)
    return SimpleNamespace(number=number, context=(prompt, node), latent_sample=sample)


@pytest.fixture
def shown(pack_module):
    module = pack_module("nodes.runs.run_of_samples")

    def find(runs, source, samples=IMAGE):
        found, caveat = module.find_run(runs, samples, module.makers_of(runs, Graph(source), "report", "samples"), NOW)
        return found.number, caveat

    return find


@pytest.mark.parametrize(
    ("runs", "source", "number", "words"),
    [
        ([run(1, "2"), run(2, "3")], "4", 1, None),
        ([run(1, "2"), run(2, "3")], "5", 2, None),
        ([run(1, "2"), run(2, "3.0.1")], "5", 2, None),
        # of two samplers in a row the last one made it
        ([run(1, "2"), run(2, "7"), run(3, "3")], "8", 2, None),
        ([run(1, "2"), run(2, "3")], "6", 2, "2 runs of this model may have made these samples"),
        ([run(1, "2"), run(2, "2")], "4", 2, "2 runs of this model may have made these samples"),
        # only the other sampler ran in this prompt
        ([run(1, "2", BEFORE), run(2, "3")], "4", 1, "came from the cache): its newest run is shown"),
        ([run(1, "2", BEFORE), run(2, "2", BEFORE), run(3, "2")], "4", 3, None),
        ([run(1, "2")], "9", 1, "which run made these samples is not known"),
    ],
)
def test_an_image_is_known_by_the_nodes_it_came_through(shown, runs, source, number, words):
    found, caveat = shown(runs, source)
    assert found == number
    assert caveat is None if words is None else words in caveat


def test_a_latent_is_known_by_its_values_and_what_was_made_of_it_by_its_nodes(shown, pack_module):
    record = pack_module("nodes.runs.record")
    latents = [torch.randn(1, 16, 3, 8, 8) for _ in range(2)]
    latents[0][0, 0, 0, 0, 0] = float("nan")  # of a run that went wrong, which is when reports are read
    runs = [run(1, "2", NOW, latents[0], record), run(2, "3", NOW, latents[1], record)]
    assert shown(runs, "9", {"samples": latents[0].bfloat16()}) == (1, None)
    number, caveat = shown(runs, "2", {"samples": 1.5 * latents[0]})
    assert number == 1 and caveat.endswith(
        "not the direct result of a run of this model: that of the sampler before them is shown"
    )
    number, caveat = shown(runs, "9", {"samples": latents[0] + 1})
    assert number == 2 and "not the direct result" in caveat and "is not known" in caveat


def test_samples_of_a_run_that_is_no_longer_kept_are_not_said_to_be_of_none(shown, pack_module):
    record = pack_module("nodes.runs.record")
    runs = [run(number, "2", NOW, torch.randn(1, 16, 3, 8, 8), record) for number in range(3, 11)]
    number, caveat = shown(runs, "2", {"samples": torch.randn(1, 16, 3, 8, 8)})
    assert (
        number == 10 and "not the direct result of one of the last 8 runs of this model, and no other is kept" in caveat
    )


def test_where_nobody_knows_the_graph_one_run_alone_is_certain(pack_module):
    module = pack_module("nodes.runs.run_of_samples")
    assert module.makers_of([], None, "report", "samples") is None
    assert module.find_run([], IMAGE, None, None) == (None, None)
    assert module.find_run([one := run(1, "2")], IMAGE, None, NOW) == (one, None)
    found, caveat = module.find_run([one, run(2, "3")], IMAGE, None, NOW)
    assert found.number == 2 and "2 runs of this model may have made" in caveat


def test_a_sampler_that_no_longer_uses_this_model_made_no_run_of_it(pack_module):
    """Its earlier run was shown as that of the cache: "12 of 12 ran sparse" for a sampling without SLA2."""
    module = pack_module("nodes.runs.run_of_samples")
    graph = Graph("4")
    graph.nodes["apply"] = {"class_type": "SLA2ApplyAttention", "inputs": {"model": ["1", 0]}}
    graph.nodes["report"]["inputs"]["model"] = ["apply", 0]
    earlier = [run(1, "2", BEFORE)]

    def shown():
        return module.find_run(earlier, IMAGE, module.makers_of(earlier, graph, "report", "samples"), NOW)

    assert shown() == (None, None)
    graph.nodes["2"]["inputs"]["model"] = ["apply", 0]
    found, caveat = shown()
    assert found.number == 1 and "came from the cache" in caveat
