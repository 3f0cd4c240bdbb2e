"""Originals in shards that are not what they say, disks that are too small, and files that go away under long work."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moqa.cli.progress.limits import seconds_of, time_limited
from moqa.errors import MoqaError, Stopped
from moqa.forecast.disk import profile_disk_bytes
from moqa.memory.limit import MemoryLimit
from moqa.methods import METHODS
from moqa.models.view import open_model
from moqa.originals.folder import INDEX, fingerprint, headers
from moqa.planning import STRATEGIES, Budget, plan
from moqa.profiling import profile
from moqa.profiling import run as profiler
from moqa.profiling.blank import blank_profile
from moqa.profiling.record import Settings
from moqa.progress import quiet
from moqa.quantization import quantize
from moqa.quantization import run as driver
from moqa.quantization.run import disk_needed
from moqa.storage import space
from moqa.storage.resumable import ResumableRun

SMALL = {"samples": 6, "context": 32, "self_samples": 2}
UP = "model.layers.1.mlp.experts.2.up_proj.weight"
QUERY, NORM, EMBEDDING = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "model.embed_tokens.weight"
whole_or_in_layers = pytest.mark.parametrize("keep", [True, False], ids=["whole", "layers"])


@pytest.fixture(scope="module")
def sharded(tiny_model, tmp_path_factory):
    """The tiny model as transformers shards it; do not change it, `folder` is a copy that may be."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("sharded") / "model"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype="auto").save_pretrained(folder, max_shard_size="100KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_model / name, folder / name)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture
def folder(sharded, tmp_path):
    return Path(shutil.copytree(sharded, tmp_path / "model"))


@pytest.fixture(scope="module")
def profiled(sharded, texts, tmp_path_factory):
    return profile(sharded, [texts["wiki"]], tmp_path_factory.mktemp("profile") / "tiny", **SMALL)


@pytest.fixture(scope="module")
def planned(profiled):
    return plan(profiled, strategy="uniform", widths=(3,))


@pytest.fixture
def out(tmp_path):
    """A name in a folder of its own, so that nothing but the run leaves anything there."""
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs" / "out"


@pytest.fixture(params=["profile", "quantize"])
def work(request, planned, profiled, texts):
    """Either kind of long work: called with a model, an output and a listener."""

    def run(model, out, report=quiet):
        if request.param == "profile":
            profile(model, [texts["wiki"]], out, report=report, **SMALL)
        else:
            quantize(model, planned, out, profile=profiled, report=report)

    return run


def index_of(folder):
    return json.loads((folder / INDEX).read_text())["weight_map"]


def write_index(folder, index):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def shard_of(folder, name):
    return folder / index_of(folder)[name]


