"""Files that are replaced at once, results that are put in place, and temporary folders of killed processes."""

import os
import signal
import subprocess
import sys
import tempfile

import pytest

from moqa.errors import MoqaError, Stopped
from moqa.storage.artifact import write_whole
from moqa.storage.folders import PLACED, beside, check_free
from moqa.storage.resumable import resumable, tidy
from moqa.storage.temporary import temporary_folder


class TestWriteWhole:
    def test_a_failure_keeps_the_earlier_file_and_leaves_nothing(self, tmp_path, monkeypatch):
        path = tmp_path / "x.json"
        write_whole(path, "old")

        def full(_):
            raise OSError("disk trouble")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="disk trouble"):
            write_whole(path, "new")
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_bytes_stay_as_they_are(self, tmp_path):
        write_whole(tmp_path / "x", b"\r\n\xff")
        assert (tmp_path / "x").read_bytes() == b"\r\n\xff"

    def test_a_link_stays_a_link(self, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path / "target")
        write_whole(tmp_path / "link", "text")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "target").read_text() == "text"

    def test_a_pipe_is_written_to(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
        write_whole(tmp_path / "pipe", "text")
        assert os.read(reader, 10) == b"text"
        os.close(reader)
        assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def place(out, text, monkeypatch=None):
    """Make a result; if a patch is given, as if the process were killed before it can clean up."""
    with resumable(out, {"text": text}, overwrite=True) as work:
        (work.result / "moqa.json").write_text(text)
        if monkeypatch:
            monkeypatch.setattr("moqa.storage.resumable._clear", lambda out: None)
    if monkeypatch:
        monkeypatch.undo()


class TestTidy:
    def test_completes_the_clean_up_and_says_whose_result_it_is(self, tmp_path, monkeypatch):
        out = tmp_path / "out"
        place(out, "old")
        place(out, "new", monkeypatch)
        assert len(list(tmp_path.iterdir())) == 4
        check_free(out, overwrite=False)  # the same command has to come as far as `tidy`
        assert tidy(out) == {"text": "new"}
        assert list(tmp_path.iterdir()) == [out]
        assert tidy(out) is None

    def test_a_result_that_was_changed_since_is_not_the_jobs(self, tmp_path, monkeypatch):
        out = tmp_path / "out"
        place(out, "new", monkeypatch)
        (out / "moqa.json").write_text("nEw")
        assert tidy(out) is None
        with pytest.raises(MoqaError, match="exists"):
            check_free(out, overwrite=False)

    def test_what_was_moved_away_comes_back(self, tmp_path):
        out = tmp_path / "out"
        place(out, "old")

        def begin():
            with resumable(out, {"text": "new"}, overwrite=True) as work:
                work.mark_done("first", {})
                out.rename(beside(out, "replaced"))
                raise Stopped

        with pytest.raises(Stopped):
            begin()
        assert tidy(out) is None
        assert (out / "moqa.json").read_text() == "old"
        place(out, "new")
        assert list(tmp_path.iterdir()) == [out]

    def test_a_record_that_was_damaged_is_dropped(self, tmp_path, monkeypatch):
        out = tmp_path / "out"
        place(out, "new", monkeypatch)
        record = beside(out, PLACED)
        record.write_text(record.read_text()[:-3])
        assert tidy(out) is None
        assert not record.exists()


class TestTemporaryFolder:
    def test_is_removed(self):
        with temporary_folder() as folder:
            (folder / "file").touch()
        assert not folder.exists()

    def test_of_a_killed_process_is_removed_by_the_next_and_no_other_is(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        text = (
            "import os, signal; from moqa.storage.temporary import temporary_folder\n"
            "with temporary_folder(): os.kill(os.getpid(), signal.SIGKILL)"
        )
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", text], check=False, env=environment)
        assert done.returncode == -signal.SIGKILL
        [left] = tmp_path.iterdir()
        (tmp_path / "moqa-other").mkdir()
        with temporary_folder() as mine, temporary_folder() as other:
            assert not left.exists()
            assert {path.name for path in tmp_path.iterdir()} == {mine.name, other.name, "moqa-other"}
