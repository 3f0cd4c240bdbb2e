"""Models that other tools have quantized: read as their formats define them, compared with originals, never fitted."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from gguf_models import MODELS, make_model
from hypothesis import given
from hypothesis import strategies as st
from long_work import refusal
from safetensors.torch import load_file, save_file

import moqa
from moqa.models.stored import open_stored
from moqa.models.view import open_model
from moqa.originals.words import unpack_words
from moqa.planning import for_file, plan
from moqa.profiling import profile
from moqa.reports.rows import Row
from moqa.storage.artifact import write_json, write_sealed

GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(integers: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., n * bits / 32] int32: one long number for each row, its lowest bits first."""
    *shape, count = integers.shape
    rows = []
    for row in integers.reshape(-1, count).tolist():
        number = sum(value << (bits * place) for place, value in enumerate(row))
        size = -(-count * bits // 32)
        rows.append([(number >> (32 * word)) & 0xFFFFFFFF for word in range(size)])
    return torch.tensor(rows, dtype=torch.int64).to(torch.uint32).view(torch.int32).reshape(*shape, -1)


@given(st.integers(1, 8), st.integers(1, 4), st.data())
def test_integers_in_words_are_found_again(bits, blocks, data):
    integers = torch.tensor(
        data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=32 * blocks, max_size=32 * blocks))
    )
    assert torch.equal(unpack_words(words(integers, bits), bits), integers)