def edit_header(path, edit):
    """Let a function change a file's header, or give other JSON for it; the values stay where they are."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    text = (edit(header) or json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def edit_tensors(folder, edit):
    """Store each tensor as what a function of its name and values gives."""
    for path in folder.glob("*.safetensors"):
        found = {name: edit(name, tensor) for name, tensor in load_file(path).items()}
        save_file(found, path, metadata={"format": "pt"})


def refusal(function, *args, **options):
    with pytest.raises(MoqaError) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class TestIndex:
    def test_names_a_tensor_that_is_nowhere(self, folder):
        path = shard_of(folder, UP)
        write_index(folder, {**index_of(folder), "model.ghost.weight": path.name})
        assert refusal(open_model, folder) == f"{path} lacks model.ghost.weight: {INDEX} says that it lies there"

    @pytest.mark.parametrize("name", [UP, NORM])
    def test_does_not_name_a_tensor_of_a_shard(self, folder, name):
        path = shard_of(folder, name)
        write_index(folder, {key: file for key, file in index_of(folder).items() if key != name})
        expected = f"{path} holds {name}, and {INDEX} does not name it: get both from one source"
        assert refusal(open_model, folder) == refusal(fingerprint, folder) == expected

    def test_names_a_tensor_twice(self, folder):
        text = (folder / INDEX).read_text()
        other = shard_of(folder, NORM).name
        (folder / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{UP}": "{other}",'))
        assert refusal(headers, folder) == f"{folder / INDEX} is not a safetensors index: {UP} is named twice"

    def test_nested_without_end(self, folder):
        (folder / INDEX).write_text("[" * 100_000)
        assert f"{folder / INDEX} is not a safetensors index" in refusal(headers, folder)


def twice(header):
    return f'{json.dumps(header)[:-1]}, "{UP}": {json.dumps(header[UP])}}}'


def two_dtypes(header):
    return json.dumps(header).replace('"dtype":', '"dtype": "I64", "dtype":', 1)


def over_another(header):
    shape = header[UP]["shape"]
    other = next(n for n, e in header.items() if n not in (UP, "__metadata__") and e["shape"] == shape)
    header[UP]["data_offsets"] = header[other]["data_offsets"]


def moved(bytes_away):
    def edit(header):
        header[UP]["data_offsets"] = [place + bytes_away for place in header[UP]["data_offsets"]]

    return edit


def with_entry(**values):
    def edit(header):
        header[UP].update(values)

    return edit


class TestHeader:
    @pytest.mark.parametrize(
        ("edit", "said"),
        [
            (twice, f"{UP} is named twice"),
            (two_dtypes, "dtype is named twice"),
            (over_another, f"{UP} at bytes "),
            (moved(10**9), f"{UP} lies at bytes 100"),
            (moved(-(10**9)), f"{UP} has data_offsets [-"),
            (with_entry(data_offsets=[6000, 240]), f"{UP} [40, 72] in BF16 takes 5760 bytes, its data_offsets are "),
            (with_entry(shape=[3, 3]), f"{UP} [3, 3] in BF16 takes 18 bytes, its data_offsets are ["),
            (with_entry(dtype="F32"), f"{UP} [40, 72] in F32 takes 11520 bytes, its data_offsets are ["),
            (with_entry(data_offsets=[0.0, 5760.0]), f"{UP} has data_offsets [0.0, 5760.0]"),
            (with_entry(data_offsets=[5760]), f"{UP} has data_offsets [5760]"),
            (with_entry(data_offsets=None), f"{UP} has data_offsets None"),
            (with_entry(shape=[-40, -72]), f"{UP} has shape [-40, -72]"),
            (with_entry(shape=[True, 2880]), f"{UP} has shape [True, 2880]"),
            (with_entry(dtype="U16"), f"{UP} has dtype U16, known are BOOL, "),
            (with_entry(dtype=[1]), f"{UP} has dtype [1], known are BOOL, "),
            (lambda header: header[UP].pop("dtype") and None, f"{UP} has no dtype"),
            (lambda header: header.update({UP: 3}), f"{UP} has no data_offsets"),
            (lambda _: "[" * 100_000, ""),
        ],
    )
    def test_that_cannot_be_right(self, edit, said, folder):
        path = shard_of(folder, UP)
        edit_header(path, edit)
        assert refusal(open_model, folder, keep=False).startswith(f"{path} has a corrupted header: {said}")

    def test_an_empty_tensor_is_none_of_these(self, folder):
        path = folder / "empty.safetensors"
        save_file({"x": torch.ones(3), "nothing": torch.ones(0, 4), "y": torch.ones(2)}, path)
        (folder / INDEX).unlink()
        path.rename(folder / "model.safetensors")
        assert sorted(headers(folder)) == ["nothing", "x", "y"]


HALF, BRAIN, FULL, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
MIXTURES = {
    "some experts wider": lambda name: FULL if ".experts.2." in name or ".experts.5." in name else BRAIN,
    "the first expert wider": lambda name: FULL if ".experts.0." in name else BRAIN,
    "gate and up differ": lambda name: HALF if "gate_proj" in name else BRAIN,
    "attention in float16": lambda name: HALF if "self_attn" in name else BRAIN,
    "embedding and norms wider": lambda name: FULL if "embed" in name or "norm" in name else BRAIN,
    "experts in float64": lambda name: DOUBLE if ".experts." in name else BRAIN,
    "one expert in float64": lambda name: DOUBLE if ".experts.3." in name else BRAIN,
}


@pytest.fixture(params=MIXTURES)
def mixed(request, folder):
    """Tensors in several dtypes, with values that their own dtype can hold and no narrower one."""
    edit_tensors(folder, lambda name, tensor: (tensor.double() * 1.0001).to(MIXTURES[request.param](name)))
    return folder


class TestDtypes:
    @whole_or_in_layers
    @pytest.mark.parametrize("name", [UP, QUERY, NORM, EMBEDDING])
    def test_integers_are_no_weights(self, name, keep, folder):
        edit_header(shard_of(folder, name), lambda header: header[name].update(dtype="I16"))
        expected = f"{folder}: tensor {name} holds I16: weights must be floating-point numbers"
        assert refusal(open_model, folder, keep=keep) == expected

    def test_a_mixture_is_what_transformers_makes_of_it(self, mixed):
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(mixed, dtype=FULL).state_dict()
        whole, layers = open_model(mixed), open_model(mixed, keep=False)
        assert all(torch.equal(theirs[name], tensor) for name, tensor in whole.model.state_dict().items())
        assert all(torch.equal(layers.weight(u).float(), whole.weight(u)) for u in whole.units.values())
        tokens = torch.arange(24).view(2, 12)
        assert torch.equal(layers.model(tokens).logits, whole.model(tokens).logits)

    def test_a_mixture_in_layers_gives_the_numbers_of_the_whole(self, mixed, texts, tmp_path, monkeypatch):
        found = []
        for holds in (True, False):
            monkeypatch.setattr(MemoryLimit, "holds", lambda *_, holds=holds: holds)
            found.append(profile(mixed, [texts["wiki"]], tmp_path / f"profile-{holds}", **SMALL))
        assert contents(found[0].folder) == contents(found[1].folder)
        chosen = plan(found[0], strategy="uniform", widths=(3,))
        ours = quantize(mixed, chosen, tmp_path / "ours", profile=found[0])
        whole = quantize(mixed, chosen, tmp_path / "whole", profile=found[0], view=open_model(mixed))
        assert contents(ours) == contents(whole)

    def test_a_mixed_stack_is_read_one_expert_at_a_time(self, folder, monkeypatch):
        """Else it would take three times the memory of the layer that `--max-memory` counts with."""
        edit_tensors(folder, lambda name, tensor: tensor.float() if ".experts.0." in name else tensor)
        view, stack, sizes = open_model(folder, keep=False), torch.stack, []

        def stacked(parts, *args, **options):
            sizes.append(sum(part.numel() for part in parts))
            return stack(parts, *args, **options)

        monkeypatch.setattr(torch, "stack", stacked)
        view.need(1)
        assert max(sizes, default=0) < view.weight(next(iter(view.units.values()))).numel()


def lost(path):
    path.rename(path.with_suffix(".away"))


def cut(path):
    shutil.copyfile(path, path.with_suffix(".away"))
    os.truncate(path, path.stat().st_size // 2)


class TestSourceThatGoesAway:
    @pytest.mark.parametrize(("harm", "said"), [(lost, "lacks model-"), (cut, "is truncated or ")])
    def test_keeps_what_is_done(self, harm, said, work, sharded, folder, out):
        work(sharded, out.with_name("whole"))
        path = shard_of(folder, UP)

        def report(step, done, *_, **__):
            if (step, done) in (("activation", 1), ("quantize", 1)):
                harm(path)

        message = refusal(work, folder, out, report)
        assert message.startswith("the original can be read no more: ")
        assert path.name in message
        assert said in message
        assert message.endswith("run the same command again to go on once it can be")
        steps = out.with_name(".out.partial") / "steps"
        before = {path.name for path in steps.glob("*.json")}
        assert before & {"layer-0.json", "forward-0.json"}
        assert said in refusal(work, folder, out)
        assert {path.name for path in steps.glob("*.json")} == before
        assert not out.exists()
        path.with_suffix(".away").rename(path)
        work(folder, out)
        ours, whole = contents(out), contents(out.with_name("whole"))
        # both name the folder of the model
        differ = {name for name in whole if ours.get(name) != whole[name]}
        assert ours.keys() == whole.keys()
        assert differ <= {"profile.json", "moqa.json"}

    def test_while_a_layer_is_being_read(self, work, folder, out, monkeypatch):
        from moqa.originals import folder as stored

        read = stored.OnDisk.read_into

        def short(tensor, out):
            if UP in tensor._what:
                os.truncate(shard_of(folder, UP), 1000)
            read(tensor, out)

        # a profile that holds the whole model has read it before it begins
        monkeypatch.setattr(MemoryLimit, "holds", lambda *_: False)
        monkeypatch.setattr(stored.OnDisk, "read_into", short)
        message = refusal(work, folder, out)
        assert "the original can be read no more: " in message
        assert f"{shard_of(folder, UP)} is truncated or " in message

    @pytest.fixture(autouse=True)
    def in_layers(self, monkeypatch):
        monkeypatch.setattr(MemoryLimit, "holds", lambda *_: False)


class TestOutput:
    @pytest.mark.parametrize(
        ("place", "reason"),
        [
            ("file/out", "Not a directory"),
            ("file/a/b", "Not a directory"),
            ("/proc/out", "No such file or directory"),
            ("/proc/self/a/b", "No such file or directory"),
            ("x" * 300, "File name too long"),
            ("x" * 250, "File name too long"),
        ],
    )
    def test_where_nothing_can_be_made(self, place, reason, work, sharded, tmp_path):
        (tmp_path / "file").write_text("")
        out = tmp_path / place
        assert refusal(work, sharded, out) == f"{out} cannot be written: {reason}"
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    @pytest.mark.parametrize("place", ["", ".", "a/.."])
    def test_without_a_name(self, place, work, sharded, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert "is no name of a folder to make" in refusal(work, sharded, Path(place))
        assert list(tmp_path.iterdir()) == []

    def test_on_a_disk_that_is_read_only(self, work, sharded, small_disk):
        small_disk("ro")
        out = small_disk.folder / "out"
        assert refusal(work, sharded, out) == f"{out} cannot be written: Read-only file system"

    def test_that_somebody_removes(self, work, sharded, out):
        partial, heard = out.with_name(".out.partial"), []
        work(sharded, out, lambda *_, **__: heard.append(1))
        shutil.rmtree(out)
        assert len(heard) > 3
        for number in range(1, len(heard) + 1):
            left = iter(range(number - 1, -1, -1))

            def report(*_, left=left, **__):
                if next(left, None) == 0:
                    shutil.rmtree(partial)

            message = refusal(work, sharded, out, report)
            assert message == f"{out} could not be written: somebody removed {partial}: run the same command again"
            assert list(out.parent.iterdir()) == []

    def test_that_somebody_removes_before_its_manifest(self, sharded, planned, profiled, out, monkeypatch):
        write = driver.write_manifest

        def gone(manifest, path):
            shutil.rmtree(out.with_name(".out.partial"))
            write(manifest, path)

        monkeypatch.setattr(driver, "write_manifest", gone)
        assert "somebody removed" in refusal(quantize, sharded, planned, out, profile=profiled)
        assert list(out.parent.iterdir()) == []

    def test_of_which_a_shard_was_removed(self, sharded, planned, profiled, out):
        def report(_, done, *__, **___):
            if done == 1:
                next(out.with_name(".out.partial").glob("result/model-00001-*")).write_bytes(b"")

        assert "was changed after it was written" in refusal(
            quantize, sharded, planned, out, profile=profiled, report=report
        )
        assert list(out.parent.iterdir()) == []

    def test_whose_result_was_removed_between_two_runs_begins_anew(self, sharded, planned, profiled, out):
        with pytest.raises(Stopped):
            quantize(sharded, planned, out, profile=profiled, report=time_limited(quiet, "0.000001s"))
        shutil.rmtree(out.with_name(".out.partial") / "result")
        quantize(sharded, planned, out, profile=profiled)
        assert contents(out) == contents(quantize(sharded, planned, out.with_name("whole"), profile=profiled))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own in memory, mounted with the options that it is called with."""

    class Disk:
        folder = tmp_path / "disk"

        def __call__(self, options):
            command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
            if shutil.which("mount") is None or subprocess.run(command, check=False, capture_output=True).returncode:
                pytest.skip("mounting is not allowed here")

    disk = Disk()
    disk.folder.mkdir()
    yield disk
    if os.path.ismount(disk.folder):
        subprocess.run(["umount", str(disk.folder)], check=True)


