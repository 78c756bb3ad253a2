"""int8 weights for inference.py and evaluate.py: `--quantize int8`."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.errors import UserError


class Int8Linear(nn.Module):
    """A linear layer with int8 weights from -127 to 127 and one scale per row.

    A quarter of the memory traffic, which bounds decoding one token at a time. Like LLM.int8()
    (arxiv.org/abs/2208.07339), but of the weights only. PyTorch's kernel replaces
    `F.linear(x, weight.float() * scale.float()[:, None])` when x has one token per row.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()  # (outputs, inputs)
        largest = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        scale = (largest / 127).bfloat16()  # (outputs,), the dtype that the kernel takes
        rounded = (weight / scale[:, None]).round().clamp(-127, 127)
        self.register_buffer("weight", rounded.to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """`(..., inputs)` to `(..., outputs)`, in float32."""
        if x.size(-2) == 1:  # decoding: a row's result does not depend on the other rows
            # Private to PyTorch (read from 2.13). Dequantizing first takes 3 times as long.
            y = torch._weight_int8pack_mm(x.flatten(0, -2).bfloat16(), self.weight, self.scale)
            y = y.float().view(*x.shape[:-1], -1)
        else:  # a prompt: dequantize the weights once for all of it
            y = F.linear(x, self.weight.float() * self.scale.float()[:, None])
        return y if self.bias is None else y + self.bias


def quantize(model: nn.Module) -> None:
    """Replace the linear layers of `model.blocks` by `Int8Linear`, in place.

    Raises `UserError` if PyTorch or the device has no kernel for them.
    """
    device = next(model.parameters()).device
    if device.type != "cpu" or not hasattr(torch, "_weight_int8pack_mm"):
        raise UserError(f"--quantize int8 needs a CPU, and this model is on {device.type}")
    for module in model.blocks.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
