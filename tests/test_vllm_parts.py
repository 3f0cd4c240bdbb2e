"""What the plug-in for vLLM does without vLLM: places in a buffer, parts of units, names, the operators."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import stored_tensors
from exact import CODED
from hypothesis import given, settings
from hypothesis import strategies as st
from long_work import refusal

from moqa.format.layout import entry_bytes
from moqa.format.manifest import StoredUnit
from moqa.format.reader import read_checkpoint
from moqa.format.scheme import Scheme
from moqa.integrations.vllm import ops
from moqa.integrations.vllm.flat import FlatBuffer
from moqa.integrations.vllm.parts import HALO, UnitPart, count_of, divides
from moqa.integrations.vllm.units import UnitNames, place_of
from moqa.integrations.vllm.version import check_version
from moqa.kernels import ExpertStack, PackedMatrix, find_kernels
from moqa.runtime.variants import ExpertsVariant, Variants

SCHEMES = (*(Scheme(width=width) for width in (1, 3, 8)), Scheme(width=4, symmetric=True), *CODED, Scheme(width=16))
ENTRIES = {
    "a.p0": (torch.uint8, (1, 3, 64)),
    "a.scale": (torch.bfloat16, (1, 1, 16)),
    "b.weight": (torch.bfloat16, (5, 3)),
}


def unit(scheme, shape, layer=0, role="attention"):
    return StoredUnit(layer=layer, role=role, shape=shape, scheme=scheme, method="rtn", error=None)


def stored(scheme, shape):
    tensors = stored_tensors("n", torch.randn(shape, generator=torch.Generator().manual_seed(1)), scheme)
    return {name.removeprefix("n."): tensor for name, tensor in tensors.items()}


def any_bytes(scheme, shape):
    """A unit of any codes, all of which are valid."""
    random, found = torch.Generator().manual_seed(1), {}
    for suffix, (dtype, stored_shape) in scheme.tensors(shape).items():
        values = torch.randint(0, 256, stored_shape, generator=random)
        found[suffix] = values.to(dtype) if dtype == torch.uint8 else (values / 256 + 0.1).to(dtype)
    return found


def matrix(scheme, shape):
    return PackedMatrix(scheme, shape, stored(scheme, shape))


class TestBuffer:
    def filled(self, leave=()):
        buffer = FlatBuffer(ENTRIES)
        memory = torch.zeros(buffer.bytes, dtype=torch.uint8)
        tensors = {n: torch.randint(0, 99, shape).to(dtype) for n, (dtype, shape) in ENTRIES.items() if n not in leave}
        for name, tensor in tensors.items():
            buffer.fill(memory, name, tensor)
        return buffer, memory, tensors

    def test_keeps_tensors_apart_and_aligned(self):
        buffer, memory, tensors = self.filled()
        assert all(offset % 64 == 0 for offset in buffer.offsets.values())
        assert all(torch.equal(buffer.view(memory, name), tensor) for name, tensor in tensors.items())
        assert buffer.bytes == 192 + 64 + 64
        buffer.check_full()

    @pytest.mark.parametrize("name", ENTRIES)
    def test_a_missing_tensor_is_refused(self, name):
        buffer, _, tensors = self.filled(leave=(name,))
        there = sum(tensor.nbytes for tensor in tensors.values())
        wanted = sum(map(entry_bytes, ENTRIES.values()))
        assert refusal(buffer.check_full) == f"the checkpoint lacks {name}: {there} of {wanted} bytes were filled"

    def test_refuses_what_has_no_place(self):
        buffer, memory, tensors = self.filled(leave=("b.weight",))
        assert "twice" in refusal(buffer.fill, memory, "a.p0", tensors["a.p0"])
        assert "no place" in refusal(buffer.fill, memory, "c.p0", tensors["a.p0"])
        assert "its place is for" in refusal(buffer.fill, memory, "b.weight", torch.zeros(3, 5, dtype=torch.bfloat16))


class TestParts:
    @settings(max_examples=100)
    @given(data=st.data())
    def test_are_the_rows_and_inputs_of_the_unit(self, data):
        scheme = data.draw(st.sampled_from(SCHEMES))
        by, count = data.draw(st.sampled_from(["rows", "inputs"])), data.draw(st.sampled_from([2, 3, 4]))
        shape = (16 * count * data.draw(st.integers(1, 3)), 64 * count * data.draw(st.integers(1, 2)))
        index, halo = data.draw(st.integers(0, count - 1)), HALO if by == "rows" else 0
        silent = HALO if by == "inputs" and data.draw(st.booleans()) else 0
        assert divides(scheme, shape, count, by)
        whole = any_bytes(scheme, shape)
        part = UnitPart(scheme, shape, count, index, by, silent_rows=halo, silent_inputs=silent)
        found = PackedMatrix(scheme, part.shape, part.cut(whole)).dense()
        (top, bottom), (left, right) = part.rows, part.inputs
        expected = PackedMatrix(scheme, shape, whole).dense()[top:bottom, left:right]
        assert torch.equal(found[: bottom - top, : right - left], expected)
        assert not found[bottom - top :].any()

    def test_one_part_is_the_unit_itself(self):
        whole = stored(Scheme(width=3), (24, 100))
        part = UnitPart(Scheme(width=3), (24, 100))
        assert part.shape == (24, 100)
        assert all(tensor is whole[suffix] for suffix, tensor in part.cut(whole).items())

    def test_sizes_that_do_not_divide_name_those_that_do(self):
        down = unit(Scheme(width=4, group_size=128), (256, 768))
        said = refusal(count_of, "model.layers.0.mlp.experts.0.down_proj", down, (256, 96), "inputs")
        assert said == (
            "--tensor-parallel-size 8 does not divide the 768 inputs of model.layers.0.mlp.experts.0.down_proj in "
            "groups of 128: what does: 1, 2, 3, 6"
        )
        assert count_of("down_proj", down, (256, 256), "inputs") == 3
        assert count_of("down_proj", down, (256, 768), "inputs") == 1

    def test_a_layer_of_another_size_is_refused(self):
        up = unit(Scheme(width=4), (768, 256))
        assert "the checkpoint has (768, 256)" in refusal(count_of, "up_proj", up, (384, 128), "rows")
        assert "the checkpoint has (768, 256)" in refusal(count_of, "up_proj", up, (1536, 256), "rows")


PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


class TestNames:
    @pytest.fixture
    def names(self, sound_checkpoint):
        manifest = read_checkpoint(sound_checkpoint).manifest
        units = {f"model.layers.0.self_attn.{p}_proj": unit(Scheme(width=2), (32, 32)) for p in "qkv"}
        units |= {
            f"model.layers.0.mlp.experts.{expert}.{part}_proj": unit(Scheme(width=2), (32, 32), role="expert")
            for expert in range(2)
            for part in ("gate", "up", "down")
        }
        kept = {"model.layers.0.mlp.gate.weight": next(iter(manifest.kept.values()))}
        return UnitNames(manifest.model_copy(update={"units": units, "kept": kept}))

    def test_of_united_layers(self, names):
        found = names.linear("language_model.model.layers.0.self_attn.qkv_proj", PACKED)
        assert found == [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
        assert names.linear("model.layers.0.mlp.gate", PACKED) is None
        assert names.linear("lm_head", PACKED) is None
        assert place_of("lm_head") is None

    def test_of_experts(self, names):
        found = names.experts("model.layers.0.block_sparse_moe.experts", 2)
        assert found["up_proj"] == [f"model.layers.0.mlp.experts.{expert}.up_proj" for expert in range(2)]

    def test_what_is_not_there_is_refused(self, names):
        assert "self_attn.o_proj of layer 0" in refusal(names.linear, "model.layers.0.self_attn.o_proj", PACKED)
        assert "lacks model.layers.0.mlp.experts.2.down_proj" in refusal(names.experts, "model.layers.0.mlp.experts", 3)
        assert "has model.layers.0.mlp.experts.1.down_proj" in refusal(names.experts, "model.layers.0.mlp.experts", 1)

    def test_what_nobody_asks_for_is_refused(self, names):
        names.linear("model.layers.0.self_attn.qkv_proj", PACKED)
        assert "vLLM has no layer for model.layers.0.mlp.experts.0" in refusal(names.check_all_found, True)
        names.experts("model.layers.0.mlp.experts", 2)
        names.check_all_found(True)


class TestOperators:
    def linear(self, schemes, rows):
        matrices = [matrix(scheme, (out, 64)) for scheme, out in zip(schemes, rows, strict=True)]
        weights = torch.zeros(1, dtype=torch.uint8)
        layer = ops.ServedLinear(matrices, list(rows), find_kernels())
        ops.serve(weights, layer)
        return weights, layer, torch.cat([one.dense() for one in matrices])

    def experts(self):
        parts = [
            [matrix(Scheme(width=2 + expert), shape) for expert in range(3)] for shape in ((32, 64), (32, 64), (64, 32))
        ]
        layer = ops.ServedExperts(ExpertStack(*parts, "silu"), find_kernels(), Variants(), 0)
        weights = torch.zeros(1, dtype=torch.uint8)
        ops.serve(weights, layer)
        return weights, layer

    def test_linear_is_the_matrices_side_by_side(self):
        weights, _layer, dense = self.linear((Scheme(width=3), Scheme(width=8), Scheme(width=16)), (32, 16, 16))
        x, bias = torch.randn(5, 64), torch.randn(64)
        found = torch.ops.moqa.linear(x, weights, bias, 64)
        assert (found - (x @ dense.T + bias)).abs().max() < 0.05 * found.abs().max()

    def test_compiled_graphs_have_them_whole(self):
        weights, _layer, _ = self.linear((Scheme(width=3), Scheme(width=8)), (32, 16))
        expert_weights, _experts = self.experts()

        def model(x, index, gates):
            y = torch.ops.moqa.experts(x, expert_weights, index, gates, None)
            return torch.ops.moqa.linear(y + x, weights, None, 48) * 2

        inputs = torch.randn(5, 64), torch.randint(0, 3, (5, 2), dtype=torch.int32), torch.rand(5, 2)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(*inputs), model(*inputs))

    def test_experts_of_other_processes_add_nothing(self):
        weights, _layer = self.experts()
        x, gates = torch.randn(4, 64), torch.rand(4, 2)
        places = torch.tensor([-1, 0, -1, 1, 2], dtype=torch.int32)  # of five experts, this process has three
        index = torch.tensor([[1, 0], [3, 4], [0, 2], [2, 1]], dtype=torch.int32)
        found = torch.ops.moqa.experts(x, weights, index, gates, places)
        local = torch.tensor([[0, 7], [1, 2], [7, 7], [7, 0]])
        assert torch.equal(found, torch.ops.moqa.experts(x, weights, local, gates, None))
        assert not found[2].any()

    @pytest.mark.parametrize("encoding", ["int", "table", "trellis"])
    def test_parts_of_experts_add_up_to_them(self, encoding):
        kernels, x = find_kernels(), torch.randn(6, 64)
        index, gates = torch.randint(0, 2, (6, 2)), torch.rand(6, 2)
        shapes = {"gate": (128, 64), "up": (128, 64), "down": (64, 128)}
        # another encoding in the second expert, which has no rows above that count
        schemes = (Scheme(width=3, encoding=encoding), Scheme(width=4))
        whole = {n: [(scheme, any_bytes(scheme, shape)) for scheme in schemes] for n, shape in shapes.items()}

        def layer(count, at):
            silent = HALO if count > 1 and encoding == "trellis" else 0
            stack = []
            for name, shape in shapes.items():
                by, more = (
                    ("inputs", {"silent_inputs": silent}) if name == "down" else ("rows", {"silent_rows": silent})
                )
                parts = [(UnitPart(scheme, shape, count, at, by, **more), stored) for scheme, stored in whole[name]]
                stack.append([PackedMatrix(part.scheme, part.shape, part.cut(stored)) for part, stored in parts])
            return kernels.experts(ExpertStack(*stack, "silu"), x, index, gates)

        expected = layer(1, 0)
        assert (layer(2, 0) + layer(2, 1) - expected).abs().max() < 1e-5 * expected.abs().max()

    def test_variants_are_looked_up_at_every_call(self):
        weights, layer = self.experts()
        x, index, gates = torch.randn(4, 64), torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1)
        before = torch.ops.moqa.experts(x, weights, index, gates, None)
        layer.variants.hold(
            "other", {0: ExpertsVariant(matrices={(0, "down_proj"): matrix(Scheme(width=8), (64, 32))})}
        )
        layer.variants.switch("other")
        assert not torch.equal(torch.ops.moqa.experts(x, weights, index, gates, None), before)
        layer.variants.switch(None)
        assert torch.equal(torch.ops.moqa.experts(x, weights, index, gates, None), before)

    def test_moved_weights_are_noticed(self):
        with pytest.raises(RuntimeError, match="were moved"):
            torch.ops.moqa.linear(torch.randn(1, 64), torch.zeros(1, dtype=torch.uint8), None, 64)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core only")
def test_threads_of_the_kernels_run_on_all_cores_of_a_process():
    code = """if True:
        import os, torch
        from moqa.integrations.vllm.threads import use_all_cores
        torch.set_num_threads(2)
        both = sorted(os.sched_getaffinity(0))[:2]
        os.sched_setaffinity(0, both[:1])  # as OpenMP does with the thread that calls it
        os.environ["GOMP_CPU_AFFINITY"] = " ".join(map(str, both))
        before = set(os.listdir("/proc/self/task"))
        use_all_cores(torch.device("cpu"))
        new = set(os.listdir("/proc/self/task")) - before
        print([sorted(os.sched_getaffinity(int(task))) == both for task in new], len(os.sched_getaffinity(0)))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[True] 1\n"


@pytest.mark.parametrize(
    ("version", "tested"), [("0.31.9", False), ("0.32.0", True), ("0.32.1+cpu", True), ("0.33.0rc1", False)]
)
def test_other_versions_are_refused(version, tested):
    if tested:
        check_version(version)
    else:
        assert f"vLLM {version} was not tested" in refusal(check_version, version)