@pytest.fixture
def free(monkeypatch):
    """Sets how many bytes are free on every disk."""

    def set_free(size):
        usage = shutil._ntuple_diskusage(10**15, 10**15 - size, size)
        monkeypatch.setattr(space.shutil, "disk_usage", lambda _: usage)

    return set_free


class TestSpace:
    def test_too_little_is_refused_before_anything_is_written(self, work, sharded, out, free):
        free(2**17)
        message = refusal(work, sharded, out)
        assert message.startswith(f"{out} needs about 0.00")
        assert message.endswith(" GiB, 0.000122 GiB are free on its disk: free some, or choose an -o on another disk")
        assert list(out.parent.iterdir()) == []

    def test_just_enough_will_do(self, sharded, planned, profiled, texts, out, free):
        view = open_model(sharded, keep=False)
        needs = disk_needed(view, planned, profiled, METHODS["gptq"], "full")
        free(needs - 1)
        refusal(quantize, sharded, planned, out, profile=profiled, cache="full")
        free(needs)
        assert quantize(sharded, planned, out, profile=profiled, cache="full").is_dir()
        counts = [record.tokens for record in profiled.record.distributions.values()]
        needs = profile_disk_bytes(view, sum(counts), len(counts))
        free(needs - 1)
        refusal(profile, sharded, [texts["wiki"]], out.with_name("profile"), **SMALL)
        free(needs)
        profile(sharded, [texts["wiki"]], out.with_name("profile"), **SMALL)

    def test_what_an_unfinished_run_holds_is_there_for_it(self, sharded, planned, profiled, out, free):
        needs = disk_needed(open_model(sharded, keep=False), planned, profiled, METHODS["gptq"], None)
        with pytest.raises(Stopped):
            quantize(sharded, planned, out, profile=profiled, report=time_limited(quiet, "0.000001s"))
        held = sum(map(len, contents(out.with_name(".out.partial")).values()))
        assert held > needs // 10
        free(needs - held - 1)
        assert "needs about" in refusal(quantize, sharded, planned, out, profile=profiled)
        assert sum(map(len, contents(out.with_name(".out.partial")).values())) == held
        free(needs - held)
        assert quantize(sharded, planned, out, profile=profiled).is_dir()

    @pytest.mark.parametrize("cache", [None, "10%", "full"])
    def test_quantize_takes_about_what_it_says(self, cache, sharded, planned, profiled, out, most):
        quantize(sharded, planned, out, profile=profiled, cache=cache)
        said = disk_needed(open_model(sharded, keep=False), planned, profiled, METHODS["gptq"], cache)
        assert said == disk_needed(open_model(sharded), planned, profiled, METHODS["gptq"], cache)
        # small files are left out
        assert 0.8 * most() < said < 1.2 * most()

    def test_profile_takes_about_what_it_says(self, sharded, texts, out, most):
        found = profile(sharded, [texts["wiki"], texts["novels"]], out, samples=16, context=128, self_samples=8)
        counts = [record.tokens for record in found.record.distributions.values()]
        said = profile_disk_bytes(open_model(sharded, keep=False), sum(counts), len(counts))
        assert 0.8 * most() < said < 1.2 * most()

    @pytest.fixture
    def most(self, out, monkeypatch):
        """The most bytes that a run had on the disk, the copied tokenizer left out."""
        sizes = []

        def measure():
            files = out.with_name(".out.partial").rglob("*.safetensors")
            sizes.append(sum(path.stat().st_size for path in files))

        def measured(name, owner):
            call = getattr(owner, name)

            def after(*args, **options):
                found = call(*args, **options)
                measure()
                return found

            monkeypatch.setattr(owner, name, after)

        measured("keep", ResumableRun)
        measured("note", ResumableRun)
        measured("write_shard", driver)
        measured("write_profile", profiler)
        return lambda: max(sizes)

    def test_the_whole_job_is_refused_before_it_measures(self, sharded, small_disk, tmp_path):
        small_disk("size=400k")
        (tmp_path / "text.txt").write_text("The cat sat on the mat. " * 4000)
        command = [
            sys.executable, "-m", "moqa", "quantize", str(sharded), "--data", f"t={tmp_path / 'text.txt'}", "--bpw",
            "6", "--samples", "2", "--context", "16", "--self-samples", "1", "--no-proof", "-o",
            str(small_disk.folder / "out"),
        ]  # fmt: skip
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith(f"moqa: {small_disk.folder / 'out'} needs about 0.00")
        assert done.stderr.count("\n") == 1
        assert list(small_disk.folder.iterdir()) == []

    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_every_strategy_plans_from_a_profile_that_is_not_there_yet(self, strategy, sharded):
        view = open_model(sharded, keep=False)
        blank = blank_profile(view, str(sharded), "f" * 64, ["t"], Settings(samples=2, context=16), 1)
        budget = None if strategy in ("moqa", "moqa-v1", "uniform") else Budget.parse(bpw=6)
        chosen = plan(
            blank, budget, strategy=strategy, known=["t"], widths=(4,) if strategy == "uniform" else (2, 4, 8)
        )
        assert disk_needed(view, chosen, blank, METHODS["gptq"], None) > chosen.account.checkpoint > 0


