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
    gradients = [parameter.grad for parameter in parameters]
    means, squares = ([state[parameter][name] for parameter in parameters] for name in ("mean", "square"))
    step = state[parameters[0]]["step"].item()   # all parameters have taken the same number of steps
    torch._foreach_lerp_(means, gradients, 1 - betas[0])
    torch._foreach_lerp_(squares, torch._foreach_mul(gradients, gradients), 1 - betas[1])
    below = torch._foreach_sqrt(torch._foreach_div(squares, 1 - betas[1] ** step))
    torch._foreach_add_(below, eps)
    torch._foreach_addcdiv_(parameters, means, below, -lr / (1 - betas[0] ** step))


def muon_step(parameters: list[Tensor], state: dict, lr: float, momentum: float = .95) -> None:
    alike = {}                                   # shape -> the parameters of that shape, done in one batch
    for parameter in parameters:
        own = state[parameter]
        if not own:
            own["mean"] = torch.zeros_like(parameter)
        alike.setdefault(parameter.shape, []).append(parameter)
    for shape, some in alike.items():
        means, gradients = [state[parameter]["mean"] for parameter in some], [p.grad for p in some]
        torch._foreach_lerp_(means, gradients, 1 - momentum)
        ahead = torch.stack(torch._foreach_lerp(gradients, means, momentum)).flatten(2)  # [K, m, n]
        rows, columns = ahead.shape[1:]
        updates = orthogonal(ahead.float()).view(len(some), *shape)
        torch._foreach_add_(some, list(updates), alpha=-lr * max(1, rows / columns) ** .5)
