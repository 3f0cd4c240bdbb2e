"""Forecast of time: seconds of work from the rates of a trial."""

from collections.abc import Sequence

from moqa.forecast.rates import BlockRates, Rates


def quantization_seconds(rates: Rates, tokens: int, kept: int, together: int, *, ahead: bool = False) -> float:
    """Seconds of a run of `moqa.quantize`.

    >>> rates = Rates(layers=(0, 0), blocks={0: BlockRates(experts=16, solve=0.5)}, storage=1e9)
    >>> quantization_seconds(rates, tokens=0, kept=0, together=16)
    16.0

    Args:
        rates: of the model and the method.
        tokens: of all samples; 0 for a method that needs none.
        kept: bytes that are written unchanged.
        together: number of experts whose statistics are held together.
        ahead: whether blocks are read and written in the background.
    """
    blocks, seconds = rates.each(), 0.0
    for number, block in enumerate(blocks):
        slices = -(-block.experts // together)
        work = block.linear + block.experts * block.solve
        if tokens:
            work += block.inputs.of(tokens) + slices * block.calls.of(tokens) + block.experts * block.expert.of(tokens)
            # the last block's outputs are not needed
            work += block.advance.of(tokens) if number + 1 < len(blocks) else 0.0
        reading = _reading(rates, block)
        if ahead:
            background = (block.read_work + block.write_work) / rates.cores
            seconds += max(reading + block.write, work + background)
        else:
            seconds += reading + work + block.write
    # the fastest rate, because small files mostly wait for the disk
    each = min((block.write / block.written for block in rates.blocks.values() if block.written), default=0.0)
    return seconds + rates.ends + rates.embed.of(tokens) + kept * each


def profile_seconds(
    rates: Rates, tokens: Sequence[int], compared: Sequence[int], steps: int, together: int, *, sensitivity: bool = True
) -> float:
    """Seconds of a run of `moqa.profile`.

    Args:
        rates: of the model.
        tokens: of each distribution, including the model's own text.
        compared: tokens among them that are for comparing units.
        steps: decoding steps of the model's own text.
        together: number of experts whose errors are held together.
        sensitivity: whether sensitivity is measured.
    """
    seconds = rates.embed.of(sum(tokens))
    for block in rates.each():
        reading, slices = _reading(rates, block), max(1, -(-block.experts // together))
        seconds += reading + block.weights + steps * (reading + block.step)
        seconds += sum(block.forward.of(count) for count in tokens)
        if sensitivity:
            seconds += reading
            for count in compared:
                seconds += block.back.of(count) + (slices - 1) * block.back_slice.of(count)
                seconds += block.experts * block.back_expert.of(count)
    if sensitivity:
        seconds += rates.ends + rates.labels.of(sum(compared))
    return seconds + rates.ends + steps * (rates.ends + rates.step)


def comparison_seconds(rates: Rates, tokens: int, checkpoints: int) -> float:
    """Seconds of comparing checkpoints with their original, see `moqa.evaluation.proof`.

    Args:
        rates: of the model.
        tokens: of all texts.
        checkpoints: number of checkpoints.
    """
    original, each = loading_seconds(rates), rates.checkpoint + rates.score.of(tokens)
    for block in rates.each():
        original += block.original.of(tokens)
        each += block.packed.of(tokens)
    return original + checkpoints * each


def loading_seconds(rates: Rates) -> float:
    """Seconds of reading the whole original."""
    return rates.ends + sum(_reading(rates, block) for block in rates.each())


def _reading(rates: Rates, block: BlockRates) -> float:
    # the trial may have read from the page cache, which does not hold the rest
    return max(block.read, block.bytes / rates.storage)
