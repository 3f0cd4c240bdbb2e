"""The commands as users type them, on the reference model: results, and one line for every mistake."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moqa.cli.main import main

ROOT = Path(__file__).parents[1]
MODEL, TEXT = ROOT / "reference" / "model", ROOT / "reference" / "text"
SMALL = ("--samples", "8", "--context", "64")


def calib(name: str) -> str:
    return f"{name}={TEXT / f'{name}.calib.txt'}"


def held_out(name: str) -> str:
    return f"{name}={TEXT / f'{name}.test.txt'}"


@pytest.fixture
def moqa(monkeypatch, capsys):
    """Run a command in this process: exit code, stdout, stderr."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["moqa", *map(str, args)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A profile, a plan and a checkpoint of the reference model, made by the commands."""
    folder = tmp_path_factory.mktemp("cli")
    steps = (
        ("profile", MODEL, "--data", calib("wiki"), "--data", calib("novels"), *SMALL, "-o", folder / "profile"),
        ("plan", folder / "profile", "--bpw", "3", "-o", folder / "plan.json"),
        ("quantize", MODEL, "--plan", folder / "plan.json", "--method", "gptq", "-o", folder / "out"),
    )
    for step in steps:
        subprocess.run([sys.executable, "-m", "moqa", *map(str, step)], check=True, capture_output=True)
    return folder


def fails(result, *parts):
    code, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("moqa: ") and not line.endswith("quantize")]
    assert code == 2, err
    assert "Traceback" not in err
    assert all(part in lines[-1] for part in map(str, parts)), lines[-1]


class TestTheMainJob:
    def test_evaluates_what_lies_on_disk(self, moqa, work, tmp_path):
        code, out, _ = moqa(
            "evaluate", work / "out", "--data", held_out("wiki"), "--data", held_out("german"), "--against", MODEL,
            "--windows", "4", "--json", tmp_path / "e.json",
        )  # fmt: skip
        found = json.loads((tmp_path / "e.json").read_text())
        assert code == 0
        assert "german" in out
        assert found["bytes"] == sum(f.stat().st_size for f in (work / "out").glob("*.safetensors"))
        assert 2.9 < found["bits_per_weight"] <= 3 < found["model_bits_per_weight"]
        for quality in found["distributions"].values():
            assert set(quality) >= {"perplexity", "bits_per_byte", "kl_divergence", "top1_agreement", "tokens"}
            assert quality["tokens"] == 4 * 255
            assert 0 < quality["kl_divergence"] < 0.2
            assert 0.7 < quality["top1_agreement"] < 1

    def test_the_original_is_no_way_from_itself(self, moqa, tmp_path):
        code, _, _ = moqa(
            "evaluate", MODEL, "--data", held_out("wiki"), "--windows", "2", "--json", tmp_path / "e.json"
        )
        found = json.loads((tmp_path / "e.json").read_text())
        assert code == 0
        assert found["bytes"] == (MODEL / "model.safetensors").stat().st_size
        assert found["bits_per_weight"] == 16
        assert found["distributions"]["wiki"]["kl_divergence"] == 0
        assert found["distributions"]["wiki"]["top1_agreement"] == 1

    def test_one_command_does_it_all(self, moqa, tmp_path):
        out = tmp_path / "one"
        code, printed, err = moqa(
            "quantize", MODEL, "--bpw", "3", "--data", calib("wiki"), "--data", calib("novels"), *SMALL, "-o", out,
            "--json", tmp_path / "proof.json",
        )  # fmt: skip
        proof = json.loads((tmp_path / "proof.json").read_text())
        assert code == 0, err
        assert "at the same bytes" in printed
        assert proof["ours"]["bits_per_weight"] <= 3
        assert {row["strategy"] for row in proof["baselines"]} == {"uniform", "frequency"}
        assert proof["ours"]["distributions"]["wiki"]["kl_divergence"] < proof["uniform"]["wiki"]
        assert (out / "report.html").is_file()
        assert moqa("verify", out)[0] == 0
        assert moqa("quantize", MODEL, "--plan", out / "plan.json", "-o", tmp_path / "again")[0] == 0
        for file in (tmp_path / "again").glob("*.safetensors"):
            assert file.read_bytes() == (out / file.name).read_bytes()

    def test_inspects_everything(self, moqa, work):
        for path in (MODEL, work / "profile", work / "plan.json", work / "out"):
            code, out, _ = moqa("inspect", path)
            assert code == 0
            assert out.strip()

    def test_warns_of_experts_that_no_token_reached(self, moqa, tmp_path):
        options = ("--samples", "1", "--context", "8", "--self-samples", "0")
        code, _, err = moqa("profile", MODEL, "--data", calib("wiki"), *options, "-o", tmp_path / "p")
        assert code == 0
        assert "no calibration token reached layer 0 expert" in err
        assert "rtn" in err
        moqa("plan", tmp_path / "p", "--bpw", "3", "--hedge", "0", "-o", tmp_path / "plan.json")
        code, out, err = moqa("quantize", MODEL, "--plan", tmp_path / "plan.json", "-o", tmp_path / "out")
        assert code == 0
        assert "rtn" in out
        assert "no calibration token reached" in err


