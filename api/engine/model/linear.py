"""Weight matrices in the form that multiplies fastest on their device."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
import torch.nn.functional as F

from api.engine.process import release_freed_memory

# What a panel of api/engine/kernels/products.h is made of: features, and inputs multiplied at once.
PANEL, PAIR = 32, 2


class Linear:
    """y = x W^T + b; `gated`: silu(first half of y) * second half.

    On the CPU the weights are packed once for oneDNN, which `F.linear` would do at every call (measured on 2 cores,
    8192 x 1024, bf16: 2.8 times as fast for one row, 1.9 times for 16), or for the compiled products.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, gated: bool = False) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else bias.detach().contiguous()
        self._gated = gated
        weight = weight.detach().contiguous()
        self._weight: torch.Tensor | None = _reordered(weight)
        self.panels: torch.Tensor | None = None  # once it is packed

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight = self._weight  # read first: it goes when the panels are there
        if weight is None:
            if self._gated:
                return torch.ops.glm.gated_product(x, self.panels)
            return torch.ops.glm.product(x, self.panels, self.bias)
        if weight.is_mkldnn:
            y = torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, "none", [], "")
        else:
            y = F.linear(x, weight, self.bias)
        if not self._gated:
            return y
        gate, up = y.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def pack(self) -> None:
        """Use the compiled products from now on, also while another thread multiplies."""
        if self._weight is None or self.out_features % PANEL or self.in_features % PAIR:
            return
        plain = self._weight.to_dense() if self._weight.is_mkldnn else self._weight
        self.panels = torch.ops.glm.pack(plain, self._gated)
        self._weight = None


def pack_all(linears: Iterable[Linear]) -> None:
    """One by one, and what each had before is given back, or all weights would be there twice."""
    for linear in linears:
        linear.pack()
        release_freed_memory()


@cache
def has_onednn(device_type: str, dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies numbers of this kind on this device."""
    if device_type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def _reordered(weight: torch.Tensor) -> torch.Tensor:
    if not has_onednn(weight.device.type, weight.dtype):
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight)