class Quantized:
    """A matrix on a grid with zero-points, in groups of inputs."""

    def __init__(self, weight: torch.Tensor, bits: int) -> None:
        groups = weight.float().unflatten(1, (-1, GROUP))
        low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
        self.bits, self.top = bits, 2**bits - 1
        self.scale = ((high - low) / self.top).half()
        self.zero = (-low / self.scale.float()).round().clamp(1, self.top).long()
        self.integers = (
            (groups / self.scale.float()[..., None] + self.zero[..., None]).round().clamp(0, self.top).long()
        )

    @property
    def weight(self) -> torch.Tensor:
        return ((self.integers - self.zero[..., None]) * self.scale.float()[..., None]).flatten(1)

    def gptq(self, offset: int) -> dict[str, torch.Tensor]:
        return {
            "qweight": words(self.integers.flatten(1), self.bits).T.contiguous(),
            "qzeros": words((self.zero - offset).T.contiguous(), self.bits), "scales": self.scale.T.contiguous(),
            "g_idx": (torch.arange(self.integers[0].numel()) // GROUP).int(),
        }  # fmt: skip

    def awq(self) -> dict[str, torch.Tensor]:
        def packed(columns: torch.Tensor) -> torch.Tensor:
            return words(columns.unflatten(1, (-1, 8))[..., list(AWQ_ORDER)].flatten(1), 4)

        integers, zero = self.integers.flatten(1).T.contiguous(), self.zero.T.contiguous()
        return {"qweight": packed(integers), "qzeros": packed(zero), "scales": self.scale.T.contiguous()}

    def packed(self) -> dict[str, torch.Tensor]:
        return {
            "weight_packed": words(self.integers.flatten(1), self.bits), "weight_scale": self.scale,
            "weight_zero_point": words(self.zero.T.contiguous(), self.bits).T.contiguous(),
            "weight_shape": torch.tensor(self.weight.shape),
        }  # fmt: skip

    def in_bytes(self) -> dict[str, torch.Tensor]:
        half = 2 ** (self.bits - 1)
        return {"weight": (self.integers.flatten(1) - half).to(torch.int8), "weight_scale": self.scale,
                "weight_zero_point": (self.zero - half).to(torch.int8)}  # fmt: skip


def _compressed(form: str, bits: int) -> dict:
    weights = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": GROUP}
    return {"quant_method": "compressed-tensors", "format": form,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}  # fmt: skip


FORMATS = {
    "gptq 4": (lambda q: q.gptq(1), 4, {"quant_method": "gptq", "bits": 4, "group_size": GROUP}),
    "gptq 3": (lambda q: q.gptq(1), 3, {"quant_method": "gptq", "bits": 3, "group_size": GROUP}),
    "gptq v2": (lambda q: q.gptq(0), 8, {"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq_v2"}),
    "awq": (Quantized.awq, 4, {"quant_method": "awq", "bits": 4, "version": "gemm"}),
    "compressed 4": (Quantized.packed, 4, _compressed("pack-quantized", 4)),
    "compressed 8": (Quantized.packed, 8, _compressed("pack-quantized", 8)),
    "bytes": (Quantized.in_bytes, 8, _compressed("int-quantized", 8)),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("imported") / "model")


def imported(model: Path, out: Path, kind: str) -> dict[str, torch.Tensor]:
    """Write a model in a format; returns its plain weights."""
    store, bits, options = FORMATS[kind]
    shutil.copytree(model, out)
    plain, stored = load_file(model / "model.safetensors"), {}
    for name, weight in plain.items():
        if "_proj" in name:
            quantized = Quantized(weight, bits)
            plain[name] = quantized.weight
            stored |= {f"{name.removesuffix('weight')}{end}": tensor for end, tensor in store(quantized).items()}
        else:
            stored[name] = weight
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": options}))
    return plain


@pytest.mark.parametrize("kind", FORMATS)
class TestFormats:
    def test_tensors_are_read_as_the_format_defines_them(self, model, tmp_path, kind):
        plain = imported(model, tmp_path / "other", kind)
        _, stored = open_stored(tmp_path / "other", imported=True)
        assert stored.headers.keys() == plain.keys()
        with stored.opened() as on_disk:
            for name, weight in plain.items():
                assert torch.equal(on_disk(name)[...].float(), weight.float()), name

    def test_it_is_evaluated_against_its_original(self, model, texts, tmp_path, kind):
        imported(model, tmp_path / "other", kind)
        found = moqa.evaluate(tmp_path / "other", [texts["wiki"]], against=model, context=32, windows=2)
        assert 0 < found.distributions["wiki"].kl_divergence < 1
        assert FORMATS[kind][1] < found.bits_per_weight < FORMATS[kind][1] + 2.5

    def test_nothing_is_fitted_to_it(self, model, texts, tmp_path, kind):
        imported(model, tmp_path / "other", kind)
        message = refusal(lambda: profile(tmp_path / "other", [texts["wiki"]], tmp_path / "profile", samples=2))
        assert re.search(r"is already quantized \(.*\): give the original", message)


class TestRefusals:
    @pytest.fixture
    def other(self, model, tmp_path):
        imported(model, tmp_path / "other", "gptq 4")
        return tmp_path / "other"

    def evaluate(self, other, texts, **options):
        return refusal(lambda: moqa.evaluate(other, [texts["wiki"]], context=32, windows=1, **options))

    def configure(self, other, **changes):
        config = json.loads((other / "config.json").read_text())
        config["quantization_config"] |= changes
        (other / "config.json").write_text(json.dumps(config))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"quant_method": "exl3"}, "quantized in an unknown format (exl3): moqa reads fp8, mxfp4, gptq, awq"),
            ({"bits": 5}, "is gptq of 5 bits: moqa reads 2, 3, 4, 8"),
            ({"bits": 2}, "should be [256, 96]"),
            ({"quant_method": "awq", "version": "gemv"}, "is awq of 4 bits, version gemv: moqa reads 4 bits, gemm"),
            ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "compressed-tensors of format marlin-24"),
        ],
    )
    def test_variants_that_are_not_read_are_named(self, other, texts, changes, message):
        self.configure(other, **changes)
        assert message in self.evaluate(other, texts)

    def test_a_missing_part_is_named(self, other, texts):
        stored = load_file(other / "model.safetensors")
        del stored["model.layers.0.mlp.experts.1.up_proj.scales"]
        save_file(stored, other / "model.safetensors")
        assert "lacks model.layers.0.mlp.experts.1.up_proj.scales" in self.evaluate(other, texts)

    def test_another_model_is_not_its_original(self, other, texts, tmp_path):
        message = self.evaluate(other, texts, against=make_model(tmp_path / "llama", "llama"))
        assert "is a llama of 8192 tokens" in message

    def test_without_its_original_there_is_no_divergence(self, other, texts):
        found = moqa.evaluate(other, [texts["wiki"]], context=32, windows=1)
        assert found.against is None
        assert found.distributions["wiki"].kl_divergence is None


