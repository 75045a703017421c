"""What several networks share: checking the input shape and initialising weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from sparsepipe.errors import ModelError


def image_shape(name: str, input_shape: Sequence[int], smallest: int = 1) -> tuple[int, int, int]:
    """`input_shape` as (channels, height, width).

    Args:
        name: the network, for the message.
        input_shape: shape of one sample.
        smallest: smallest height and width that the network can take, in pixels.

    Raises:
        ModelError: the samples are not images, or are too small.
    """
    if len(input_shape) != 3:
        raise ModelError(
            f"This network takes images (channels, height, width), but one sample has the shape {tuple(input_shape)}.",
            where=name,
            advice="Choose a network for features, such as mlp, or a dataset of images.",
        )
    channels, height, width = input_shape
    if min(height, width) < smallest:
        raise ModelError(
            f"This network needs images of at least {smallest}x{smallest} pixels; these have {height}x{width}.",
            where=name,
            advice="Choose a smaller network (sparsepipe models) or larger images.",
        )
    return channels, height, width


def initialise(network: nn.Module) -> None:
    """Set fresh weights: convolutions He-normal over the fan-out, linear layers N(0, 0.01), norms to the identity.

    This is the initialisation of the public code for sparse training on CIFAR (GraNet, RigL); the variance of the
    convolutions is that of He et al., arXiv 1502.01852, equation 14.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            nn.init.zeros_(bias)
