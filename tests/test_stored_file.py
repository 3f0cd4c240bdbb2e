"""Reading a file of weights: the same bytes with and without the system's memory between."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moqa.originals.file import File

SIZE = 9 * 2**20 + 1234  # some pieces, and no whole number of pages


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    values = torch.randint(256, (SIZE,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_file({"x": values}, path)
    return path, values.numpy()


def forget(path: Path) -> None:
    """Leave nothing of a file in the system's memory."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: Path, begin: int, size: int, once: bool = True) -> np.ndarray:
    out = np.zeros(size, np.uint8)
    with File(path, once) as file:
        file.fill(out, begin)
    return out


@settings(max_examples=60, deadline=None)
@given(begin=st.integers(0, SIZE), size=st.integers(0, SIZE), cached=st.booleans(), once=st.booleans())
def test_any_range_is_read_as_it_lies_there(
    stored: tuple[Path, np.ndarray], begin: int, size: int, cached: bool, once: bool
) -> None:
    path, values = stored
    if not cached:
        forget(path)
    size = min(size, SIZE - begin)
    assert np.array_equal(read(path, begin, size, once), values[begin : begin + size])


def test_what_is_read_once_is_not_kept_in_the_systems_memory(
    stored: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, values = stored
    forget(path)
    read(path, 0, SIZE)
    with File(path, once=True) as file:
        if file._direct is None:
            pytest.skip("the file system reads through the system's memory")
        assert not file._direct.is_cached(0, SIZE)
    read(path, 0, SIZE, once=False)
    # what is there is taken from there
    monkeypatch.setattr("moqa.originals.file._Direct.fill", lambda *_: pytest.fail("read from the disk"))
    assert np.array_equal(read(path, 0, SIZE), values)


def test_a_file_system_that_refuses_is_read_as_any_other(
    stored: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, values = stored
    forget(path)
    with File(path, once=True) as file:
        direct, preadv = file._direct, os.preadv

        def refuse(descriptor: int, *arguments: object) -> int:
            if direct is not None and descriptor == direct._descriptor:
                raise OSError(errno.EINVAL, "Invalid argument")
            return preadv(descriptor, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "preadv", refuse)
        out = np.zeros(SIZE, np.uint8)
        file.fill(out, 0)
    assert np.array_equal(out, values)


@pytest.mark.parametrize("once", [False, True])
def test_a_file_that_ends_too_early_is_an_error(stored: tuple[Path, np.ndarray], once: bool) -> None:
    path, _ = stored
    forget(path)
    with pytest.raises(OSError, match=rf"{path.name} ends at"):
        read(path, SIZE - 10, 11, once)
