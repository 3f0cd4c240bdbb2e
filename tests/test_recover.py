"""Training after quantization: what is computed while training is what is stored, and it is never worse."""

import itertools
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exact import CODED
from hypothesis import given
from hypothesis import strategies as st
from images import save_classifier, save_images
from long_work import contents, refusal

import moqa
from moqa.cli.main import main
from moqa.errors import LittleMemoryError, Stopped
from moqa.format.manifest import MANIFEST, Recovery
from moqa.format.reader import open_checkpoint
from moqa.format.scheme import Scheme
from moqa.kernels import PackedMatrix
from moqa.memory.limit import MemoryLimit
from moqa.methods import METHODS
from moqa.models.view import open_model
from moqa.planning import plan
from moqa.planning.account import account_of
from moqa.profiling import profile
from moqa.quantization import quantize
from moqa.runtime.growing import cache_for, round_cache
from moqa.runtime.verify import verify
from moqa.storage.artifact import checksum
from moqa.training import recover, trains_whole
from moqa.training.length import TrainingLength
from moqa.training.loop import scheduled
from moqa.training.routing import Routes
from moqa.training.run import check_training
from moqa.training.student import InTheLoop, Student
from moqa.training.units import trained_unit
from moqa.training.write import write_trained

SCHEMES = (*CODED, Scheme(width=2), Scheme(width=3, group_size=32, symmetric=True), Scheme(width=5, group_size=128))


INTEGERS = [scheme for scheme in SCHEMES if not scheme.is_coded]
DONE = Recovery(steps=1, before=1, after=0, kept=True)
LOOP = {"weights": True, "input_bits": 8, "kv_bits": 8, "rate": 0.003}


@pytest.fixture(scope="module")
def measured(tiny_model, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recover") / "profile"
    return profile(tiny_model, [texts["wiki"]], folder, samples=16, context=32, self_samples=8)


@pytest.fixture(scope="module")
def packed(tiny_model, measured, tmp_path_factory):
    """Units of all kinds of schemes."""
    made = plan(measured, strategy="uniform", widths=(2,))
    units = dict(zip(made.units, itertools.cycle(SCHEMES), strict=False))
    mixed = made.model_copy(update={"units": units, "account": account_of(measured, units)})
    return quantize(tiny_model, mixed, tmp_path_factory.mktemp("recover") / "out", profile=measured, cache="1%")


@pytest.fixture(scope="module")
def recovered(packed, measured, tmp_path_factory):
    return recover(packed, tmp_path_factory.mktemp("recover") / "new", length="12", profile=measured)


def packed_classifier(folder):
    """A random classifier with 2 bits, and its profile."""
    model = save_classifier("resnet", folder / "model")
    known = profile(model, {"a": save_images(folder / "images", each=8, seed=0)}, folder / "profile", samples=32)
    made = plan(known, None, strategy="uniform", widths=(2,))
    return quantize(model, made, folder / "out", profile=known), known


def assert_alike(found, trained):
    """Native kernels sum groups in another order, see docs/qat.md."""
    errors = (found - trained).norm(dim=-1) / trained.norm(dim=-1)
    assert float(errors.median()) < 1e-4
    assert float(errors.mean()) < 0.02


def stopping(times):
    """A report that stops the training when it is called so often."""
    heard = 0

    def stop(step, done, total, **_):
        nonlocal heard
        heard += step == "recover"
        if heard == times:
            raise Stopped("enough")

    return stop


def check_stored_bit_for_bit(unit, matrix):
    """A unit computes with what it stores, before and after its parameters move; returns what it then stores."""
    assert torch.equal(unit(), matrix.dense())
    assert all(torch.equal(found, dict(matrix.named_buffers())[name]) for name, found in unit.stored().items())
    for parameter in unit.parameters():
        parameter.data = torch.randn_like(parameter) * 0.5
    trained = PackedMatrix(matrix.scheme, matrix.shape, unit.stored())
    assert torch.equal(unit(), trained.dense())
    unit().square().sum().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in unit.parameters())
    return trained


