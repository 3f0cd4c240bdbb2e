"""Writing: whole or not at all, and only what was planned."""

from pathlib import Path

import pytest
import torch

from moqa.errors import MoqaError
from moqa.format.layout import Shard
from moqa.format.writer import write_shard
from moqa.storage.folders import check_free
from moqa.storage.resumable import resumable


class BlockError(Exception):
    pass


def make_old(out):
    out.mkdir()
    (out / "moqa.json").write_text("old")
    return out


class TestResult:
    def test_appears_when_it_is_whole(self, tmp_path):
        out = tmp_path / "new" / "out"
        with resumable(out, {}) as work:
            (work.result / "a").write_text("1")
            assert not out.exists()
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        assert (out / "a").read_text() == "1"
        assert out.stat().st_mode & 0o777 == 0o755

    @pytest.mark.parametrize("error", [BlockError, KeyboardInterrupt, SystemExit])
    def test_leaves_nothing_behind_after_a_failure(self, tmp_path, error):
        def fail(work):
            (work.result / "a").write_text("1")
            raise error

        with pytest.raises(error), resumable(tmp_path / "out", {}) as work:
            fail(work)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("error", [BlockError, KeyboardInterrupt])
    def test_a_failure_keeps_what_was_there(self, tmp_path, error):
        old = make_old(tmp_path / "out")
        with pytest.raises(error), resumable(old, {}, overwrite=True):
            raise error
        assert (old / "moqa.json").read_text() == "old"
        assert list(tmp_path.iterdir()) == [old]

    def test_a_failed_rename_keeps_what_was_there(self, tmp_path, monkeypatch):
        old, rename = make_old(tmp_path / "out"), Path.rename

        def fail(path, target):
            if path.name == "result":
                raise OSError("disk trouble")
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", fail)
        with pytest.raises(MoqaError, match=r"disk trouble.*same command"), resumable(old, {}, overwrite=True):
            pass
        assert (old / "moqa.json").read_text() == "old"
        monkeypatch.undo()
        with resumable(old, {}, overwrite=True) as work:
            (work.result / "moqa.json").write_text("new")
        assert (old / "moqa.json").read_text() == "new"
        assert list(tmp_path.iterdir()) == [old]

    def test_refuses_what_is_there(self, tmp_path):
        old = make_old(tmp_path / "out")
        with pytest.raises(MoqaError, match="--overwrite"), resumable(old, {}):
            pytest.fail("the block ran")
        assert (old / "moqa.json").read_text() == "old"

    def test_overwrite_replaces_the_whole_folder(self, tmp_path):
        old = make_old(tmp_path / "out")
        (old / "stray").write_text("x")
        with resumable(old, {}, overwrite=True) as work:
            (work.result / "moqa.json").write_text("new")
        assert {path.name: path.read_text() for path in old.iterdir()} == {"moqa.json": "new"}
        assert list(tmp_path.iterdir()) == [old]

    def test_an_unwritable_place_is_named(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(MoqaError, match="cannot be written"), resumable(tmp_path / "file" / "out", {}):
            pytest.fail("the block ran")


class TestCheckFree:
    def test_an_empty_folder_is_free(self, tmp_path):
        check_free(tmp_path, overwrite=False)
        with resumable(tmp_path / "sub", {}) as work:
            (work.result / "a").touch()

    @pytest.mark.parametrize("kind", ["folder", "file"])
    def test_only_moqas_own_folders_are_replaced(self, tmp_path, kind):
        out = tmp_path / "precious"
        if kind == "file":
            out.write_text("photos")
        else:
            out.mkdir()
            (out / "photo").write_text("photos")
        with pytest.raises(MoqaError, match="was not written by moqa"), resumable(out, {}, overwrite=True):
            pytest.fail("the block ran")
        assert (out if kind == "file" else out / "photo").read_text() == "photos"


class TestWriteShard:
    shard = Shard("x.safetensors", {"a": (torch.float32, (2, 3)), "b": (torch.uint8, (4,))})
    sound = {"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.uint8)}  # noqa: RUF012

    @pytest.mark.parametrize(
        "change",
        [{"a": None}, {"c": torch.ones(1)}, {"a": torch.ones(3, 2)}, {"a": torch.ones(2, 3, dtype=torch.float64)},
         {"b": torch.ones(4, dtype=torch.int8)}, {"a": torch.ones(6)}],
        ids=["missing", "unplanned", "shape", "dtype", "signedness", "flat"],
    )  # fmt: skip
    def test_only_what_was_planned(self, change, tmp_path):
        tensors = {name: tensor for name, tensor in (self.sound | change).items() if tensor is not None}
        with pytest.raises(ValueError, match="planned"):
            write_shard(tmp_path, self.shard, tensors)

    def test_strided_tensors_are_written_in_order(self, tmp_path):
        whole = write_shard(tmp_path, self.shard, self.sound | {"a": torch.arange(6.0).reshape(2, 3)})
        strided = torch.arange(6.0).reshape(2, 3).T.contiguous().T
        assert write_shard(tmp_path, self.shard, self.sound | {"a": strided}) == whole
