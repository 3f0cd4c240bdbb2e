"""Writes models as MXFP4 and FP8 checkpoints, and says what they hold: in numpy, apart from the code under test."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float64)
E2M1[8] = -0.0


def as_bfloat16(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)


def nibbles(codes: np.ndarray) -> np.ndarray:
    """[..., 2n] codes of 4 bits -> [..., n] bytes, the first of two codes in the lower half."""
    return (codes[..., 0::2] + 16 * codes[..., 1::2]).astype(np.uint8)


def mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[experts, in, out] -> blocks, scales, and the plain tensor that they stand for."""
    matrix = weight.double().numpy().swapaxes(1, 2)
    groups = matrix.reshape(*matrix.shape[:2], -1, 32)
    exponent = np.floor(np.log2(np.abs(groups).max(-1, keepdims=True))) - 2
    codes = np.abs(groups[..., None] / 2.0 ** exponent[..., None] - E2M1).argmin(-1)
    plain = (E2M1[codes] * 2.0**exponent).reshape(matrix.shape).swapaxes(1, 2)
    scales = (exponent[..., 0] + 127).astype(np.uint8)
    return torch.from_numpy(nibbles(codes)), torch.from_numpy(scales), as_bfloat16(plain)


def spread(scales: np.ndarray, block: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    """The scale of every number, from one per block."""
    return np.kron(scales, np.ones(block, scales.dtype))[..., : shape[-2], : shape[-1]]


def fp8(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[rows, columns] -> numbers, scales, and the plain tensor that they stand for."""
    matrix, (rows, columns) = weight.float().numpy(), block
    padded = np.pad(matrix, ((0, -matrix.shape[0] % rows), (0, -matrix.shape[1] % columns)))
    tiles = np.abs(padded).reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    scales = tiles.max((1, 3)).astype(np.float32) / np.float32(448)
    every = spread(scales, block, matrix.shape)
    numbers = torch.from_numpy(matrix / every).to(torch.float8_e4m3fn)
    return numbers, torch.from_numpy(scales), as_bfloat16(numbers.float().numpy() * every)


def is_stored_as(method: str, name: str) -> bool:
    """Whether published models of the method's families store a tensor so."""
    expert = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
    return expert if method == "mxfp4" else "_proj" in name and name.endswith(".weight")


def write_pair(source: Path, out: Path, method: str, block: tuple[int, int] = (128, 128)) -> tuple[Path, Path]:
    """A model twice: `out / method` stores it in blocks, `out / "plain"` the same values in bfloat16."""
    folders = out / method, out / "plain"
    for folder in folders:
        shutil.copytree(source, folder)
    stored, plain = {}, {}
    for name, tensor in load_file(source / WEIGHTS).items():
        if not is_stored_as(method, name):
            stored[name] = plain[name] = tensor
        elif method == "mxfp4":
            stored[f"{name}_blocks"], stored[f"{name}_scales"], plain[name] = mxfp4(tensor)
        else:
            stored[name], stored[f"{name}_scale_inv"], plain[name] = fp8(tensor, block)
    for folder, tensors in zip(folders, (stored, plain), strict=True):
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    blocks = {"weight_block_size": list(block), "activation_scheme": "dynamic", "fmt": "e4m3"}
    configure(folders[0], quantization_config={"quant_method": method, **(blocks if method == "fp8" else {})})
    return folders


def configure(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def shard(folder: Path) -> None:
    """Put tensors into two files by turns, so that numbers and their scales lie in different ones."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    index = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(index.values()):
        save_file({n: t for n, t in tensors.items() if index[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
