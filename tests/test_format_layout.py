"""Schemes and layouts: what is planned in bytes is what lies on disk."""

import hashlib
import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors import safe_open

from moqa.format.layout import DTYPES, Shard, entry_bytes, header_bytes, shards, unit_bytes
from moqa.format.scheme import Scheme
from moqa.format.tiles import PLANES, WIDTHS
from moqa.format.writer import write_shard

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(lambda n: n != "__metadata__")
entries = st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 9), max_size=3).map(tuple))
schemes = st.one_of(
    st.builds(Scheme, width=st.sampled_from(WIDTHS), group_size=st.sampled_from([32, 64, 96, 128])),
    st.builds(Scheme, width=st.integers(2, 8), symmetric=st.just(True), scale_dtype=st.just("float16")),
    st.just(Scheme(width=16)),
)
shapes = st.tuples(st.integers(1, 70), st.integers(1, 150))


def bytes_of(entry, seed=0):
    """A tensor of any bits: not a number included."""
    dtype, shape = entry
    generator = torch.Generator().manual_seed(seed)
    top = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, top, (entry_bytes(entry),), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def check_file(folder, shard):
    """Write random tensors by a layout and read them with safetensors."""
    tensors = {name: bytes_of(entry, seed) for seed, (name, entry) in enumerate(shard.entries.items())}
    stored = write_shard(folder, shard, tensors)
    content = (folder / shard.file).read_bytes()
    assert stored.bytes == shard.bytes == len(content)
    assert stored.sha256 == hashlib.sha256(content).hexdigest()
    length = int.from_bytes(content[:8], "little")
    assert (8 + length) % 64 == 0
    header = json.loads(content[8 : 8 + length])
    for name, (dtype, _) in shard.entries.items():
        assert header[name]["data_offsets"][0] % dtype.itemsize == 0
    with safe_open(folder / shard.file, framework="pt") as file:
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(found.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))


class TestScheme:
    @given(schemes, shapes)
    def test_bytes_are_those_of_its_tensors(self, scheme, shape):
        stored = {suffix: bytes_of(entry) for suffix, entry in scheme.tensors(shape).items()}
        assert scheme.stored_bytes(shape) == sum(tensor.nbytes for tensor in stored.values())

    @given(st.sampled_from(WIDTHS), st.sampled_from([32, 64, 128]), st.integers(1, 5), st.integers(1, 4))
    def test_bytes_of_whole_tiles_follow_from_the_width(self, width, group_size, tiles, blocks):
        out, features = 16 * tiles, 128 * blocks
        bits = width + (16 + 8) / group_size
        assert Scheme(width=width, group_size=group_size).stored_bytes((out, features)) == out * features * bits / 8

    @pytest.mark.parametrize(
        "fields",
        [{"width": 0}, {"width": 9}, {"width": 12}, {"width": 17}, {"width": 4, "group_size": 4},
         {"width": 4, "group_size": 16}, {"width": 4, "group_size": 48},
         {"width": 1, "symmetric": True}, {"width": 4, "scale_dtype": "float64"}],
    )  # fmt: skip
    def test_what_is_not_stored_is_refused(self, fields):
        with pytest.raises(ValidationError):
            Scheme(**fields)

    def test_symmetric_schemes_store_no_zero_points(self):
        symmetric, plain = (Scheme(width=4, symmetric=flag).tensors((8, 128)) for flag in (True, False))
        assert plain.keys() - symmetric.keys() == {"zero"}


class TestShard:
    @settings(max_examples=60)
    @given(st.dictionaries(names, entries, max_size=6))
    def test_files_are_safetensors_of_exactly_the_planned_bytes(self, planned):
        with tempfile.TemporaryDirectory() as folder:
            check_file(Path(folder), shards(planned, 0, {})[0])

    def test_an_empty_shard_is_a_file_too(self, tmp_path):
        shard = Shard("empty.safetensors", {})
        check_file(tmp_path, shard)
        assert shard.bytes == 64

    @pytest.mark.parametrize("name", ['say "hi"', "back\\slash", "naïve.βeta", "日本語", "tab\tnew\nline", "🙂", " "])
    def test_any_name_can_be_stored(self, name, tmp_path):
        check_file(tmp_path, Shard("x.safetensors", {name: (torch.bfloat16, (3,)), name + "2": (torch.uint8, (5,))}))

    def test_the_header_does_not_depend_on_the_offsets(self):
        entry = (torch.bfloat16, (10, 10))
        small = Shard("x", {"a": (torch.float32, (1,)), "b": entry})
        large = Shard("x", {"a": (torch.float32, (10**9, 10)), "b": entry})
        added = header_bytes("b", entry)
        for first in (small, large):
            alone = Shard("x", {"a": first.entries["a"]})
            assert len(first.header()) - len(alone.header()) == added

    @settings(max_examples=60)
    @given(st.dictionaries(names, st.tuples(shapes, schemes), min_size=1, max_size=4))
    def test_a_unit_adds_its_unit_bytes(self, units):
        planned = shards({}, 1, {name: (0, shape, scheme) for name, (shape, scheme) in units.items()})[1]
        # two units may share a tensor name, e.g. "a" kept at 16 bits and "a.weight": then it is no valid layout
        if len(planned.entries) == sum(len(scheme.tensors(shape)) for shape, scheme in units.values()):
            assert planned.bytes == 64 + sum(unit_bytes(name, *unit) for name, unit in units.items())
            with tempfile.TemporaryDirectory() as folder:
                check_file(Path(folder), planned)


class TestShards:
    def test_one_file_for_what_is_kept_and_one_per_layer(self):
        kept = {"norm": (torch.float32, (4,)), "embed": (torch.bfloat16, (9, 4))}
        units = {f"layers.{i}.proj": (i, (16, 64), Scheme(width=3)) for i in range(2)}
        found = shards(kept, 3, units)
        assert [shard.file for shard in found] == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
        assert found[0].entries == kept
        assert list(found[1].entries) == [f"layers.0.proj.{suffix}" for suffix in ("p0", "p1", "scale", "zero")]
        assert found[3].entries == {}

    def test_order_does_not_depend_on_the_order_given(self):
        units = {f"layers.0.{n}": (0, (16, 64), Scheme(width=w)) for n, w in {"a": 3, "b": 16, "c": 8}.items()}
        backwards = dict(reversed(units.items()))
        assert shards({}, 1, units)[1].header() == shards({}, 1, backwards)[1].header()

    def test_every_width_has_its_planes(self):
        for width in WIDTHS:
            planned = shards({}, 1, {"u": (0, (8, 64), Scheme(width=width))})[1]
            assert sum(name.startswith("u.p") for name in planned.entries) == len(PLANES[width])
