"""One value per channel: scaling the rows of a weight, which is scaling the layer's own product.

Mathematics for the methods of this room whose dW is diag(v) W.
"""

import torch
from torch import Tensor

from vgm_peft.delta import Call, along_outputs
from vgm_peft.site import Site


def along_rows(vector: Tensor, weight: Tensor) -> Tensor:
    """Return (O,) in the shape that broadcasts over the rows of `weight` (O, ...)."""
    return vector.view(-1, *[1] * (weight.dim() - 1))


def add_scaled_rows(output: Tensor, call: Call, site: Site, vector: Tensor, strength: float) -> Tensor:
    """Return `output` + strength * diag(vector) W x, from the product W x that the layer has made anyway."""
    product = call.product(site).to(output.dtype)
    return torch.addcmul(output, product, along_outputs(vector.to(output.dtype), call.x, call.layer), value=strength)
