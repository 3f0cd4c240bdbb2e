"""Seconds that work will take, from the rates of a trial."""

from collections.abc import Collection

from moqa.forecast.rates import BlockRates, Rates


def quantization_seconds(
    rates: Rates, tokens: int, kept: int, together: int, *, ahead: bool = False, whole: bool = False
) -> float:
    """Seconds of a run of `moqa.quantize`.

    >>> quantization_seconds(rates, tokens=16384, kept=4_500_000, together=16)
    7.31

    Args:
        rates: of the model and the method.
        tokens: of samples; 0 for a method that needs none.
        kept: bytes that are written unchanged.
        together: experts whose statistics are held together.
        ahead: whether layers are read and written beside other work.
        whole: whether the original is in memory.
    """
    blocks, seconds = rates.each(), 0.0
    for number, block in enumerate(blocks):
        of, slices = block.quantization, -(-block.experts // together)
        work = of.linear + block.experts * of.solve
        if tokens:
            work += of.inputs.of(tokens) + slices * of.calls.of(tokens) + block.experts * of.expert.of(tokens)
            # nothing follows the last layer
            work += of.advance.of(tokens) if number + 1 < len(blocks) else 0.0
        reading = 0.0 if whole else _reading(rates, block)
        if ahead:
            beside = (block.file.read_work + block.file.write_work) / rates.cores
            seconds += max(reading + block.file.write, work + beside)
        else:
            seconds += reading + work + block.file.write
    ends = 0.0 if whole else rates.ends
    return seconds + ends + rates.embed.of(tokens) + kept * _written(rates)


def profile_seconds(
    rates: Rates, tokens: Collection[int], steps: int, together: int, *, sensitivity: bool = True, whole: bool = False
) -> float:
    """Seconds of a run of `moqa.profile`.

    Args:
        rates: of the model.
        tokens: of each distribution, the model's own text included.
        steps: in which the model writes its own text.
        together: experts whose errors are held together.
        sensitivity: whether it is measured.
        whole: whether the original is in memory.
    """
    seconds, everything = rates.embed.of(sum(tokens)), sum(tokens)
    ends = 0.0 if whole else rates.ends
    for block in rates.each():
        of, slices = block.profile, max(1, -(-block.experts // together))
        reading = 0.0 if whole else _reading(rates, block)
        seconds += reading + of.weights + steps * (reading + of.step)
        seconds += sum(of.forward.of(count) for count in tokens)
        if sensitivity:
            seconds += reading
            for count in tokens:
                seconds += of.back.of(count) + (slices - 1) * of.back_slice.of(count)
                seconds += block.experts * of.back_expert.of(count)
    if sensitivity:
        seconds += ends + rates.labels.of(everything)
    return seconds + ends + steps * (ends + rates.step)


def comparison_seconds(rates: Rates, tokens: int, checkpoints: int, *, whole: bool = False) -> float:
    """Seconds of comparing checkpoints with their original on tokens of text, see `moqa.evaluation.proof`.

    Args:
        rates: of the model.
        tokens: of all texts.
        checkpoints: how many are compared.
        whole: whether the original is in memory.
    """
    original = 0.0 if whole else rates.ends
    each = rates.checkpoint + rates.score.of(tokens)
    for block in rates.each():
        original += block.comparison.original.of(tokens) + (0.0 if whole else _reading(rates, block))
        each += block.comparison.packed.of(tokens)
    return original + checkpoints * each


def loading_seconds(rates: Rates) -> float:
    """Seconds of reading the whole original."""
    return rates.ends + sum(_reading(rates, block) for block in rates.each())


def _reading(rates: Rates, block: BlockRates) -> float:
    # what a trial reads may lie in the system's memory where the rest does not
    return max(block.file.read, block.file.bytes / rates.storage)


def _written(rates: Rates) -> float:
    """Seconds for a byte that is written; small files mostly wait for the disk, whatever their size is."""
    files = [block.file for block in rates.blocks.values()]
    return min((file.write / file.written for file in files if file.written), default=0.0)