class TestUnits:
    @given(st.sampled_from(SCHEMES), st.integers(1, 40), st.integers(1, 300), st.integers(0, 2**31), st.booleans())
    def test_trained_weights_are_the_stored_ones_bit_for_bit(self, scheme, out, features, seed, is_float16):
        torch.manual_seed(seed)
        scheme = scheme.model_copy(update={"scale_dtype": "float16" if is_float16 else "bfloat16"})
        weights = torch.randn(out, features) * torch.rand(out, 1)
        matrix = PackedMatrix(scheme, (out, features), METHODS["rtn"].store(weights, scheme))
        check_stored_bit_for_bit(trained_unit(matrix), matrix)

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_a_step_along_the_gradient_gets_closer(self, scheme):
        torch.manual_seed(0)
        weights = torch.randn(32, 256)
        matrix = PackedMatrix(scheme, (32, 256), METHODS["rtn"].store(1.1 * weights, scheme))
        unit = trained_unit(matrix)
        optimizer = torch.optim.Adam(unit.parameters(), lr=0.01)
        before = (unit() - weights).square().sum()
        for _ in range(10):
            optimizer.zero_grad()
            loss = (unit() - weights).square().sum()
            loss.backward()
            optimizer.step()
        assert loss < 0.99 * before

    @given(st.sampled_from(INTEGERS), st.integers(1, 40), st.integers(1, 300), st.integers(0, 2**31))
    def test_trained_integers_are_the_stored_ones_bit_for_bit(self, scheme, out, features, seed):
        torch.manual_seed(seed)
        weights = torch.randn(out, features) * torch.rand(out, 1)
        # as a method that moves weights far from where they were
        matrix = PackedMatrix(scheme, (out, features), METHODS["rtn"].store(weights * 0.8 + 0.1, scheme))
        trained = check_stored_bit_for_bit(trained_unit(matrix, weights), matrix)
        assert out * features < 100 or any(
            not torch.equal(a, b) for a, b in zip(trained.planes, matrix.planes, strict=True)
        )

    def test_what_is_not_quantized_is_not_trained(self):
        weights = torch.randn(4, 32, dtype=torch.bfloat16)
        assert trained_unit(PackedMatrix(Scheme(width=16), (4, 32), {"weight": weights})) is None


