"""The convolutional network that turns source images into feature maps (IBRNet's ResUNet, as GNT uses it)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftadd3d._errors import UserError

#: The smallest image side the network takes: three halvings must leave two pixels for the reflecting padding.
MIN_IMAGE_SIDE = 32


def _norm(channels: int) -> nn.InstanceNorm2d:
    return nn.InstanceNorm2d(channels, affine=True, track_running_stats=False)


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False, padding_mode="reflect")


class BasicBlock(nn.Module):
    """The two-convolution residual block of ResNet-18/34, with instance norm."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.bn1 = _norm(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.bn2 = _norm(out_channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), _norm(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + identity)


class ConvBlock(nn.Module):
    """3x3 convolution, instance norm, ELU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, padding_mode="reflect")
        self.bn = _norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(self.bn(self.conv(x)))


class UpConvBlock(nn.Module):
    """Twice the resolution by bilinear interpolation, then a `ConvBlock`."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = ConvBlock(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True))


def _concat_skip(x: Tensor, skip: Tensor) -> Tensor:
    """`x` and `skip` on the channel axis, `skip` padded or cropped to fit: odd sizes do not double exactly."""
    dy, dx = x.shape[-2] - skip.shape[-2], x.shape[-1] - skip.shape[-1]
    return torch.cat([x, F.pad(skip, (dx // 2, dx - dx // 2, dy // 2, dy - dy // 2))], dim=1)


class ResUNet(nn.Module):
    """A ResNet encoder with a two-step decoder: images to feature maps at a quarter of the resolution.

    The module tree and parameter names are those of GNT's released code, so that its checkpoints load by name; the
    defaults are its sizes (the first three stages of ResNet-34, 8.9 M parameters). The smaller presets pass smaller
    `widths` and `blocks`.

    Args:
        coarse_dim: channels of the feature map for the coarse network.
        fine_dim: channels of a second map for the fine network; 0 when one network serves both.
        widths: channels of the three encoder stages; the stem has `widths[0]`.
        blocks: residual blocks in each stage.
    """

    def __init__(
        self,
        coarse_dim: int = 32,
        fine_dim: int = 0,
        widths: Sequence[int] = (64, 128, 256),
        blocks: Sequence[int] = (3, 4, 6),
    ) -> None:
        super().__init__()
        self.coarse_dim, self.fine_dim = coarse_dim, fine_dim
        w1, w2, w3 = widths
        out_dim = coarse_dim + fine_dim
        self.conv1 = nn.Conv2d(3, w1, 7, stride=2, padding=3, bias=False, padding_mode="reflect")
        self.bn1 = _norm(w1)
        self.layer1 = self._stage(w1, w1, blocks[0])
        self.layer2 = self._stage(w1, w2, blocks[1])
        self.layer3 = self._stage(w2, w3, blocks[2])
        self.upconv3 = UpConvBlock(w3, w2)
        self.iconv3 = ConvBlock(2 * w2, w2)
        self.upconv2 = UpConvBlock(w2, w1)
        self.iconv2 = ConvBlock(2 * w1, out_dim)
        self.out_conv = nn.Conv2d(out_dim, out_dim, 1)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, blocks: int) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, stride=2)
        return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, stride=1) for _ in range(blocks - 1)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Feature maps of a batch of images.

        Args:
            images: [V, 3, H, W], 0..1.

        Returns:
            the maps for the coarse and for the fine network, [V, coarse_dim, H/4, W/4] and [V, fine_dim, H/4, W/4]; the
            same tensor twice when there is one network.

        Raises:
            UserError: an image side under `MIN_IMAGE_SIDE`.
        """
        height, width = images.shape[-2:]
        if min(height, width) < MIN_IMAGE_SIDE:
            raise UserError(
                f"source images of {width}x{height} px are too small for the feature network: "
                f"each side must have at least {MIN_IMAGE_SIDE} px"
            )
        x = F.relu(self.bn1(self.conv1(images)))
        x1 = self.layer1(x)
        x2 = self.layer2(x1)
        x3 = self.layer3(x2)
        x = self.iconv3(_concat_skip(self.upconv3(x3), x2))
        x = self.iconv2(_concat_skip(self.upconv2(x), x1))
        x = self.out_conv(x)
        if self.fine_dim == 0:
            return x, x
        return x[:, : self.coarse_dim], x[:, self.coarse_dim :]
