"""VGG-19 with batch normalisation for CIFAR-sized images (Simonyan and Zisserman, arXiv 1409.1556)."""

from __future__ import annotations

from torch import Tensor, nn

from sparsepipe.models.common import image_shape, initialise

_STAGES = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))


class VGG(nn.Module):
    """Five stages of 3x3 convolutions with max-pooling between them, average pooling, one linear layer."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, (width, count) in enumerate(_STAGES):
            if number:
                layers.append(nn.MaxPool2d(2))
            for _ in range(count):
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)]
                channels = width
        self.features = nn.Sequential(*layers)
        # Over the 2x2 map of a 32x32 image this is the AvgPool2 of the CIFAR variant; other sizes work as well.
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes] of images [n, C, H, W]."""
        logits: Tensor = self.classifier(self.pool(self.features(x)).flatten(1))
        return logits


def vgg19(*, input_shape: tuple[int, ...], classes: int) -> VGG:
    """VGG-19 with batch normalisation; images of 16x16 pixels or more."""
    channels, _, _ = image_shape("vgg19", input_shape, smallest=2 ** (len(_STAGES) - 1))
    return VGG(channels, classes)