class TestRecover:
    def test_is_better_and_takes_no_byte_more(self, packed, recovered):
        before, after = open_checkpoint(packed), open_checkpoint(recovered.checkpoint)
        assert recovered.recovery.kept
        assert recovered.recovery.after < 0.99 * recovered.recovery.before
        assert {name: file.bytes for name, file in after.manifest.files.items()} == {
            name: file.bytes for name, file in before.manifest.files.items()
        }
        assert after.manifest.recovery == recovered.recovery
        assert 0 < recovered.recovery.routing_before < 1
        assert 0 < recovered.recovery.routing_after < 1
        assert not verify(recovered.checkpoint).faults
        card = (Path(recovered.checkpoint) / "README.md").read_text()
        assert "| trained afterwards | 12 steps, on the same texts |" in card
        assert " --recover 12 --data wiki=FILE" in card

    def test_the_files_answer_as_the_trained_model_bit_for_bit(self, tiny_model, packed, measured, tmp_path):
        view, tokens = open_model(tiny_model), measured.samples("wiki")[:2]
        student = Student(view, open_checkpoint(packed))
        for number, parameter in enumerate(student.parameters()):
            torch.manual_seed(number)
            parameter.data = torch.randn_like(parameter) * 0.1
        embedded = view.model.get_input_embeddings()(tokens).detach().requires_grad_()
        with student.in_place(), student.computing():
            trained = view.model(inputs_embeds=embedded).logits
        write_trained(open_checkpoint(packed), student, tmp_path, DONE, tiny_model)
        stored, _ = moqa.load(tmp_path, kernels="reference")
        assert torch.equal(stored(inputs_embeds=embedded).logits, trained)
        assert not torch.allclose(moqa.load(packed)[0](tokens).logits, trained, atol=1e-3)

    def test_the_original_is_as_before(self, tiny_model, packed):
        view = open_model(tiny_model)
        before = {name: value.clone() for name, value in view.model.state_dict().items()}
        student = Student(view, open_checkpoint(packed))
        with student.in_place(), student.computing():
            pass
        assert view.model.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in view.model.state_dict().items())

    def test_a_killed_run_goes_on_to_the_same_bytes(self, packed, measured, recovered, out):
        with pytest.raises(Stopped):
            recover(packed, out, length="12", profile=measured, report=stopping(11))
        steps = []
        recover(
            packed, out, length="12", profile=measured,
            report=lambda step, done, total, **_: steps.append(done) if step == "recover" else None,
        )  # fmt: skip
        assert min(steps) == 11
        assert contents(out) == contents(Path(recovered.checkpoint))
        assert [path.name for path in out.parent.iterdir()] == ["out"]

    def test_another_optimizer_is_recorded_and_goes_on_after_a_kill(self, packed, measured, recovered, out, tmp_path):
        whole = recover(packed, tmp_path / "whole", length="12", profile=measured, optimizer="muon")
        assert whole.recovery.kept
        assert whole.recovery.optimizer == "muon"
        with pytest.raises(Stopped):
            recover(packed, out, length="12", profile=measured, optimizer="muon", report=stopping(11))
        said = refusal(recover, packed, out, length="12", profile=measured, optimizer="sgd")
        assert 'has an unfinished run with optimizer "muon", this one has "sgd"' in said
        recover(packed, out, length="12", profile=measured, optimizer="muon")
        assert contents(out) == contents(Path(whole.checkpoint))
        assert contents(out) != contents(Path(recovered.checkpoint))
        assert " --recover 12 --optimizer muon --data wiki=FILE" in (out / "README.md").read_text()

    def test_the_command_takes_an_optimizer(self, packed, measured, tmp_path, monkeypatch):
        new = tmp_path / "new"
        options = ("--for", "2", "--optimizer", "soap", "--profile", measured.folder, "-o", new)
        monkeypatch.setattr(sys, "argv", ["moqa", "recover", *map(str, (packed, *options))])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        assert open_checkpoint(new).manifest.recovery.optimizer == "soap"

    def test_in_place(self, packed, measured, recovered, tmp_path):
        shutil.copytree(packed, tmp_path / "out")
        recover(tmp_path / "out", tmp_path / "out", length="12", profile=measured, overwrite=True)
        assert contents(tmp_path / "out") == contents(Path(recovered.checkpoint))

    def test_what_is_not_better_is_not_stored(self, packed, measured, tmp_path, monkeypatch):
        monkeypatch.setattr("moqa.training.run._RATE", 3.0)
        found = recover(packed, tmp_path / "new", length="6", profile=measured)
        assert not found.recovery.kept
        after = contents(tmp_path / "new")
        assert {name: data for name, data in after.items() if name.endswith(".safetensors")} == {
            name: data for name, data in contents(packed).items() if name.endswith(".safetensors")
        }

    def test_a_loss_that_is_no_number_ends_the_training(self, packed, measured, tmp_path, monkeypatch):
        monkeypatch.setattr("moqa.training.run._RATE", 1e9)
        with pytest.warns(UserWarning, match=r"ended at step \d of 12, whose loss is not a number"):
            found = recover(packed, tmp_path / "new", length="12", profile=measured)
        assert not found.recovery.kept
        assert found.recovery.steps == 0
        assert not verify(tmp_path / "new").faults

    def test_native_kernels_and_a_rounded_cache_answer_as_the_trained_model(
        self, tiny_model, packed, measured, tmp_path
    ):
        view, tokens = open_model(tiny_model), measured.samples("wiki")[:2]
        student = Student(view, open_checkpoint(packed), loop=InTheLoop(**LOOP))
        for number, parameter in enumerate(student.parameters()):
            torch.manual_seed(number)
            parameter.data = torch.randn_like(parameter) * 0.1
        with student.in_place(), student.computing(), torch.no_grad():
            trained = view.model(tokens, use_cache=False).logits
        write_trained(open_checkpoint(packed), student, tmp_path, DONE, tiny_model)
        stored, _ = moqa.load(tmp_path, kernels="native")
        round_cache(stored, 8)
        with torch.no_grad():
            found = stored(tokens, past_key_values=cache_for(stored)).logits
            exact = moqa.load(tmp_path, kernels="reference")[0](tokens).logits
        assert_alike(found, trained)
        assert float(((exact - trained).norm(dim=-1) / trained.norm(dim=-1)).median()) > 1e-3

    def test_integers_and_what_runs_are_trained_and_go_on_after_a_kill(self, packed, measured, out, tmp_path):
        whole = recover(packed, tmp_path / "whole", length="12", profile=measured, **LOOP)
        assert whole.recovery.kept
        before, after = open_checkpoint(packed), open_checkpoint(whole.checkpoint)
        moved = {
            name.rpartition(".")[0]
            for name, tensor in after.layer(1).items()
            if name.rpartition(".")[2].startswith("p") and not torch.equal(tensor, before.layer(1)[name])
        }
        assert moved
        assert not [name for name in moved if before.manifest.units[name].scheme.is_coded]
        assert after.manifest.recovery.model_dump().items() >= LOOP.items()
        card = (Path(whole.checkpoint) / "README.md").read_text()
        assert "moqa recover OUT --for 12 --weights --input-bits 8 --kv-bits 8 --rate 0.003 -o OUT --overwrite" in card
        assert " --recover 12" not in card
        with pytest.raises(Stopped):
            recover(packed, out, length="12", profile=measured, report=stopping(11), **LOOP)
        said = refusal(recover, packed, out, length="12", profile=measured)
        assert "has an unfinished run with" in said
        recover(packed, out, length="12", profile=measured, **LOOP)
        assert contents(out) == contents(Path(whole.checkpoint))

    def test_images(self, tmp_path, monkeypatch):
        # answers of a random classifier hardly differ: smaller steps
        monkeypatch.setattr("moqa.training.run._RATE", 1e-4)
        packed, known = packed_classifier(tmp_path)
        found = recover(packed, tmp_path / "new", length="12", profile=known)
        assert found.recovery.after < found.recovery.before
        assert found.recovery.routing_after is None

    def test_images_on_native_kernels_answer_as_the_trained_model(self, tmp_path):
        packed, known = packed_classifier(tmp_path)
        view, images = open_model(tmp_path / "model"), known.samples("a")[:4]
        student = Student(view, open_checkpoint(packed), loop=InTheLoop(weights=True, input_bits=8))
        for number, parameter in enumerate(student.parameters()):
            torch.manual_seed(number)
            parameter.data = torch.randn_like(parameter) * 0.1
        with student.in_place(), student.computing(), torch.no_grad():
            trained = view.task.call(view.model, images)
        write_trained(open_checkpoint(packed), student, tmp_path / "new", DONE, tmp_path / "model")
        with torch.no_grad():
            assert_alike(view.task.call(moqa.load(tmp_path / "new", kernels="native")[0], images), trained)
        said = refusal(recover, packed, tmp_path / "other", profile=known, length="1", kv_bits=8)
        assert said == "--kv-bits 8 is for language models: leave it out"


