"""What a run of `moqa.quantize` has on the disk."""

from moqa.methods import Method
from moqa.models.view import ModelView
from moqa.plan import Plan
from moqa.profile import Profile
from moqa.quantize.cache import parse_cache
from moqa.quantize.flow import tokens_of


def disk_bytes(view: ModelView, plan: Plan, profile: Profile, method: Method, cache: str | None) -> int:
    """Bytes on the disk at the fullest moment: checkpoint, cache and what is put aside.

    >>> disk_bytes(view, plan, profile, METHODS["gptq"], None)
    63254528

    Args:
        view: the original model.
        plan: scheme of every unit.
        profile: the plan's, for the number of samples.
        method: only one that needs data puts anything aside.
        cache: as for `moqa.quantize`.
    """
    kept = 0
    if cache is not None:
        share = parse_cache(cache)
        kept = round(sum(view.stored_bytes(unit) for unit in view.units.values()) * (1.0 if share is None else share))
    tokens = tokens_of(plan, profile) if method.needs_data else 0
    # hidden states before and behind a layer, and what its experts are called with
    put_aside = 3 * tokens * view.stream * 4
    return plan.account.checkpoint + kept + put_aside


def layer_bytes(view: ModelView, plan: Plan) -> int:
    """Bytes of the largest decoder layer as a plan stores it.

    >>> layer_bytes(view, plan)
    2097152
    """
    found = [0] * len(view.layers)
    for unit in view.units.values():
        found[unit.layer] += plan.units[unit.name].stored_bytes(unit.shape)
    return max(found)
