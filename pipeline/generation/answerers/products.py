"""Makes the linear layers of a model compute faster while a block of code runs, where many rows pass through them.

Takes a transformers model; changes how its linear layers compute in float32 on a CPU, and nothing else.

Letters: M rows of a pass, I inputs and O outputs of a linear layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ...inference.kernels import FEWEST_WEIGHTS, Kernels, Product, differs


@contextmanager
def fast_products(model: nn.Module, *, pack: bool) -> Iterator[None]:
    """While this context lasts, the model's linear layers compute with oneDNN's kernel, which is up to twice as fast as
    torch's own for 64 rows and more.

    Nothing is timed, so that equal calls give equal results; and packed weights give the same numbers as others from
    two rows on, so that free memory does not matter to them. pack: copy the weights into oneDNN's own order, where the
    memory that is available is at least twice their size; the copies last as long as this context. A layer of a class
    of its own, such as an adapter or a quantised layer, computes as before, and hooks are called as before.
    """
    linears = [module for module in model.modules() if _is_worth_it(module)]
    products = [Product(linear.weight.t(), linear.bias) for linear in linears]
    kernels = Kernels(products, "repeatable", pack=pack)
    try:
        for linear, product in zip(linears, products, strict=True):
            linear.forward = _forward(kernels.fit(product))
        yield
    finally:
        for linear in linears:
            vars(linear).pop("forward", None)


def _is_worth_it(module: nn.Module) -> bool:
    """Whether this is torch's own linear layer with a large weight of its own, for which kernels differ, and computes
    what its class does."""
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    if type(module.weight) is not nn.Parameter or type(module.weight.data) is not Tensor:
        return False
    return module.weight.numel() >= FEWEST_WEIGHTS and differs(module.weight)


def _forward(product: Product):
    def forward(input: Tensor) -> Tensor:
        x_MI = input.reshape(-1, input.shape[-1])
        return product(x_MI).view(*input.shape[:-1], -1)

    return forward