@pytest.fixture
def little_memory(monkeypatch):
    """Room for one block only."""
    monkeypatch.setattr("moqa.training.run.trains_whole", lambda *_: False)


@pytest.mark.usefixtures("little_memory")
class TestBlockwise:
    def test_is_better_and_takes_no_byte_more(self, packed, measured, tmp_path):
        heard = []
        found = recover(
            packed, tmp_path / "new", length="12", profile=measured,
            report=lambda step, done, total, **facts: heard.append((step, done, total, facts["layer"])),
        )  # fmt: skip
        assert found.recovery.blockwise
        assert found.recovery.kept
        assert found.recovery.after < 0.99 * found.recovery.before
        assert 0 < found.recovery.routing_before < 1
        assert 0 < found.recovery.routing_after < 1
        assert heard == [("recover", done + 1, 24, done // 12) for done in range(24)]
        before, after = open_checkpoint(packed), open_checkpoint(found.checkpoint)
        assert {name: file.bytes for name, file in after.manifest.files.items()} == {
            name: file.bytes for name, file in before.manifest.files.items()
        }
        assert all(
            any(not torch.equal(tensor, before.layer(block)[name]) for name, tensor in after.layer(block).items())
            for block in (None, 0, 1)
        )
        assert not verify(found.checkpoint).faults
        card = (Path(found.checkpoint) / "README.md").read_text()
        assert "| trained afterwards | 12 steps of each block, on the same texts |" in card

    @pytest.mark.parametrize("times", [1, 11, 13, 23])
    def test_a_killed_run_goes_on_to_the_same_bytes(self, packed, measured, out, tmp_path, times):
        with pytest.raises(Stopped):
            recover(packed, out, length="12", profile=measured, report=stopping(times))
        recover(packed, out, length="12", profile=measured)
        whole = recover(packed, tmp_path / "whole", length="12", profile=measured)
        assert contents(out) == contents(Path(whole.checkpoint))
        assert [path.name for path in out.parent.iterdir()] == ["out"]

    def test_holds_one_block(self, packed, measured, tmp_path, monkeypatch):
        students = []

        class Watched(Student):
            def __init__(self, *args):
                students.append(self)
                super().__init__(*args)
                assert {unit.layer for name, unit in self.view.units.items() if name in self.units} == {args[2]}

        monkeypatch.setattr("moqa.training.blockwise.Student", Watched)
        recover(packed, tmp_path / "new", length="1", profile=measured)
        assert len(students) == 2

    def test_a_block_that_is_not_better_stays_as_it_was(self, packed, measured, tmp_path, monkeypatch):
        monkeypatch.setattr("moqa.training.run._RATE", 3.0)
        found = recover(packed, tmp_path / "new", length="6", profile=measured)
        assert not found.recovery.kept
        assert found.recovery.after == found.recovery.before
        assert found.recovery.routing_after == found.recovery.routing_before

    def test_a_loss_that_is_no_number_ends_the_training_of_its_block(self, packed, measured, tmp_path, monkeypatch):
        monkeypatch.setattr("moqa.training.run._RATE", 1e9)
        with pytest.warns(UserWarning, match=r"of block [01] ended at step \d of 12, whose loss is not a number"):
            found = recover(packed, tmp_path / "new", length="12", profile=measured)
        assert not found.recovery.kept

    def test_what_runs_is_in_the_loop(self, packed, measured, tmp_path):
        found = recover(packed, tmp_path / "new", length="6", profile=measured, input_bits=8, kv_bits=8)
        assert found.recovery.kept
        exact = recover(packed, tmp_path / "exact", length="6", profile=measured)
        assert exact.recovery.before != found.recovery.before
        assert open_checkpoint(found.checkpoint).manifest.recovery.kv_bits == 8

    def test_images(self, tmp_path, monkeypatch):
        monkeypatch.setattr("moqa.training.run._RATE", 5e-4)
        packed, known = packed_classifier(tmp_path)
        found = recover(packed, tmp_path / "new", length="12", profile=known)
        assert found.recovery.after < found.recovery.before


def test_a_model_that_does_not_fit_is_trained_by_blocks(tiny_model, monkeypatch):
    monkeypatch.setattr("moqa.forecast.footprint.resident", lambda: 0)
    monkeypatch.setattr("moqa.training.memory.COMPUTING", 0)
    view = open_model(tiny_model)
    with pytest.raises(LittleMemoryError) as refused:
        trains_whole(view, MemoryLimit(2**10))
    # the smallest memory that works is enough for one block, and not for all
    assert not trains_whole(view, MemoryLimit(refused.value.least))
    assert trains_whole(view, MemoryLimit(2 * len(view.blocks) * refused.value.least))


def test_agreement_of_routing(tiny_model):
    view, tokens = open_model(tiny_model), torch.arange(24)[None]
    same, other = Routes(), Routes()
    for routes in (same, other):
        with routes.recorded(view, range(len(view.blocks))):
            view.model(tokens)
        # the first expert is now another one
        for name, parameter in view.model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.data = parameter.data.roll(1, 0)
    assert same.agreement(same) == 1.0
    assert same.agreement(other) < 0.5


class TestRefusals:
    def test_bits_that_nothing_computes_with(self, packed, measured, tmp_path):
        options = {"profile": measured, "length": "1"}
        said = refusal(recover, packed, tmp_path / "new", input_bits=4, **options)
        assert said == "--input-bits 4 is not what kernels round to: give 8"
        said = refusal(recover, packed, tmp_path / "new", kv_bits=4, **options)
        assert said == "keys and values of 4 bits are not supported: give 8, or nothing"

    @pytest.mark.parametrize("rate", [0.0, -1.0, 1.0, float("nan")])
    def test_a_rate(self, packed, measured, tmp_path, rate):
        said = refusal(recover, packed, tmp_path / "new", profile=measured, length="1", rate=rate)
        assert said == f"--rate {rate} is not a rate: give one such as 0.002"

    def test_other_samples(self, packed, tiny_model, texts, tmp_path):
        novels = replace(texts["novels"], name="wiki")
        other = profile(tiny_model, [novels], tmp_path / "other", samples=3, context=32, self_samples=1)
        assert "has other samples of wiki than" in refusal(recover, packed, tmp_path / "new", profile=other, length="1")
        assert not (tmp_path / "new").exists()

    def test_no_profile(self, packed, tmp_path):
        assert "give --profile" in refusal(recover, packed, tmp_path / "new")

    def test_no_original(self, packed, measured, tmp_path):
        moved = shutil.copytree(packed, tmp_path / "a" / "b" / "moved")
        manifest = moved / MANIFEST
        data = json.loads(manifest.read_text()) | {"model": "nowhere"}
        manifest.write_text(json.dumps(data | {"checksum": checksum(data)}))
        said = refusal(recover, moved, tmp_path / "new", profile=measured, length="1")
        assert said.startswith(f"the original of {moved} is missing: ")
        assert said.endswith("give --model")

    def test_memory(self, packed, measured, tmp_path):
        small = MemoryLimit(2**20, "1MiB")
        said = refusal(recover, packed, tmp_path / "new", profile=measured, memory=small, length="1")
        problem = "--max-memory 1MiB is too small to train one block of this model"
        assert re.fullmatch(rf"{problem}: at least \d\.\d\d GiB are needed", said)

    def test_less_memory_than_it_began_with(self, packed, measured, out, monkeypatch):
        with pytest.raises(Stopped):
            recover(packed, out, length="12", profile=measured, report=stopping(3))
        monkeypatch.setattr("moqa.training.run.trains_whole", lambda *_: False)
        said = refusal(recover, packed, out, profile=measured, memory=MemoryLimit(2**30, "1GiB"), length="12")
        problem = "--max-memory 1GiB is too small to go on with a training of the whole model"
        assert said == f"{problem}: give as much as before, or --restart"

    def test_an_optimizer(self, packed, measured, tmp_path):
        said = refusal(recover, packed, tmp_path / "new", profile=measured, length="1", optimizer="adam")
        assert said == "--optimizer adam is unknown: there are adamw, muon, sgd, soap"
        said = refusal(check_training, None, "muon")
        assert said == "--optimizer muon has nothing to train: give --recover 15m, or leave it out"

    @pytest.mark.parametrize("text", ["", "0", "0m", "-3", "15 days", "1.5", "nan", "9" * 40])
    def test_length(self, text):
        assert refusal(TrainingLength.parse, text).startswith(f"{text} is not the length of a training")


def test_a_length_is_a_time_or_a_number_of_steps():
    assert TrainingLength.parse("2m").count(seconds=0.5) == 240
    assert TrainingLength.parse("1s").count(seconds=5) == 1
    assert TrainingLength.parse("12").count(seconds=5) == 12


def test_the_rate_rises_and_falls():
    rates = [scheduled(step, 200) for step in range(200)]
    assert max(rates) == rates[9] > 0.99
    assert rates[0] < 0.2
    assert rates[-1] < 0.01
