"""Originals in shards that are not what they say, and files that go away under long work."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from long_work import SMALL, contents, refusal
from safetensors.torch import load_file, save_file

from moqa.memory.limit import MemoryLimit
from moqa.models.view import open_model
from moqa.originals.fingerprint import fingerprint
from moqa.originals.folder import INDEX, headers
from moqa.originals.reader import LazyTensor
from moqa.planning import plan
from moqa.profiling import profile
from moqa.quantization import quantize

UP = "model.layers.1.mlp.experts.2.up_proj.weight"
QUERY, NORM, EMBEDDING = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "model.embed_tokens.weight"
whole_or_in_layers = pytest.mark.parametrize("keep", [True, False], ids=["whole", "layers"])


@pytest.fixture
def folder(sharded, tmp_path):
    return Path(shutil.copytree(sharded, tmp_path / "model"))


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


class TestIndex:
    def test_names_a_tensor_that_is_nowhere(self, folder):
        path = shard_of(folder, UP)
        write_index(folder, {**index_of(folder), "model.ghost.weight": path.name})
        assert refusal(open_model, folder) == f"{path} lacks model.ghost.weight: {INDEX} lists it there"

    @pytest.mark.parametrize("name", [UP, NORM])
    def test_does_not_name_a_tensor_of_a_shard(self, folder, name):
        path = shard_of(folder, name)
        write_index(folder, {key: file for key, file in index_of(folder).items() if key != name})
        expected = f"{path} holds {name}, but {INDEX} does not list it: get both from one source"
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
            (moved(10**9), f"{UP} is at bytes 100"),
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
        assert message.startswith("the original can no longer be read: ")
        assert path.name in message
        assert said in message
        assert message.endswith("run the same command again to continue once it can be read")
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
        read = LazyTensor.read_into

        def short(tensor, out):
            if UP in tensor.what:
                os.truncate(shard_of(folder, UP), 1000)
            read(tensor, out)

        # a profile that holds the whole model has read it before it begins
        monkeypatch.setattr(MemoryLimit, "holds", lambda *_: False)
        monkeypatch.setattr(LazyTensor, "read_into", short)
        message = refusal(work, folder, out)
        assert "the original can no longer be read: " in message
        assert f"{shard_of(folder, UP)} is truncated or " in message

    @pytest.fixture(autouse=True)
    def in_layers(self, monkeypatch):
        monkeypatch.setattr(MemoryLimit, "holds", lambda *_: False)
