"""Nested widths: the codes, what a folder of them holds, and what it refuses."""

import json
import shutil
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import moqa
from moqa.calibration.inputs import InputStatistics
from moqa.errors import MoqaError
from moqa.format.grid import Neighbours
from moqa.format.manifest import MANIFEST
from moqa.format.nested import Rounding
from moqa.format.scheme import Scheme
from moqa.kernels import PackedMatrix
from moqa.methods import METHODS, SolveBatch
from moqa.runtime.verify import verify
from moqa.storage.artifact import checksum

WIDTHS = (2, 3, 4, 8)


def packed(scheme, weights, near=None, method="rtn"):
    """Tensors of one matrix."""
    out, features = weights.shape
    inputs = InputStatistics(features)
    inputs.add(torch.randn(64, features, generator=torch.Generator().manual_seed(7)), 1.0, False)
    batch = SolveBatch(
        weights[None], torch.full((1, out), scheme.width), [inputs], scheme, (out,),
        near=None if near is None else near[None],
    )  # fmt: skip
    return METHODS[method].run(batch)[0].stored(scheme.width)


@st.composite
def units(draw):
    """A wide scheme, a narrower width, and weights with groups of zeros and of large values."""
    wide = draw(st.integers(3, 8))
    symmetric = draw(st.booleans())
    narrow = draw(st.integers(2 if symmetric else 1, wide - 1))
    scheme = Scheme(width=wide, group_size=draw(st.sampled_from((32, 64))), symmetric=symmetric)
    shape = draw(st.integers(1, 40)), draw(st.integers(1, 150))
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 10**6))))
    weights *= 10.0 ** draw(st.integers(-6, 6))
    weights[:, : draw(st.integers(0, 64))] *= draw(st.sampled_from((0.0, 1e-3, 1.0)))
    return scheme, narrow, weights


@settings(max_examples=60, deadline=None)
@given(units(), st.sampled_from(("rtn", "gptq")))
def test_what_is_stored_gives_the_integers_back(unit, method):
    wide, width, weights = unit
    values = wide.storage.decode(wide, weights.shape, packed(wide, weights))
    scheme = wide.model_copy(update={"width": width})
    alone = packed(scheme, weights, values, method)
    rounding = Rounding(scheme)
    stored = rounding.store(weights.shape, alone, values)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in stored.items()} == rounding.tensors(weights.shape)
    again = rounding.alone(weights.shape, stored, values)
    assert again.keys() == alone.keys()
    assert all(torch.equal(again[name], alone[name]) for name in alone)
    PackedMatrix(scheme, weights.shape, again)


