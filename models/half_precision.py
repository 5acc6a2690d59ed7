"""Weights in half precision, beside calls that are computed in fp32.

Autocast casts weights and inputs alike. Outside of it torch wants a layer's weights and its input to have one
type, and weights may be in half precision to save memory, or because FSDP has gathered them so.
Read next: models/stable_diffusion.py"""

import torch
import torch.nn as nn
import torch.nn.functional as F


def run_in_fp32(layer):
    """Make a layer compute in fp32 under autocast as well. Meant for the network's output layer: at t = T - 1
    an eps-model's error is multiplied by about 15 in x0, so bf16 rounding would be visible noise."""
    class FP32Layer(type(layer)):
        def forward(self, x):
            with torch.autocast(x.device.type, enabled=False):
                return super().forward(x.float())
    layer.__class__ = FP32Layer


def accept_fp32_inputs(network, output_layer):
    """Make the layers of a network cast half precision weights to fp32 where their input is fp32. Linear
    layers and convolutions under autocast need nothing; the output layer is in fp32 itself."""
    for module in list(network.modules()):
        for layer_cls in (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm):
            if isinstance(module, layer_cls) and module is not output_layer and not is_casting(module):
                cast_half_weights(module, layer_cls)


def cast_text_encoders(encoders):
    """CLIP to fp16, which is the more precise; T5 to bf16, since fp16 overflows in it. A GPU without bf16
    computes it all the same, slowly."""
    for encoder in encoders:
        encoder.to(torch.bfloat16 if type(encoder).__name__.startswith("T5") else torch.float16)


def is_casting(layer):
    return type(layer).__name__ == "CastLayer"


def cast_half_weights(layer, layer_cls):
    """Swap the layer's class for one that does so."""
    has_autocast = layer_cls in (nn.Linear, nn.Conv2d)

    class CastLayer(type(layer)):
        def forward(self, x):
            is_mixed = self.weight is not None and self.weight.dtype != x.dtype == torch.float32
            if not is_mixed or has_autocast and torch.is_autocast_enabled(x.device.type):
                return super().forward(x)
            weight = self.weight.float()
            bias = None if self.bias is None else self.bias.float()
            if layer_cls is nn.Linear:
                return F.linear(x, weight, bias)
            if layer_cls is nn.Conv2d:
                return self._conv_forward(x, weight, bias)
            if layer_cls is nn.GroupNorm:
                return F.group_norm(x, self.num_groups, weight, bias, self.eps)
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
    layer.__class__ = CastLayer


def cast_frozen_weights(network, dtype, output_layer):
    """Cast the frozen weights of linear layers and convolutions, nearly all there are. The output layer and
    trainable weights stay fp32."""
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module is not output_layer:
            for param in module.parameters(recurse=False):
                if not param.requires_grad:
                    param.data = param.data.to(dtype)
