"""Forecast of time: seconds of work from the rates of a trial."""

from collections.abc import Collection

from moqa.forecast.rates import BlockRates, Rates


def quantization_seconds(
    rates: Rates, tokens: int, kept: int, together: int, *, ahead: bool = False, whole: bool = False
) -> float:
    """Seconds of a run of `moqa.quantize`.

    >>> from moqa.forecast.rates import QuantizationRates
    >>> block = BlockRates(experts=16, quantization=QuantizationRates(solve=0.5))
    >>> quantization_seconds(Rates(layers=(0, 0), blocks={0: block}, storage=1e9), tokens=0, kept=0, together=16)
    16.0

    Args:
        rates: of the model and the method.
        tokens: of all samples; 0 for a method that needs none.
        kept: bytes that are written unchanged.
        together: number of experts whose statistics are held together.
        ahead: whether blocks are read and written in the background.
        whole: whether the whole original is in memory.
    """
    blocks, seconds = rates.each(), 0.0
    for number, block in enumerate(blocks):
        of, slices = block.quantization, -(-block.experts // together)
        work = of.linear + block.experts * of.solve
        if tokens:
            work += of.inputs.of(tokens) + slices * of.calls.of(tokens) + block.experts * of.expert.of(tokens)
            # the last block's outputs are not needed
            work += of.advance.of(tokens) if number + 1 < len(blocks) else 0.0
        reading = 0.0 if whole else _reading(rates, block)
        if ahead:
            background = (block.file.read_work + block.file.write_work) / rates.cores
            seconds += max(reading + block.file.write, work + background)
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
        tokens: of each distribution, including the model's own text.
        steps: decoding steps of the model's own text.
        together: number of experts whose errors are held together.
        sensitivity: whether sensitivity is measured.
        whole: whether the whole original is in memory.
    """
    seconds, total = rates.embed.of(sum(tokens)), sum(tokens)
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
        seconds += ends + rates.labels.of(total)
    return seconds + ends + steps * (ends + rates.step)


def comparison_seconds(rates: Rates, tokens: int, checkpoints: int, *, whole: bool = False) -> float:
    """Seconds of comparing checkpoints with their original, see `moqa.evaluation.proof`.

    Args:
        rates: of the model.
        tokens: of all texts.
        checkpoints: number of checkpoints.
        whole: whether the whole original is in memory.
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
    # the trial may have read from the page cache, which does not hold the rest
    return max(block.file.read, block.file.bytes / rates.storage)


def _written(rates: Rates) -> float:
    """Seconds per written byte; the fastest rate, because small files mostly wait for the disk."""
    files = [block.file for block in rates.blocks.values()]
    return min((file.write / file.written for file in files if file.written), default=0.0)
