"""Mixed precision for policies that turn pictures and an instruction into actions of a robot (EaqVLA).

MetaWorld and its renderer (`pip install 'moqa[vla]'`) are imported when a rollout begins.
"""

from typing import TYPE_CHECKING

from moqa.lazy import lazily

if TYPE_CHECKING:
    from moqa.vla.allocate import plan_policy
    from moqa.vla.apply import quantize_policy
    from moqa.vla.measure import profile_policy
    from moqa.vla.run import rollout
else:
    __getattr__, __dir__ = lazily(__name__, __file__)

__all__ = ["plan_policy", "profile_policy", "quantize_policy", "rollout"]
