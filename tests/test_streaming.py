"""Models larger than memory: a layer at a time, within a limit, at a cost that is known beforehand."""

import json
import subprocess
import sys
from functools import partial
from itertools import count

import pytest
import torch

from moqa.errors import LittleMemoryError, MoqaError
from moqa.estimate import estimate, working_sets
from moqa.forecast.footprint import SLACK, as_many
from moqa.forecast.trial import Stopwatch
from moqa.forecast.working_set import WorkingSet
from moqa.memory.limit import MemoryLimit
from moqa.memory.process import resident
from moqa.methods import METHODS
from moqa.models.layerwise import LayerwiseModel
from moqa.models.view import open_model
from moqa.originals import OriginalReader
from moqa.originals.folder import tensors
from moqa.planning import plan
from moqa.profiling import profile
from moqa.quantization import quantize
from moqa.quantization import run as driver

MODEL = "reference/model"


@pytest.fixture(scope="module")
def streamed(tiny_model):
    return open_model(tiny_model, keep=False)


@pytest.fixture(scope="module")
def profiled(tiny_model, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("profile") / "tiny"
    return profile(tiny_model, [texts["wiki"]], out, samples=6, context=32, self_samples=2)


def there(view):
    """Decoder layers that have memory."""
    return [n for n, layer in enumerate(view.blocks) if not any(p.is_meta for p in layer.parameters())]


class TestPieces:
    def test_a_layer_is_read_when_it_is_used(self, streamed):
        stages = LayerwiseModel(streamed.model)
        hidden = stages.embed(torch.arange(8)[None])
        assert there(streamed) == []
        for layer in range(stages.depth):
            hidden = stages.run_block(layer, hidden)
            assert there(streamed) == [layer]
        stages.head(hidden)
        assert there(streamed) == []

    def test_computes_what_the_whole_model_does(self, tiny_model, streamed):
        whole, tokens = open_model(tiny_model), torch.arange(24).view(2, 12)
        assert torch.equal(streamed.model(tokens).logits, whole.model(tokens).logits)
        assert all(torch.equal(streamed.weight(u).float(), whole.weight(u)) for u in whole.units.values())
        ours, expected = streamed.kept_on_disk(), whole.kept_on_disk()
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[name], expected[name]) for name in expected)

    def test_gradients_are_those_of_the_whole_model(self, tiny_model, streamed):
        found = []
        for view in (streamed, open_model(tiny_model)):
            stages = LayerwiseModel(view.model)
            hidden = stages.embed(torch.arange(16)[None]).requires_grad_(True)
            found.append(torch.autograd.grad(stages.run_block(1, hidden).square().sum(), hidden)[0])
        assert torch.equal(*found)

    def test_experts_stay_in_the_dtype_of_the_file(self, tiny_model, streamed):
        stored = {tensor.dtype for name, tensor in tensors(tiny_model) if ".experts." in name}
        streamed.need(1)
        assert {streamed.experts(1).down_proj.dtype, streamed.experts(1).gate_up_proj.dtype} == stored

    def test_memory_is_used_again_when_nobody_holds_it(self, streamed):
        streamed.read_ahead(0)
        first = streamed.experts(0)
        streamed.need(0)
        held, values = first.down_proj[1:2], first.down_proj.clone()
        place = first.down_proj.data_ptr()
        streamed.need(1)
        between = streamed.experts(1).down_proj.data_ptr()
        streamed.need(0)
        assert first.down_proj.data_ptr() == between != place
        assert torch.equal(first.down_proj, values)
        assert torch.equal(held, values[1:2])

    def test_kept_entries_are_told_without_reading_the_ends(self, tiny_model):
        view = open_model(tiny_model, keep=False)
        entries = view.kept_entries()
        assert entries == {name: (t.dtype, tuple(t.shape)) for name, t in view.kept_on_disk().items()}


ROOMS = (
    partial(WorkingSet.to_quantize, tokens=192, packed=100_000),
    partial(WorkingSet.to_profile, probes=4),
)


