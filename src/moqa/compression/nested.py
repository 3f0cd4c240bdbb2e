"""What `--widths-nested` means for the other options of `moqa.compress`."""

from dataclasses import replace

from moqa.compression.options import DEFAULTS, CompressOptions
from moqa.errors import MoqaError
from moqa.format.scheme import DEFAULT_ENCODING
from moqa.planning import Budget
from moqa.planning.registry import PLAIN
from moqa.quantization.nested import check_widths


def nested_options(options: CompressOptions, budget: Budget | str | None) -> CompressOptions:
    """Options as they are used: of nested widths, a uniform plan of integers of the widest, without a proof.

    >>> nested_options(CompressOptions(widths_nested=(2, 8)), None).widths
    (8,)

    A proof would compare the widest width with the same uniform plan.

    Raises:
        MoqaError: if another option or the budget contradicts the widths.
    """
    if not options.widths_nested:
        return options
    typed = check_widths(options.widths_nested)
    if budget is not None:
        size = budget if isinstance(budget, str) else budget.typed
        raise MoqaError(f"{typed} has a size of its own", f"leave out {size}")
    uniform = replace(options, widths=(max(options.widths_nested),), encodings=(DEFAULT_ENCODING,), strategy=PLAIN)
    for name in ("strategy", "widths", "encodings"):
        given = getattr(options, name)
        if given not in (getattr(DEFAULTS, name), getattr(uniform, name)):
            given = given if isinstance(given, str) else ",".join(map(str, given))
            raise MoqaError(f"{typed} gives all units one width of integers", f"leave out --{name} {given}")
    if options.recover is not None:
        raise MoqaError(f"{typed} cannot be trained", f"leave out --recover {options.recover}")
    return replace(uniform, proof=False)
