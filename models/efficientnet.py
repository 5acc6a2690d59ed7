"""The first eleven blocks of EfficientNet-Lite0 (Tan and Le 2019; the Lite variant has no squeeze-and-excite
and uses ReLU6), trained on ImageNet by its authors. Nothing in this project was trained with it or chosen by
it, so it measures images that the project's own networks rate too well.

The weights are weights/panel/efficientnet_lite0.safetensors; NOTICE there says where they come from and how
they were changed: every batch norm is folded into its convolution.
Read next: utils/panel.py"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from utils.precision import without_tf32

# one row per stage: expansion, output channels, kernel size, stride, number of blocks
STAGES = (1, 16, 3, 1, 1), (6, 24, 3, 2, 2), (6, 40, 5, 2, 2), (6, 80, 3, 2, 3), (6, 112, 5, 1, 3)


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's padding "SAME": with stride 2, one row more below than above."""

    def forward(self, x):
        total = self.kernel_size[0] - self.stride[0]       # for sides that the stride divides
        before, after = total // 2, total - total // 2
        return super().forward(F.pad(x, (before, after, before, after)))


class MBConv(nn.Module):
    """Inverted bottleneck (Sandler et al. 2018): 1x1 expansion, depthwise convolution, 1x1 projection."""

    def __init__(self, in_channels, channels, expansion, kernel_size, stride):
        super().__init__()
        hidden = expansion * in_channels
        self.expand = nn.Conv2d(in_channels, hidden, 1) if expansion > 1 else None
        self.depthwise = SameConv(hidden, hidden, kernel_size, stride, groups=hidden)
        self.project = nn.Conv2d(hidden, channels, 1)
        self.is_residual = stride == 1 and in_channels == channels

    def forward(self, x):
        """(B, C_in, h, w) -> (B, C, h / stride, w / stride)."""
        h = x if self.expand is None else F.relu6(self.expand(x))
        h = self.project(F.relu6(self.depthwise(h)))
        return x + h if self.is_residual else h


class EfficientNetLite0(nn.Module):
    """Images -> 112 features, the mean of the last map over all locations."""

    input_size = 64                                        # a side of 32 would leave a map of 2x2

    def __init__(self):
        super().__init__()
        self.stem = SameConv(3, 32, 3, 2)
        channels = 32
        self.blocks = nn.ModuleList()
        for expansion, out_channels, kernel_size, stride, num_blocks in STAGES:
            for i in range(num_blocks):
                self.blocks.append(MBConv(channels, out_channels, expansion, kernel_size, 1 if i else stride))
                channels = out_channels

    def forward(self, image):
        """(B, 3, H, W) in [-1, 1] -> (B, 112). The image is resized to 64 pixels a side (bilinear)."""
        size = self.input_size
        x = F.interpolate(image, (size, size), mode="bilinear", antialias=image.shape[-1] > size)
        x = F.relu6(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3))

    @torch.no_grad()
    def extract_features(self, images):
        """(N, 3, H, W) -> (N, 112), in batches."""
        with without_tf32():
            return torch.cat([self(chunk) for chunk in images.split(100)])
