"""Muon: for matrices a step in which every direction counts the same, and Adam for all the rest.

The momentum of a matrix is replaced by the nearest orthogonal one, with a few steps of a polynomial iteration
(K. Jordan et al., 2024, https://kellerjordan.github.io/posts/muon). The codec and the base model of the
picture book need about half as many steps with it as with AdamW, and two CPU cores need that. Concepts are
learned with AdamW, as in the paper.
"""

import torch
from torch import Tensor, nn


def orthogonal(matrices: Tensor) -> Tensor:
    """Nearly the nearest orthogonal matrices, [K, m, n] -> [K, m, n]: singular values of about .7 to 1.2."""
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.mT).mT
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    identity = torch.eye(x.shape[1], device=x.device)
    product, gram = identity, x @ x.mT           # the iteration needs no more than the small matrix x x^T
    for _ in range(5):
        polynomial = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
        product, gram = polynomial @ product, polynomial @ gram @ polynomial
    return product @ x


class Muon(torch.optim.Optimizer):
    """Args:
        module: its matrices and convolutions take Muon's step, of size `matrix_lr`. What needs no gradient
            stays as it is.
        by_adam: parameters whose names contain one of these take Adam's step all the same: a model's first
            and last layers, and embeddings. So does everything with less than two dimensions.
    """

    def __init__(self, module: nn.Module, lr: float, matrix_lr: float, by_adam: tuple[str, ...] = ()):
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        matrices = [p for name, p in named if p.ndim > 1 and not any(part in name for part in by_adam)]
        chosen = set(map(id, matrices))
        others = [p for _, p in named if id(p) not in chosen]
        groups = [{"params": matrices, "lr": matrix_lr, "full_lr": matrix_lr, "by_adam": False},
                  {"params": others, "lr": lr, "full_lr": lr, "by_adam": True}]
        super().__init__(groups, {})

    def scale_rates(self, share: float) -> None:
        """Sets both rates to a share of what they were made with, as a schedule wants it."""
        for group in self.param_groups:
            group["lr"] = share * group["full_lr"]

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            update = adam_step if group["by_adam"] else muon_step
            update(group["params"], self.state, group["lr"])


def adam_step(parameters: list[Tensor], state: dict, lr: float, betas=(.9, .99), eps: float = 1e-8) -> None:
    for parameter in parameters:
        own = state[parameter]
        if not own:
            own["step"] = torch.zeros(())
            own["mean"], own["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        own["step"] += 1
        own["mean"].lerp_(parameter.grad, 1 - betas[0])
        own["square"].lerp_(parameter.grad ** 2, 1 - betas[1])
        mean = own["mean"] / (1 - betas[0] ** own["step"].item())
        square = own["square"] / (1 - betas[1] ** own["step"].item())
        parameter.sub_(lr * mean / (square.sqrt() + eps))


def muon_step(parameters: list[Tensor], state: dict, lr: float, momentum: float = .95) -> None:
    alike = {}                                   # shape -> the parameters of that shape, done in one batch
    for parameter in parameters:
        own = state[parameter]
        if not own:
            own["mean"] = torch.zeros_like(parameter)
        own["mean"].lerp_(parameter.grad, 1 - momentum)
        ahead = parameter.grad.lerp(own["mean"], momentum).flatten(1).float()
        alike.setdefault(ahead.shape, []).append((parameter, ahead))
    for (rows, columns), pairs in alike.items():
        updates = orthogonal(torch.stack([ahead for _, ahead in pairs]))
        for (parameter, _), update in zip(pairs, updates):
            parameter.sub_(update.view_as(parameter), alpha=lr * max(1, rows / columns) ** .5)