class TestTimeLimit:
    @pytest.mark.parametrize("text", ["0", "abc", "-5s", "0s", "0.0h", "", "5", "s", "1e3s", "inf s", "5 weeks"])
    def test_no_times(self, text):
        assert refusal(seconds_of, text) == f"--time-limit {text} is no time: give e.g. 90m, 2h or 1.5d"

    def test_every_run_gets_one_piece_further(self, work, sharded, out):
        stops = []
        for _ in range(10):
            try:
                work(sharded, out, time_limited(quiet, "0.000001s"))
            except Stopped as stop:
                stops.append(str(stop))
                assert not out.exists()
            else:
                break
        assert 1 <= len(stops) == len(set(stops)) < 10
        work(sharded, out.with_name("whole"))
        assert contents(out) == contents(out.with_name("whole"))

    def test_of_the_command(self, sharded, out, tmp_path):
        (tmp_path / "text.txt").write_text("The cat sat on the mat. " * 4000)
        command = [
            sys.executable, "-m", "moqa", "profile", str(sharded), "--data", f"t={tmp_path / 'text.txt'}", "-o",
            str(out), "--samples", "4", "--context", "32", "--self-samples", "0", "--time-limit",
        ]  # fmt: skip
        found = subprocess.run([*command, "-5s"], check=False, capture_output=True, text=True)
        assert (found.returncode, found.stderr) == (2, "moqa: --time-limit -5s is no time: give e.g. 90m, 2h or 1.5d\n")
        assert list(out.parent.iterdir()) == []
        found = subprocess.run([*command, "0.000001s"], check=False, capture_output=True, text=True)
        assert found.returncode == 75
        assert found.stderr.endswith("in activation 1/2; the same command goes on from there\n")
        assert subprocess.run([*command, "1h"], check=False, capture_output=True).returncode == 0
