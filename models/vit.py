"""ViT-tiny: a vision transformer (Dosovitskiy et al., arXiv 2010.11929) in the size of DeiT-tiny (arXiv 2012.12877).

Attention is written with explicit linear layers over flat tokens, so that every weight keeps its name and layout in an
ONNX graph.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsepipe.errors import ModelError
from sparsepipe.models.common import image_shape


class Attention(nn.Module):
    """Multi-head self-attention over flat tokens [n * tokens, width]."""

    def __init__(self, tokens: int, width: int, heads: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.width = width
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(x).reshape(-1, self.tokens, 3 * self.heads, self.width // self.heads)
        q, k, v = split.transpose(1, 2).chunk(3, dim=1)  # each [n, heads, tokens, width / heads]
        mixed = functional.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.proj(mixed.transpose(1, 2).reshape(-1, self.width))
        return result


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a norm and beside a shortcut."""

    def __init__(self, tokens: int, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(tokens, width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        result: Tensor = x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))
        return result


class ViT(nn.Module):
    """Patches as tokens behind a class token, `depth` blocks, a linear head on the class token."""

    def __init__(
        self, shape: tuple[int, int, int], classes: int, patch: int, width: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        channels, rows, columns = shape
        self.tokens = 1 + (rows // patch) * (columns // patch)
        self.width = width
        self.patch_embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.tokens, width))
        self.blocks = nn.Sequential(*[Block(self.tokens, width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)
        for parameter in self.parameters():
            if parameter.ndim >= 2:
                nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes] of images [n, C, H, W]."""
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        # Over flat tokens every linear layer is one matrix product, and in ONNX a Gemm on the weight as it is stored.
        x = self.blocks(x.reshape(-1, self.width)).reshape(-1, self.tokens, self.width)
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits


def vit_tiny(
    *,
    input_shape: tuple[int, ...],
    classes: int,
    patch: int | None = None,
    width: int = 192,
    depth: int = 12,
    heads: int = 3,
) -> ViT:
    """ViT of `depth` blocks, `width` channels and `heads` heads.

    `patch` is the side of a patch in pixels; None takes the largest of 16 (images from 128 pixels), 4, 2, 1 that
    divides both sides and leaves at least 4x4 patches.

    Raises:
        ModelError: the patch does not divide the image, or the heads do not divide the width.
    """
    channels, rows, columns = image_shape("vit-tiny", input_shape)
    side = min(rows, columns)
    if patch is None:
        fitting = [size for size in (16, 4, 2, 1) if rows % size == 0 and columns % size == 0]
        patch = next((size for size in fitting if side >= (128 if size == 16 else 4 * size)), 1)
    if patch < 1 or rows % patch or columns % patch:
        raise ModelError(
            f"A patch of {patch} pixels does not divide images of {rows}x{columns}.",
            where="vit-tiny",
            advice=f"Use one of: {', '.join(str(n) for n in range(1, side + 1) if rows % n == 0 == columns % n)}.",
        )
    if heads < 1 or width % heads or depth < 1:
        raise ModelError(
            f"width = {width}, depth = {depth} and heads = {heads} do not fit together.",
            where="vit-tiny",
            advice="The width must be a multiple of the heads, and the depth at least 1.",
        )
    return ViT((channels, rows, columns), classes, patch, width, depth, heads)
