"""llama.cpp's importance matrix: for every tensor the sums of squared inputs, and how many tokens they are of."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor


def write_importance(
    path: Path, datasets: Sequence[str], chunks: int, chunk: int, tensors: Iterable[Mapping[str, Tensor]]
) -> None:
    """Write a file that `llama-quantize --imatrix` reads.

    >>> write_importance(Path("imatrix.gguf"), ["wiki"], 64, 256, [{"blk.0.attn_q.weight.in_sum2": torch.ones(1, 256)}])

    Args:
        path: of the file.
        datasets: names of the texts.
        chunks: number of samples.
        chunk: tokens of a sample.
        tensors: `NAME.in_sum2` [matrices, in] and `NAME.counts` [matrices, 1], float32.
    """
    from gguf import GGUFWriter

    logging.getLogger("gguf").setLevel(logging.ERROR)
    writer = GGUFWriter(path, "")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", list(datasets))
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", chunk)
    for some in tensors:
        for name, tensor in some.items():
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