class TestMistakes:
    @pytest.mark.parametrize("command", [("profile",), ("evaluate",)])
    def test_a_model_that_is_not_there(self, moqa, tmp_path, command):
        extra = ("-o", tmp_path / "p") if command == ("profile",) else ()
        fails(moqa(*command, tmp_path / "none", "--data", calib("wiki"), *extra), tmp_path / "none")
        assert not (tmp_path / "p").exists()

    def test_a_text_that_is_not_there(self, moqa, tmp_path):
        fails(moqa("profile", MODEL, "--data", "wiki=none.txt", "-o", tmp_path / "p"), "wiki=none.txt")
        assert not (tmp_path / "p").exists()

    def test_a_text_shorter_than_a_window(self, moqa, tmp_path):
        (tmp_path / "short.txt").write_text("Too short.")
        result = moqa("profile", MODEL, "--data", f"s={tmp_path / 'short.txt'}", "-o", tmp_path / "p")
        fails(result, "short.txt", "--context 256")
        assert not (tmp_path / "p").exists()

    @pytest.mark.parametrize(("bpw", "word"), [("1.05", "below"), ("30", "above")])
    def test_a_budget_out_of_reach(self, moqa, work, tmp_path, bpw, word):
        result = moqa("plan", work / "profile", "--bpw", bpw, "-o", tmp_path / "plan.json")
        fails(result, f"--bpw {bpw}", word, "reachable", "1.09 to 8.75")
        assert not (tmp_path / "plan.json").exists()

    def test_a_plan_for_another_model(self, moqa, work, tmp_path):
        other = tmp_path / "other"
        shutil.copytree(MODEL, other)
        tensors = load_file(other / "model.safetensors")
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
        save_file(tensors, other / "model.safetensors", {"format": "pt"})
        fails(moqa("quantize", other, "--plan", work / "plan.json", "-o", tmp_path / "out"), "another model", other)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_no_numbers(self, moqa, tmp_path, value):
        bad, name = tmp_path / "bad", "model.layers.3.mlp.experts.7.up_proj.weight"
        shutil.copytree(MODEL, bad)
        tensors = load_file(bad / "model.safetensors")
        tensors[name][1, 2] = torch.tensor(value)
        save_file(tensors, bad / "model.safetensors", {"format": "pt"})
        fails(moqa("profile", bad, "--data", calib("wiki"), *SMALL, "-o", tmp_path / "p"), name, "1 NaN or infinite")
        assert not (tmp_path / "p").exists()

    def test_an_output_that_is_there(self, moqa, work):
        before = (work / "out" / "moqa.json").stat().st_mtime_ns
        fails(moqa("quantize", MODEL, "--plan", work / "plan.json", "-o", work / "out"), work / "out", "--overwrite")
        assert (work / "out" / "moqa.json").stat().st_mtime_ns == before

    def test_overwrite_spares_what_is_not_ours(self, moqa, work, tmp_path):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("years of work")
        result = moqa("quantize", MODEL, "--plan", work / "plan.json", "-o", tmp_path / "mine", "--overwrite")
        fails(result, "not written by moqa")
        assert (tmp_path / "mine" / "thesis.txt").is_file()

    def test_text_that_was_fitted_on(self, moqa, work):
        result = moqa("evaluate", work / "out", "--data", calib("wiki"), "--against", MODEL, "--windows", "4")
        fails(result, "wiki", "fitted")

    def test_a_copy_of_fitted_text_under_another_name(self, moqa, work, tmp_path):
        from moqa.profiling import read_profile
        from moqa.tasks.causal_lm import load_tokenizer

        samples = read_profile(work / "profile").samples("wiki")
        text = "\n".join(load_tokenizer(MODEL).batch_decode(samples))
        (tmp_path / "copy.txt").write_text(text)
        data = ("--data", f"new={tmp_path / 'copy.txt'}", "--context", "64")
        fails(moqa("evaluate", work / "out", *data, "--against", MODEL), "new", "already fitted on")

    @pytest.mark.parametrize("damage", ["truncate", "flip", "manifest", "missing"])
    def test_a_damaged_checkpoint(self, moqa, work, tmp_path, damage):
        out = tmp_path / "out"
        shutil.copytree(work / "out", out)
        shard = sorted(out.glob("*.safetensors"))[2]
        data = bytearray(shard.read_bytes())
        if damage == "truncate":
            shard.write_bytes(data[:-100])
        elif damage == "flip":
            data[len(data) // 2] ^= 1
            shard.write_bytes(data)
        elif damage == "manifest":
            (out / "moqa.json").write_text((out / "moqa.json").read_text()[:-500])
        else:
            shard.unlink()
        assert moqa("verify", out)[0] == 2
        fails(moqa("evaluate", out, "--data", held_out("wiki"), "--windows", "2"), out)

    def test_options_that_do_not_exist(self, moqa, work, tmp_path):
        out = ("-o", tmp_path / "x")
        fails(moqa("plan", work / "profile", "--bpw", "3", "--strategy", "magic", *out), "--strategy magic", "paper-v1")
        fails(moqa("plan", work / "profile", "--bpw", "3", "--ties", "all", *out), "--ties all", "layer_projection")
        fails(moqa("plan", work / "profile", "--bpw", "3", "--size", "12MiB", *out), "--bpw 3", "--size 12MiB")
        fails(moqa("quantize", MODEL, "--plan", work / "plan.json", "--method", "awq", *out), "--method awq", "gptq")
        fails(moqa("quantize", MODEL, *out), "--plan", "--data")
        assert not (tmp_path / "x").exists()

    def test_a_plan_whose_samples_are_gone(self, moqa, work, tmp_path):
        shutil.copyfile(work / "plan.json", tmp_path / "plan.json")
        fails(moqa("quantize", MODEL, "--plan", tmp_path / "plan.json", "-o", tmp_path / "out"), "--profile")
        given = ("--profile", work / "profile")
        assert moqa("quantize", MODEL, "--plan", tmp_path / "plan.json", *given, "-o", tmp_path / "out")[0] == 0


def test_memory_of_quantizing_stays_small(work, tmp_path):
    """Below 1.5 GB for the reference model, the interpreter and its libraries included."""
    script = (
        "from moqa.cli.main import main\n"
        # not getrusage: a process inherits the peak of the one that started it
        "try:\n    main()\nfinally:\n    print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    command = ["quantize", MODEL, "--plan", work / "plan.json", "-o", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, command)], check=True, capture_output=True, text=True
    )
    assert int(done.stdout.split()[-1]) * 1024 < 1.5e9