class TestMemory:
    @pytest.mark.parametrize(
        ("text", "limit"), [("4GiB", 2**32), ("1.5 GiB", 3 * 2**29), ("800MB", 800 * 10**6), ("123", 123)]
    )
    def test_sizes(self, text, limit):
        assert MemoryLimit.parse(text).limit == limit

    @pytest.mark.parametrize("text", ["", "much", "-1GiB", "4 GiB or so", "1.2.3G"])
    def test_no_sizes(self, text):
        with pytest.raises(MoqaError, match=r"--max-memory .* is not a size"):
            MemoryLimit.parse(text)

    def test_free_memory_holds_a_small_model(self, tiny_model):
        assert MemoryLimit.free().holds(OriginalReader(tiny_model).values)
        assert not MemoryLimit(resident()).holds(OriginalReader(tiny_model).values)

    @pytest.mark.parametrize("within", ROOMS, ids=["quantize", "profile"])
    def test_too_little_is_refused_with_what_would_do(self, within, streamed):
        with pytest.raises(MoqaError, match=r"--max-memory 10MiB cannot hold one block .* at least [0-9.]+ GiB "):
            within(MemoryLimit.parse("10MiB"), streamed, METHODS["gptq"])

    @pytest.mark.parametrize("within", ROOMS, ids=["quantize", "profile"])
    def test_enough_memory_holds_all_experts(self, within, streamed):
        room = within(MemoryLimit.free(), streamed, METHODS["gptq"])
        assert room.experts == 6
        assert room.peak > resident() // 2

    def test_less_memory_means_fewer_experts(self):
        found = [as_many(MemoryLimit(size), fixed=500, each=100, count=8, least=0) for size in (660, 1000, 10_000)]
        assert found == [1, 4, 8]

    def test_slices_of_experts_change_nothing(self, tiny_model, profiled, tmp_path, monkeypatch):
        chosen = plan(profiled, strategy="uniform", widths=(3,))
        whole = quantize(tiny_model, chosen, tmp_path / "whole", profile=profiled)
        room = WorkingSet(experts=3, peak=0)
        monkeypatch.setattr(driver.WorkingSet, "to_quantize", lambda *_, **__: room)
        sliced = quantize(tiny_model, chosen, tmp_path / "sliced", profile=profiled)
        for path in whole.glob("*.safetensors"):
            assert path.read_bytes() == (sliced / path.name).read_bytes()

    def test_a_method_without_data_reads_ahead_where_two_layers_fit(self, streamed, monkeypatch):
        monkeypatch.setattr("moqa.forecast.footprint.resident", lambda: 0)
        much = WorkingSet.to_quantize(MemoryLimit(2**40), streamed, METHODS["rtn"], 0, 100_000)
        little = WorkingSet.to_quantize(MemoryLimit(int(much.peak * SLACK) - 1), streamed, METHODS["rtn"], 0, 100_000)
        assert (little.ahead, much.ahead) == (False, True)
        assert little.peak < much.peak

    @pytest.mark.parametrize("ahead", [False, True])
    def test_reading_ahead_changes_nothing(self, ahead, tiny_model, profiled, tmp_path, monkeypatch):
        chosen = plan(profiled, strategy="uniform", widths=(3,))
        at_once = quantize(
            tiny_model, chosen, tmp_path / "at once", method="rtn", profile=profiled, view=open_model(tiny_model)
        )
        monkeypatch.setattr(
            driver.WorkingSet,
            "to_quantize",
            lambda *_, **__: WorkingSet(experts=6, peak=0, ahead=ahead),
        )
        out = quantize(tiny_model, chosen, tmp_path / "out", method="rtn", profile=profiled)
        for path in at_once.glob("*.safetensors"):
            assert path.read_bytes() == (out / path.name).read_bytes()

    def test_a_profile_in_slices_is_the_same(self, tiny_model, texts, profiled, tmp_path, monkeypatch):
        monkeypatch.setattr(WorkingSet, "to_profile", lambda *_: WorkingSet(experts=3, peak=0))
        sliced = profile(tiny_model, [texts["wiki"]], tmp_path / "tiny", samples=6, context=32, self_samples=2)
        for name in ("wiki", "self"):
            assert torch.allclose(sliced.sensitivity(name), profiled.sensitivity(name), rtol=1e-3, atol=1e-9)