@settings(max_examples=60, deadline=None)
@given(units())
def test_the_lower_integer_is_the_floor_of_the_exact_position(unit):
    wide, width, weights = unit
    values = wide.storage.decode(wide, weights.shape, packed(wide, weights))
    scheme = wide.model_copy(update={"width": width})
    grid = METHODS["rtn"].run(
        SolveBatch(weights[None], torch.full((1, len(weights)), width), [], scheme, (len(weights),))
    )
    grid = grid[0].grid
    lower, group = Neighbours.of(grid, values).lower, scheme.group_size
    assert int(lower.max()) < 2**width - 1 or width == 1
    for row, column in {(0, 0), (len(weights) - 1, weights.shape[1] - 1), (len(weights) // 2, weights.shape[1] // 2)}:
        scale = Fraction(grid.scale[row, column // group].item())
        offset = Fraction(grid.offset()[row, column // group].item())
        exact = Fraction(values[row, column].item()) / scale + offset if scale else Fraction(0)
        nearest = round(exact)
        # where double precision may round to an integer, either side of it is right
        wanted = {int(exact // 1)} | ({nearest, nearest - 1} if abs(exact - nearest) < 1e-9 else set())
        assert int(lower[row, column]) in {min(max(one, 0), max(2**width - 2, 0)) for one in wanted}


@settings(max_examples=20, deadline=None)
@given(units())
def test_of_the_two_integers_rounding_takes_the_nearer_one(unit):
    wide, width, weights = unit
    values = wide.storage.decode(wide, weights.shape, packed(wide, weights))
    scheme = wide.model_copy(update={"width": width})
    job = SolveBatch(
        weights[None], torch.full((1, len(weights)), width), [], scheme, (len(weights),), near=values[None]
    )
    found = METHODS["rtn"].run(job)
    lower = Neighbours.of(found.grid, values[None]).lower
    errors = [(found.grid.decode(lower + bit) - weights).abs() for bit in (0, 1)]
    assert bool(((found.decode() - weights).abs() <= torch.minimum(*errors) * (1 + 1e-5) + 1e-30).all())


def test_gptq_beside_neighbours_is_better_than_rounding():
    weights = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    wide, scheme = Scheme(width=8), Scheme(width=3)
    values = wide.storage.decode(wide, (64, 128), packed(wide, weights))
    inputs = torch.randn(2000, 128, generator=torch.Generator().manual_seed(1))
    inputs = inputs @ torch.randn(128, 128, generator=torch.Generator().manual_seed(2))
    seen = InputStatistics(128)
    seen.add(inputs, 1.0, False)
    job = SolveBatch(weights[None], torch.full((1, 64), 3), [seen], scheme, (64,), near=values[None])
    lost = {
        name: float(((METHODS[name].run(job).decode()[0] - weights) @ inputs.T).square().sum())
        for name in ("gptq", "rtn")
    }
    assert lost["gptq"] < 0.75 * lost["rtn"]


@pytest.fixture(scope="module")
def profiled(tiny_model, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nested")
    return moqa.profile(tiny_model, [texts["wiki"]], folder / "profile", samples=4, context=32, self_samples=0)


@pytest.fixture(scope="module")
def planned(profiled):
    """8 bits, and one unit in 16."""
    fixed = {"*.layers.1.self_attn.q_proj": 16}
    return moqa.plan(profiled, strategy="uniform", widths=(8,), encodings=("int",), fixed=fixed)


@pytest.fixture(scope="module")
def nested(tiny_model, planned, profiled):
    return moqa.quantize(tiny_model, planned, profiled.folder.parent / "out", profile=profiled, widths_nested=WIDTHS)


@pytest.fixture
def checkpoint(nested, tmp_path):
    return shutil.copytree(nested, tmp_path / "out")


class TestCheckpoint:
    def test_at_its_widest_width_is_the_checkpoint_of_the_plan(self, nested, tiny_model, planned, profiled, tmp_path):
        alone = moqa.quantize(tiny_model, planned, tmp_path / "alone", profile=profiled)
        for path in alone.glob("model-*.safetensors"):
            assert path.read_bytes() == (nested / path.name).read_bytes()
        assert moqa.open_checkpoint(nested, width=8).manifest == moqa.open_checkpoint(nested).manifest

    @pytest.mark.parametrize("width", WIDTHS)
    def test_computes_at_each_width_with_units_of_that_width(self, width, nested):
        model, tokenizer = moqa.load(nested, width=width, kernels="reference")
        found = {
            module.scheme.width
            for module in model.modules()
            if isinstance(module, PackedMatrix) and not module.scheme.is_unquantized
        }
        assert found == {width}
        checkpoint = moqa.open_checkpoint(nested, width=width)
        assert sum(len(tensors) for tensors in map(checkpoint.layer, range(checkpoint.manifest.layers))) > 0
        assert model(**tokenizer("the", return_tensors="pt")).logits.isfinite().all()

    def test_errors_fall_with_the_width(self, nested):
        errors = [
            sum(unit.error or 0.0 for unit in moqa.open_checkpoint(nested, width=width).manifest.units.values())
            for width in WIDTHS
        ]
        assert errors == sorted(errors, reverse=True)

    def test_takes_fewer_bytes_than_separate_checkpoints(self, nested):
        whole = moqa.open_checkpoint(nested)
        apart = [moqa.open_checkpoint(nested, width=width).bytes for width in WIDTHS]
        files = sum(path.stat().st_size for path in nested.glob("*.safetensors"))
        assert whole.bytes + whole.nested_bytes == files
        assert whole.bytes == apart[-1] < files < sum(apart)

    def test_is_sound_and_every_byte_is_covered(self, nested):
        found = verify(nested)
        assert found.faults == []
        assert {path.name for path in nested.glob("width-*")} <= set(found.covered)
        assert len(list(nested.glob("width-*"))) == 3 * found.checkpoint.manifest.layers

    def test_an_adjustment_of_the_widest_width_is_refused_at_others(self, nested):
        checksums = {moqa.open_checkpoint(nested, width=width).manifest.checksum for width in WIDTHS}
        assert len(checksums) == len(WIDTHS)


class TestDamage:
    @pytest.mark.parametrize("change", ["flip", "truncate", "remove", "swap"])
    def test_of_a_file_of_one_width_is_named(self, change, checkpoint):
        path = checkpoint / "width-3-00002-of-00003.safetensors"
        content = path.read_bytes()
        if change == "flip":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        elif change == "truncate":
            path.write_bytes(content[:-64])
        elif change == "remove":
            path.unlink()
        else:
            shutil.copyfile(checkpoint / "width-3-00003-of-00003.safetensors", path)
        with pytest.raises(MoqaError, match=path.name):
            moqa.open_checkpoint(checkpoint, width=3)
        assert any(path.name in fault for fault in verify(checkpoint).faults)
        moqa.open_checkpoint(checkpoint, width=4)  # reads none of it

    @pytest.mark.parametrize("suffix", ["bits", "scale"])
    def test_tensors_of_another_shape_are_refused(self, suffix, checkpoint):
        path = checkpoint / "width-2-00002-of-00003.safetensors"
        tensors = load_file(path)
        name = next(name for name in tensors if name.endswith(suffix))
        save_file(tensors | {name: tensors[name][..., :-1].contiguous()}, path)
        with pytest.raises(MoqaError, match=path.name):
            moqa.open_checkpoint(checkpoint, verify=False, width=2)

    def test_scales_that_are_no_numbers_are_refused(self, checkpoint):
        whole = moqa.open_checkpoint(checkpoint)
        shard = whole.nested_shards[2][0]
        path, name = checkpoint / shard.file, next(name for name in shard.entries if name.endswith(".scale"))
        at = shard.mapped(checkpoint)[name].data_ptr() - next(iter(shard.mapped(checkpoint).values())).data_ptr()
        del at
        content, begin = bytearray(path.read_bytes()), len(shard.header())
        for entry, (dtype, shape) in shard.entries.items():
            if entry == name:
                break
            begin += dtype.itemsize * torch.Size(shape).numel()
        content[begin : begin + 2] = b"\xc0\x7f"
        path.write_bytes(content)
        with pytest.raises(MoqaError, match=r"scale holds NaN"):
            moqa.open_checkpoint(checkpoint, verify=False, width=2)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda nested: nested["2"]["units"].popitem(), "is not the same at 2 bits"),
            (lambda nested: nested["2"]["files"].popitem(), "lists other files of 2 bits"),
            (lambda nested: nested.update({"8": nested["4"]}), "cannot have 8 bits nested"),
            (lambda nested: nested.update({"17": nested["4"]}), "nested"),
            (lambda nested: nested["4"].pop("files"), "files"),
        ],
    )
    def test_of_the_manifest_is_one_line(self, change, message, checkpoint):
        data = json.loads((checkpoint / MANIFEST).read_text())
        change(data["nested"])
        (checkpoint / MANIFEST).write_text(json.dumps(data | {"checksum": checksum(data)}))
        with pytest.raises(MoqaError, match=message) as raised:
            moqa.open_checkpoint(checkpoint)
        assert "\n" not in str(raised.value)

    def test_older_versions_refuse_it(self, nested):
        assert json.loads((nested / MANIFEST).read_text())["format"] == 3
