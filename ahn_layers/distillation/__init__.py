"""Self-distillation: the memory of a frozen model learns to answer as the model with full attention does.

arXiv 2510.07318, section 3.3. These are pieces; the loop is that of transformers
([`DistillationTrainer`][ahn_layers.distillation.DistillationTrainer]) or yours.
"""

from typing import TYPE_CHECKING, Any

from ..missing import needs_transformers
from .alignment import align_layers
from .budgets import Budgets
from .calibration import calibrate
from .compiling import compile_layers
from .copying import repeat_spans
from .hidden_states import output_head
from .keeping import set_rates, set_slots, settle_rates
from .loss import sliced_loss
from .passes import DistillationLoss, arm_losses, distillation_loss, freeze_base, gap_closed
from .retention import learn_scores, retrieval_heads, salient_slots, soft_slots
from .windows import sample_window, use_window

if TYPE_CHECKING:
    from .trainer import DistillationTrainer

__all__ = [
    "Budgets",
    "DistillationLoss",
    "DistillationTrainer",
    "align_layers",
    "arm_losses",
    "calibrate",
    "compile_layers",
    "distillation_loss",
    "freeze_base",
    "gap_closed",
    "learn_scores",
    "output_head",
    "repeat_spans",
    "retrieval_heads",
    "salient_slots",
    "set_rates",
    "set_slots",
    "settle_rates",
    "soft_slots",
    "sample_window",
    "sliced_loss",
    "use_window",
]


def __getattr__(name: str) -> Any:
    if name == "DistillationTrainer":  # needs transformers, which the rest does not
        try:
            from .trainer import DistillationTrainer
        except ImportError as error:
            raise needs_transformers(name) from error
        return DistillationTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