class TestEstimate:
    def test_bytes_are_exact(self, tiny_model, profiled, tmp_path):
        chosen = plan(profiled, strategy="uniform", widths=(3,))
        cost = estimate(tiny_model, chosen, profiled)
        out = quantize(tiny_model, chosen, tmp_path / "out", profile=profiled)
        assert cost.checkpoint_bytes == sum(path.stat().st_size for path in out.glob("*.safetensors"))
        assert cost.seconds > 0
        assert cost.peak_bytes > resident() // 2

    def test_a_comparison_with_others_takes_its_time_and_memory(self, tiny_model, profiled, monkeypatch):
        # three estimates on a machine whose pace is the same for all of them
        monkeypatch.setattr("moqa.estimate.Stopwatch", lambda: Stopwatch(map(float, count()).__next__, lambda: 0.0))
        monkeypatch.setattr("moqa.estimate.storage_rate", lambda _: 1e9)
        chosen = plan(profiled, strategy="uniform", widths=(3,))
        without, some, more = (estimate(tiny_model, chosen, profiled, held_out=tokens) for tokens in (0, 2**20, 2**22))
        assert without.seconds < some.seconds < more.seconds
        assert without.peak_bytes < some.peak_bytes < more.peak_bytes

    @pytest.mark.parametrize("held_out", [0, 2**22])
    def test_memory_that_would_do_is_that_of_the_step_that_needs_most(self, held_out, profiled, streamed, monkeypatch):
        monkeypatch.setattr("moqa.forecast.footprint.resident", lambda: 2**28)
        monkeypatch.setattr(MemoryLimit, "holds", lambda *_: False)
        chosen = plan(profiled, strategy="uniform", widths=(3,))

        def peak(memory):
            rooms = working_sets(streamed, chosen, profiled, METHODS["gptq"], memory, profiled=False, held_out=held_out)
            return max(room.peak for room in rooms)

        with pytest.raises(LittleMemoryError, match="at least") as refused:
            peak(MemoryLimit(2**20, "1MiB"))
        least = refused.value.least
        assert peak(MemoryLimit(least + 1, "least")) <= least
        with pytest.raises(LittleMemoryError):
            peak(MemoryLimit(least - 2**20, "less"))

    def test_before_there_is_a_profile(self, tiny_model, tmp_path):
        text = tmp_path / "text.txt"
        text.write_text("The cat sat on the mat. " * 4000)
        command = [
            sys.executable, "-m", "moqa", "quantize", str(tiny_model), "--data", f"t={text}", "--strategy", "uniform",
            "--widths", "3", "--samples", "4", "--context", "32", "--self-samples", "0", "--no-proof", "-o",
            str(tmp_path / "out"),
        ]  # fmt: skip
        dry = [*command, "--dry-run", "--json", str(tmp_path / "dry.json")]
        subprocess.run(dry, check=True, capture_output=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["dry.json", "text.txt"]
        cost = json.loads((tmp_path / "dry.json").read_text())
        assert sorted(cost) == ["checkpoint_bytes", "disk_bytes", "peak_bytes", "seconds"]
        subprocess.run(command, check=True, capture_output=True)
        written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
        assert cost["checkpoint_bytes"] == written

    def test_of_a_plan_that_is_not_written(self, profiled, tmp_path):
        command = [
            sys.executable, "-m", "moqa", "plan", str(profiled.folder), "--strategy", "uniform", "--widths", "3", "-o",
            str(tmp_path / "plan.json"), "--dry-run", "--json", "-",
        ]  # fmt: skip
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        expected = plan(profiled, strategy="uniform", widths=(3,)).account.checkpoint
        assert json.loads(said)["checkpoint_bytes"] == expected
        assert list(tmp_path.iterdir()) == []


class TestCommand:
    def quantize(self, tiny_model, profiled, tmp_path, *options):
        command = [
            sys.executable, "-m", "moqa", "quantize", str(tiny_model), "--plan", str(tmp_path / "plan.json"),
            "--profile", str(profiled.folder), "-o", str(tmp_path / "out"), *options,
        ]  # fmt: skip
        (tmp_path / "plan.json").write_text(plan(profiled, strategy="uniform", widths=(3,)).model_dump_json())
        return subprocess.run(command, check=False, capture_output=True, text=True)

    def test_a_time_limit_stops_between_layers_and_the_same_command_goes_on(self, tiny_model, profiled, tmp_path):
        limited = self.quantize(tiny_model, profiled, tmp_path, "--time-limit", "0.000001s")
        assert limited.returncode == 75
        assert "the same command continues" in limited.stderr
        assert not (tmp_path / "out").exists()
        assert self.quantize(tiny_model, profiled, tmp_path).returncode == 0

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (("--max-memory", "10MiB"), "--max-memory 10MiB cannot hold one block of this model"),
            (("--max-memory", "lots"), "--max-memory lots is not a size"),
            (("--time-limit", "soon"), "--time-limit soon is not a time"),
        ],
    )
    def test_mistakes(self, options, said, tiny_model, profiled, tmp_path):
        found = self.quantize(tiny_model, profiled, tmp_path, *options)
        assert found.returncode == 2
        assert said in found.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json"]
