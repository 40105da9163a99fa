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
        matrices, others = [], []
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                adam = parameter.ndim < 2 or any(part in name for part in by_adam)
                (others if adam else matrices).append(parameter)
        self.full_rates = matrix_lr, lr
        super().__init__([{"params": matrices, "lr": matrix_lr}, {"params": others, "lr": lr}], {})
        for parameter in matrices + others:
            self.state[parameter]["mean"] = torch.zeros_like(parameter)
        for parameter in others:
            self.state[parameter] |= {"square": torch.zeros_like(parameter), "step": torch.zeros(())}

    def scale_rates(self, share: float) -> None:
        """Sets both rates to a share of what they were made with, as a schedule wants it."""
        for group, rate in zip(self.param_groups, self.full_rates):
            group["lr"] = share * rate

    @torch.no_grad()
    def step(self) -> None:
        for group, update in zip(self.param_groups, (muon_step, adam_step)):
            parameters = group["params"]
            update(parameters, [p.grad for p in parameters], [self.state[p] for p in parameters], group["lr"])


def adam_step(parameters: list[Tensor], gradients: list[Tensor], states: list[dict], lr: float,
              betas=(.9, .99), eps: float = 1e-8) -> None:
    means, squares, steps = ([state[name] for state in states] for name in ("mean", "square", "step"))
    torch._foreach_add_(steps, 1)
    step = steps[0].item()                       # all parameters have taken the same number of steps
    torch._foreach_lerp_(means, gradients, 1 - betas[0])
    torch._foreach_lerp_(squares, torch._foreach_mul(gradients, gradients), 1 - betas[1])
    below = torch._foreach_sqrt(torch._foreach_div(squares, 1 - betas[1] ** step))
    torch._foreach_add_(below, eps)
    torch._foreach_addcdiv_(parameters, means, below, -lr / (1 - betas[0] ** step))


def muon_step(parameters: list[Tensor], gradients: list[Tensor], states: list[dict], lr: float,
              momentum: float = .95) -> None:
    means = [state["mean"] for state in states]
    torch._foreach_lerp_(means, gradients, 1 - momentum)
    ahead = torch._foreach_lerp(gradients, means, momentum)
    for shape in dict.fromkeys(parameter.shape for parameter in parameters):     # one batch for each shape
        alike = [n for n, parameter in enumerate(parameters) if parameter.shape == shape]
        matrices = torch.stack([ahead[n] for n in alike]).flatten(2)             # [K, m, n]
        rows, columns = matrices.shape[1:]
        updates = list(orthogonal(matrices.float()).view(len(alike), *shape))
        torch._foreach_add_([parameters[n] for n in alike], updates, alpha=-lr * max(1, rows / columns) ** .5)
