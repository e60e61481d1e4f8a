"""Torchvision's networks that are more than a chain of convolutions: detectors, segmentation, video, transformers."""

from __future__ import annotations

import pytest
import torch
import torchvision

from examples.benchmarks.zoo_parts.backends import prunable_share
from lightning_prune.surgery import shrink, trace
from tests.helpers import difference, random_keep, randomise, run


def images(*sizes):
    return ([torch.rand(3, *size) for size in sizes],)


NETWORKS = {
    "ssdlite320_mobilenet_v3_large": ({"weights_backbone": None}, lambda: images((120, 160), (150, 140)), 0.95),
    "fasterrcnn_mobilenet_v3_large_320_fpn": ({"weights_backbone": None}, lambda: images((96, 128), (100, 90)), 0.95),
    "r3d_18": ({}, lambda: (torch.rand(2, 3, 4, 32, 48),), 0.95),
    "lraspp_mobilenet_v3_large": ({"weights_backbone": None}, lambda: (torch.rand(2, 3, 64, 80),), 0.95),
    "convnext_tiny": ({}, lambda: (torch.rand(2, 3, 64, 80),), 0.90),  # the streams are normalised over
    "swin_t": ({}, lambda: (torch.rand(2, 3, 64, 80),), 0.60),  # and the heads' width is taken from the stream
}


def built(name, options):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() < 1e-3:  # a layer scale so near to zero would hide what is wrong
                parameter.uniform_(0.5, 1.5)
    return randomise(model).eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_half_of_every_group_goes(name) -> None:
    options, inputs, share = NETWORKS[name]
    model, inputs = built(name, options), inputs()
    graph = trace(model, inputs)
    assert prunable_share(model, graph) >= share
    result = shrink(model, graph, random_keep(graph))
    assert result.error <= 1e-4
    run(model, *inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_b_32", "swin_t", "convnext_tiny"])
def test_with_approximate_norms_the_streams_go_too(name) -> None:
    model = built(name, {})
    size = (224, 224) if name == "vit_b_32" else (64, 80)
    inputs = torch.rand(2, 3, *size)
    graph = trace(model, inputs, norms="approximate")
    assert prunable_share(model, graph) >= {"vit_b_32": 0.99, "swin_t": 0.8, "convnext_tiny": 0.96}[name]
    dense = run(model, inputs)
    result = shrink(model, graph, random_keep(graph))
    assert result.error <= 1e-4
    assert difference(dense, run(model, inputs)) > 1e-3
