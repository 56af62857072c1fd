"""gromo's containers for the networks whose growth is measured, and a growth step of them."""

from typing import Any

import torch
import torch.nn.functional as F
from models import CLASSES, Encoder, EncoderLayer, channels_of_vgg
from torch import Tensor, nn

Batches = list[tuple[Tensor, Tensor]]
Found = list[tuple[Tensor, Tensor, Tensor]]


def mlp(*widths: int, device: str) -> nn.Module:
    from gromo.containers.growing_mlp import GrowingMLP

    inputs, hidden, *others = widths
    return GrowingMLP(inputs, CLASSES, hidden, 1 + len(others), activation=nn.SELU(), device=torch.device(device))


def convolution(full: bool) -> type:
    from gromo.modules.conv2d_growing_module import FullConv2dGrowingModule, RestrictedConv2dGrowingModule

    return FullConv2dGrowingModule if full else RestrictedConv2dGrowingModule


def vgg13(stages: int, width: float, *, device: str, full: bool = False) -> nn.Module:
    """What lies across a pooling does not grow in gromo."""
    from gromo.containers.vgg import VGG

    def config(width: float) -> list[str | int]:
        return [each for channels in channels_of_vgg(stages, width) for each in (channels, channels, "M")]

    options: dict[str, Any] = {"number_of_fc_layers": 1, "activation": nn.ReLU(), "input_spatial_shape": (32, 32)}
    options["growing_conv_type"] = convolution(full)
    return VGG(config(width), config(2 * width), num_classes=CLASSES, device=device, **options)


def resnet18(width: float, stages: int = 4, *, device: str, full: bool = False) -> nn.Module:
    from gromo.containers.resnet import init_full_resnet_structure

    model = init_full_resnet_structure(
        (3, 32, 32),
        out_features=CLASSES,
        reduction_factor=width,
        nb_stages=stages,
        use_preactivation=False,
        skip_first_downsample=False,
        growing_conv_type=convolution(full),
        device=device,
    )
    model.set_growing_layers(scheduling_method="all")
    return model


def encoder(layers: int, width: int, heads: int, hidden: int, device: str) -> nn.Module:
    """gromo has no Transformer; its blocks of two linear layers take the place of the feed-forward."""
    from gromo.containers.growing_block import LinearGrowingBlock
    from gromo.containers.sequential_growing_container import SequentialGrowingModel

    class GrowingEncoder(SequentialGrowingModel):
        def __init__(self) -> None:
            super().__init__(width, CLASSES, device)
            options: dict[str, Any] = {"mid_activation": nn.GELU(), "device": torch.device(device)}
            blocks = [
                LinearGrowingBlock(width, width, hidden, pre_activation=nn.LayerNorm(width), **options)
                for _ in range(layers)
            ]
            self.encoder = Encoder([EncoderLayer(width, heads, block) for block in blocks], width)
            self._growable_layers = list(blocks)
            self.set_growing_layers(scheduling_method="all")

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(x)

    return GrowingEncoder().to(device)


def load(model: Any, plain: nn.Module) -> nn.Module:
    """Give a container the weights and norms of the plain network, whose order is the same."""
    state = plain.state_dict()
    names = [k for k in model.state_dict() if "extended_" not in k and not k.startswith("stage_blocks")]
    model.load_state_dict(dict(zip(names, state.values(), strict=True)), strict=False)
    return model.eval()


def passes(model: nn.Module, batches: Batches) -> None:
    for x, y in batches:
        F.cross_entropy(model(x), y).backward()
    model.zero_grad()


def step(model: Any, batches: Batches, neurons: int) -> Found:
    """Statistics and updates of all layers that grow, which are then forgotten; fan-in, fan-out and update of each."""
    model.init_computation()
    for x, y in batches:
        F.cross_entropy(model(x), y).backward()
        model.update_computation()
    model.zero_grad()
    # gromo's threshold on singular values is absolute; without it each layer gets as many neurons.
    model.compute_optimal_updates(maximum_added_neurons=neurons, statistical_threshold=1e-12)
    found = [directions(layer) for layer in layers(model)]
    model.reset_computation()
    for layer in model._growing_layers:
        layer.delete_update()
    return found


def layers(model: Any) -> list[Any]:
    """What grows, in the order in which it runs."""
    blocks = [each for stage in getattr(model, "stages", ()) for each in stage if hasattr(each, "second_layer")]
    return [getattr(each, "second_layer", each) for each in blocks or model._growing_layers]


def directions(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Fan-in (K, p), fan-out (r·offsets, K) and best update (r, q), a bias last."""
    fan_out = layer.extended_input_layer.weight
    if "Restricted" in type(layer).__name__:
        fan_out = fan_out[..., fan_out.shape[2] // 2, fan_out.shape[3] // 2]
    fan_in, update = (
        torch.cat([side.weight.flatten(1), *([] if side.bias is None else [side.bias[:, None]])], 1).detach()
        for side in (layer.previous_module.extended_output_layer, layer.optimal_delta_layer)
    )
    return fan_in, fan_out.detach().movedim(1, -1).flatten(0, -2), update
