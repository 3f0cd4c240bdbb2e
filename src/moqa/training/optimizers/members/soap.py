"""`soap`: Adam in the directions in which gradients of a matrix vary."""

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from moqa.errors import MoqaError
from moqa.training.optimizers.registry import optimizer

try:
    from pytorch_optimizer import SOAP
except ImportError:
    raise MoqaError("--optimizer soap needs the package pytorch-optimizer", "pip install 'moqa[optimizers]'") from None

_BETA = 0.95
# a longer side has no directions of its own: they are a square matrix, which would be larger than the unit itself
_LONGEST = 256


@optimizer("soap")
def soap(parameters: Sequence[nn.Parameter], rate: float) -> list[Optimizer]:
    """SOAP (arXiv 2409.11321): Adam in the eigenvectors of Shampoo, of sides up to 256; Adam for vectors."""
    return [SOAP(parameters, lr=rate, betas=(_BETA, _BETA), weight_decay=0.0, max_precondition_dim=_LONGEST)]
