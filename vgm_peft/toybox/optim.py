"""Muon for matrices and convolutions, Adam for all else, in one optimiser.

Muon (K. Jordan et al., 2024): the momentum of each weight matrix is replaced by its nearest orthogonal matrix, found by
a few Newton-Schulz iterations, before it is applied. On small convolutional nets it needs fewer steps than Adam.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046))
"""Coefficients a, b, c of X <- a X + (b A + c A A) X with A = X X^T, one row an iteration."""


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrices, roughly, of a stack (N, R, C).

    The iteration runs on the small Gram matrix: every X_k is P_k X_0 with P_k a polynomial in X_0 X_0^T.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) * 1.01 + 1e-7)
    gram = x @ x.transpose(1, 2)
    product = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    for a, b, c in _NEWTON_SCHULZ:
        square = product @ gram @ product
        factor = torch.baddbmm(b * square, square, square, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor @ product
    x = product @ x
    return x.transpose(1, 2) if tall else x


class MuonAdam(torch.optim.Optimizer):
    """Muon on the parameters of the first list, Adam on the second; each has its own rate, scaled by `factor`."""

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        matrix_rate: float = 0.02,
        other_rate: float = 2e-3,
        momentum: float = 0.95,
    ) -> None:
        groups = [
            {"params": list(matrices), "base": matrix_rate, "muon": True},
            {"params": list(others), "base": other_rate, "muon": False},
        ]
        super().__init__(groups, {"lr": 1.0})
        self.factor = 1.0
        self._momentum = momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Apply one update."""
        for group in self.param_groups:
            parameters: list[nn.Parameter] = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                self._muon(parameters, group["base"] * self.factor)
            else:
                self._adam(parameters, group["base"] * self.factor)

    def _muon(self, parameters: list[nn.Parameter], rate: float) -> None:
        alike: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in parameters:
            alike.setdefault(parameter.shape, []).append(parameter)
        for shape, members in alike.items():
            moved: list[Tensor] = []
            for parameter in members:
                gradient = parameter.grad
                assert gradient is not None
                slot = self.state[parameter]
                if "momentum" not in slot:
                    slot["momentum"] = torch.zeros_like(gradient)
                slot["momentum"].lerp_(gradient, 1 - self._momentum)
                moved.append(gradient.lerp(slot["momentum"], self._momentum).flatten(1))
            changes = orthogonalise(torch.stack(moved))
            rows, columns = changes.shape[1:]
            scale = rate * max(1.0, rows / columns) ** 0.5
            for parameter, change in zip(members, changes, strict=True):
                parameter.add_(change.reshape(shape), alpha=-scale)

    def _adam(self, parameters: list[nn.Parameter], rate: float) -> None:
        for parameter in parameters:
            gradient, slot = parameter.grad, self.state[parameter]
            assert gradient is not None
            if "step" not in slot:
                slot.update(step=torch.zeros(()), first=torch.zeros_like(gradient), second=torch.zeros_like(gradient))
            slot["step"] += 1
            count = float(slot["step"])
            slot["first"].lerp_(gradient, 0.1)
            slot["second"].mul_(0.99).addcmul_(gradient, gradient, value=0.01)
            scale = (slot["second"] / (1 - 0.99**count)).sqrt_().add_(1e-8)
            parameter.addcdiv_(slot["first"], scale, value=-rate / (1 - 0.9**count))


def muon_for(model: nn.Module, matrix_rate: float, other_rate: float, skip: tuple[str, ...] = ()) -> MuonAdam:
    """Muon on the model's weights of two or more dimensions, save those whose name holds a `skip`; Adam on the rest."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    chosen = {n for n, p in named if p.ndim >= 2 and not any(part in n for part in skip)}
    matrices = [p for n, p in named if n in chosen]
    return MuonAdam(matrices, [p for n, p in named if n not in chosen], matrix_rate, other_rate)