class TestGguf:
    @pytest.fixture(scope="class")
    def file(self, model, texts, tmp_path_factory):
        folder = tmp_path_factory.mktemp("gguf")
        made = profile(model, [texts["wiki"]], folder / "profile", samples=4, context=32, self_samples=1)
        return self.export(plan(made, "5bpw", engine="llama.cpp", encodings=("q4_k", "q6_k", "q8_0", "iq4_nl")), folder)

    def export(self, made, folder: Path) -> Path:
        write_sealed(for_file(made, folder / "plan.json"), folder / "plan.json")
        moqa.export(folder / "plan.json", folder / "x.gguf", to="gguf")
        return folder / "x.gguf"

    def test_a_file_is_evaluated_with_the_small_files_of_its_original(self, model, file, texts):
        found = moqa.evaluate(file, [texts["wiki"]], against=model, context=32, windows=2)
        assert 0 < found.distributions["wiki"].kl_divergence < 0.1
        assert found.bytes == file.stat().st_size
        assert found.bits_per_weight == pytest.approx(5, abs=0.1)

    def test_a_report_does_not_take_it_for_an_original(self, model, file, texts, tmp_path):
        for name, against in {"original": None, "theirs": model}.items():
            found = moqa.evaluate(file if against else model, [texts["wiki"]], against=against, context=32, windows=1)
            assert found.format == ("gguf" if against else None)
            write_json(found, tmp_path / f"{name}.json")
        moqa.report([tmp_path / "original.json", tmp_path / "theirs.json"], tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text()
        assert "gguf x.gguf" in page
        assert not Row(found, {"known": (), "novel": ("wiki",)}).original

    def test_it_needs_its_original(self, file, texts):
        message = refusal(lambda: moqa.evaluate(file, [texts["wiki"]]))
        assert "has no config.json of transformers: give the original with --against MODEL" in message

    def test_a_damaged_file_is_refused(self, model, file, texts, tmp_path):
        (tmp_path / "x.gguf").write_bytes(file.read_bytes()[:5000])
        message = refusal(lambda: moqa.evaluate(tmp_path / "x.gguf", [texts["wiki"]], against=model))
        assert "x.gguf is no sound GGUF file" in message

    @pytest.fixture(scope="class")
    def parts(self, file):
        """The file in three, as `llama-gguf-split` cuts it."""
        return divided(file, file.parent / "parts", 3)

    def test_a_model_in_parts_is_evaluated_as_the_whole(self, model, file, parts, texts):
        whole, found = (
            moqa.evaluate(path, [texts["wiki"]], against=model, context=32, windows=1) for path in (file, parts[1])
        )
        assert found.distributions == whole.distributions
        assert found.bits_per_weight == whole.bits_per_weight
        assert found.bytes == sum(part.stat().st_size for part in parts)

    def test_a_missing_part_is_named(self, model, parts, texts, tmp_path):
        shutil.copy(parts[0], tmp_path)
        message = refusal(lambda: moqa.evaluate(tmp_path / parts[0].name, [texts["wiki"]], against=model))
        assert "x-00002-of-00003.gguf is missing: the model has 3 files" in message

    def test_parts_under_wrong_names_are_refused(self, model, parts, texts, tmp_path):
        for number, part in enumerate((parts[0], parts[2], parts[1]), start=1):
            shutil.copy(part, tmp_path / f"x-{number:05}-of-00003.gguf")
        message = refusal(lambda: moqa.evaluate(tmp_path / parts[0].name, [texts["wiki"]], against=model))
        assert "x-00002-of-00003.gguf is part 3 of 3: name parts as llama-gguf-split does" in message

    def test_a_part_that_lost_its_name_is_refused(self, model, parts, texts, tmp_path):
        shutil.copy(parts[1], tmp_path / "x.gguf")
        message = refusal(lambda: moqa.evaluate(tmp_path / "x.gguf", [texts["wiki"]], against=model))
        assert "x.gguf is part 2 of 3: name parts as llama-gguf-split does" in message

    def test_a_file_of_another_family_is_refused(self, file, texts, tmp_path):
        other = make_model(tmp_path / "llama", "llama")
        message = refusal(lambda: moqa.evaluate(file, [texts["wiki"]], against=other))
        assert "is a qwen3moe: config.json beside it says llama" in message

    @pytest.mark.parametrize("kind", MODELS)
    def test_rows_of_every_family_are_in_the_original_order(self, kind, texts, tmp_path):
        folder = make_model(tmp_path / "model", kind)
        made = profile(folder, [texts["wiki"]], tmp_path / "profile", samples=2, context=16, sensitivity=False,
                       self_samples=0)  # fmt: skip
        self.export(plan(made, strategy="uniform", engine="llama.cpp", widths=(16,)), tmp_path)
        beside = tmp_path / "beside"
        beside.mkdir()
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(folder / name, beside / name)
        shutil.copy(tmp_path / "x.gguf", beside / "x.gguf")
        ours, theirs = open_model(folder), open_model(beside, imported=True)
        for name, tensor in ours.model.state_dict().items():
            assert torch.equal(theirs.model.state_dict()[name], tensor), name


def divided(file: Path, folder: Path, count: int) -> list[Path]:
    """A GGUF file in parts: settings in the first, tensors in all."""
    folder.mkdir()
    whole = GGUFReader(file)
    parts = [folder / f"x-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    for number, part in enumerate(parts):
        writer = GGUFWriter(part, whole.fields["general.architecture"].contents())
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(whole.tensors))
        for tensor in whole.tensors[number::count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return parts
