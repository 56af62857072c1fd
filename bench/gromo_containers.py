"""gromo's containers, one growth step of them, and the same network in growkern."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from gromo.containers.growing_mlp import GrowingMLP
from gromo.containers.resnet import init_full_resnet_structure
from gromo.containers.vgg import VGG
from gromo.modules.conv2d_growing_module import FullConv2dGrowingModule, RestrictedConv2dGrowingModule
from torch import Tensor, nn

import growkern as gk

STATISTICS = (
    "tensor_s",
    "tensor_m",
    "covariance_loss_gradient",
    "tensor_m_prev",
    "cross_covariance",
    "tensor_s_growth",
)
NEURONS = 8
CLASSES = 10


def mlp() -> nn.Module:
    return GrowingMLP(784, CLASSES, hidden_size=256, number_hidden_layers=4, activation=nn.ReLU())


def resnet(kind: type, stages: int) -> nn.Module:
    """The first stages of ResNet-18 for small images, with a quarter of the inner width."""
    options = {"out_features": CLASSES, "reduction_factor": 0.25, "number_of_blocks_per_stage": 2, "nb_stages": stages}
    model = init_full_resnet_structure((3, 32, 32), growing_conv_type=kind, **options)
    model.set_growing_layers(scheduling_method="all")
    return model


def vgg() -> nn.Module:
    """The first three stages of VGG-13, with half of the width."""
    target = [64, 64, "M", 128, 128, "M", 256, 256, "M"]
    cfg = [each if each == "M" else each // 2 for each in target]
    options: dict[str, Any] = {"num_classes": CLASSES, "number_of_fc_layers": 1, "activation": nn.ReLU()}
    return VGG(cfg, target, input_spatial_shape=(32, 32), **options)


@dataclass
class Case:
    """A container, the shape and number of its batches, and what growkern is to measure beside it."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batches: int
    kernel: str | None = None


CASES = {
    "MLP 784-256-256-256-256-10": Case(mlp, (1024, 784), 2),
    "VGG-13 to its third stage, 1/2 width, Restricted": Case(vgg, (64, 3, 32, 32), 2),
    "ResNet-18 to its third stage, 1/4 inner width, Restricted": Case(
        lambda: resnet(RestrictedConv2dGrowingModule, 3), (64, 3, 32, 32), 1, "center"
    ),
    "ResNet-18 to its second stage, 1/4 inner width, Full": Case(
        lambda: resnet(FullConv2dGrowingModule, 2), (4, 3, 32, 32), 2, "full"
    ),
    "ResNet-18, 1/4 inner width, Restricted": Case(
        lambda: resnet(RestrictedConv2dGrowingModule, 4), (64, 3, 32, 32), 6, "center"
    ),
}
Batches = list[tuple[Tensor, Tensor]]


def build(case: Case) -> tuple[Any, Batches]:
    """Model in evaluation mode, as growkern measures, whose norms know their statistics, and batches."""
    torch.manual_seed(0)
    model = case.make()
    batches = [(torch.randn(case.shape), torch.randint(CLASSES, case.shape[:1])) for _ in range(case.batches)]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(batches[0][0])
    return model.eval(), batches


def train(model: nn.Module, batches: Batches) -> None:
    for x, y in batches:
        F.cross_entropy(model(x), y).backward()
    model.zero_grad()


def gromo_step(model: Any, batches: Batches, clock: Callable[[], float] = time.perf_counter) -> float:
    """One growth step; the seconds that statistics and updates took of it."""
    took = 0.0
    model.init_computation()
    for x, y in batches:
        F.cross_entropy(model(x), y).backward()
        start = clock()
        model.update_computation()
        took += clock() - start
    model.zero_grad()
    start = clock()
    # gromo's threshold on singular values is absolute; without it each layer gets as many neurons.
    model.compute_optimal_updates(maximum_added_neurons=NEURONS, statistical_threshold=1e-12)
    return took + clock() - start


def layers(model: Any) -> list[Any]:
    """What grows, in the order in which it runs."""
    if hasattr(model, "stages"):
        return [block.second_layer for stage in model.stages for block in stage]
    return model._growing_layers


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def results(model: Any) -> tuple[dict[tuple[int, str], Tensor], list[float], list[Tensor]]:
    """Statistics, improvements and singular values that a step left in the model."""
    named = {(i, name): getattr(module, name)() for i, module in enumerate(layers(model)) for name in STATISTICS}
    improvements = [float(module.first_order_improvement) for module in layers(model)]
    return named, improvements, [module.eigenvalues_extension for module in layers(model)]


class PlainBlock(nn.Module):
    """A residual block of ordinary layers with the weights of a gromo block."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.pre_activation = copy.deepcopy(block.pre_activation)
        self.first, self.second = plain_conv(block.first_layer.layer), plain_conv(block.second_layer.layer)
        norm = next(m for m in block.first_layer.post_layer_function if isinstance(m, nn.BatchNorm2d))
        self.norm = nn.BatchNorm2d(norm.num_features)
        self.norm.load_state_dict(norm.state_dict())
        self.downsample = copy.deepcopy(block.downsample)

    def forward(self, x: Tensor) -> Tensor:
        out = self.second(torch.relu(self.norm(self.first(self.pre_activation(x)))))
        return out + self.downsample(x)


def plain_conv(conv: nn.Conv2d) -> nn.Conv2d:
    options = {"stride": conv.stride, "padding": conv.padding, "bias": conv.bias is not None}
    made = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, **options)
    made.load_state_dict(conv.state_dict())
    return made


def plain_resnet(model: Any) -> nn.Module:
    blocks = [PlainBlock(block) for stage in model.stages for block in stage]
    return nn.Sequential(copy.deepcopy(model.pre_net), *blocks, copy.deepcopy(model.post_net)).eval()


def growkern_step(plain: nn.Module, sites: list[Any], batches: Batches, kernel: str) -> dict[str, gk.NewNeurons]:
    moments = gk.collect(plain, sites, batches, F.cross_entropy, kernel=kernel, null_draws=0)
    return gk.solve(moments, neurons=NEURONS)


def inner_sites(plain: nn.Module, x: Tensor) -> list[Any]:
    return [site for site in gk.find_sites(plain, x) if site.producer.endswith("first")]
