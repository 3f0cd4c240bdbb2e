"""`--widths-nested` and `--width` as users type them: a folder for several widths, and one line for what cannot be."""

import json
import shutil

import pytest
from test_resume import contents, stop_at

import moqa
from moqa.errors import MoqaError, Stopped
from moqa.runtime.verify import verify

WIDTHS = (2, 4, 8)
ONE = " gives all units one width of integers: leave out"


@pytest.fixture(scope="module")
def data(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("text") / "wiki.txt"
    path.write_text("\n\n".join(texts["wiki"].texts))
    return f"wiki={path}"


@pytest.fixture(scope="module")
def profiled(tiny_model, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    return moqa.profile(tiny_model, [texts["wiki"]], folder / "tiny", samples=4, context=32, self_samples=0)


def uniform(profiled, width=8, **options):
    return moqa.plan(profiled, strategy="uniform", widths=(width,), **{"encodings": ("int",), **options})


@pytest.fixture(scope="module")
def nested(tiny_model, profiled):
    out = profiled.folder.parent / "out"
    return moqa.quantize(tiny_model, uniform(profiled), out, profile=profiled, widths_nested=WIDTHS)


def line(code, out, err):
    assert (code, out) == (2, "")
    assert err.startswith("moqa: ")
    assert err.count("\n") == 1
    return err


class TestQuantize:
    def test_from_texts_to_every_width(self, moqa_command, tiny_model, data, texts, tmp_path):
        out, novel = tmp_path / "out", tmp_path / "novel.txt"
        novel.write_text("\n\n".join(texts["python"].texts))
        small = ("--samples", 4, "--context", 32, "--self-samples", 0)
        made = moqa_command("quantize", tiny_model, "--data", data, "--widths-nested", "2,4,8", *small, "-o", out)
        assert made[0] == 0, made[2]
        assert "also one of 2, 4 bits (--width)" in made[1]
        assert moqa_command("verify", out)[0] == 0
        assert "nested widths 2, 4" in " ".join(moqa_command("inspect", out)[1].split())
        kl = {}
        for width in WIDTHS:
            code, printed, _ = moqa_command(
                "evaluate", out, "--data", f"novel={novel}", "--against", tiny_model, "--context", 32, "--windows", 8,
                "--width", width, "--json", "-",
            )  # fmt: skip
            found = json.loads(printed)
            assert (code, found["width"]) == (0, width)
            kl[width] = found["distributions"]["novel"]["kl_divergence"]
        assert kl[2] > kl[4] > kl[8]
        code, printed, _ = moqa_command("generate", out, "the", "--width", 2, "--max-tokens", 2, "--json")
        assert (code, json.loads(printed)["completion_tokens"]) == (0, 2)
        # the same options again, from the checkpoint itself
        again = (
            "--config",
            out,
            "--data",
            data,
            "--profile",
            tmp_path / "out.profile",
            *small,
            "-o",
            tmp_path / "again",
        )
        assert moqa_command("quantize", *again)[0] == 0
        assert moqa.open_checkpoint(tmp_path / "again").manifest.nested == moqa.open_checkpoint(out).manifest.nested

    @pytest.mark.parametrize("method", ["gptq", "rtn"])
    def test_goes_on_after_every_stop(self, method, tiny_model, profiled, tmp_path):
        plan = uniform(profiled)
        options = {"method": method, "profile": profiled, "widths_nested": (8, 3)}
        whole = moqa.quantize(tiny_model, plan, tmp_path / "whole", **options)
        for number in range(1, 100):
            try:
                out = moqa.quantize(tiny_model, plan, tmp_path / "out", report=stop_at(number), **options)
            except Stopped:
                assert not (tmp_path / "out").exists()
            else:
                break
        assert 1 < number < 40
        assert contents(out) == contents(whole)

    def test_an_unfinished_run_of_other_widths_is_named(self, tiny_model, profiled, tmp_path):
        plan, out = uniform(profiled), tmp_path / "out"
        with pytest.raises(Stopped):
            moqa.quantize(tiny_model, plan, out, profile=profiled, widths_nested=(8, 3), report=stop_at(4))
        with pytest.raises(MoqaError, match=r"unfinished run with nested \[3\], this one has \[2\]"):
            moqa.quantize(tiny_model, plan, out, profile=profiled, widths_nested=(8, 2))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("4",), " is a single width: give two or more, such as 2,3,4,8"),
            (("2,2",), " names 2 twice: give each width once, such as 2,3,4,8"),
            (("2,9",), " has no width 9: widths are 1 to 8"),
            (("9",), " has no width 9: widths are 1 to 8"),
            (("2,x",), " is not a list of widths: give e.g. --widths-nested 2,3,4,8"),
            (("2,8", "--bpw", 3), " has a size of its own: leave out --bpw 3"),
            (("2,8", "--size", "9MiB"), " has a size of its own: leave out --size 9MiB"),
            (("2,8", "--encodings", "trellis"), f"{ONE} --encodings trellis"),
            (("2,8", "--strategy", "budget"), f"{ONE} --strategy budget"),
            (("2,8", "--widths", "4"), f"{ONE} --widths 4"),
            (("2,8", "--recover", "9"), " cannot be trained: leave out --recover 9"),
            (("2,8", "--dry-run"), " is not known to --dry-run: estimate the widest width alone"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_is_one_line(self, options, message, moqa_command, tiny_model, data, tmp_path):
        found = moqa_command(
            "quantize", tiny_model, "--data", data, "-o", tmp_path / "out", "--widths-nested", *options
        )
        assert line(*found) == f"moqa: --widths-nested {options[0]}{message}\n"
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("options", "widths", "message"),
        [
            ({"width": 4}, (2, 8), "needs 8 bits for all units, the plan gives .* 4: plan with --strategy uniform"),
            ({"width": 4, "encodings": ("table",)}, (2, 4), "needs integers, the plan stores .* as table"),
            ({"fixed": {"*.q_proj": 4}}, (2, 8), r"needs 8 bits for all units, the plan gives .*q_proj 4"),
        ],
    )  # fmt: skip
    def test_a_plan_that_cannot_hold_them(self, options, widths, message, tiny_model, profiled, tmp_path):
        with pytest.raises(MoqaError, match=message):
            moqa.quantize(
                tiny_model, uniform(profiled, **options), tmp_path / "o", profile=profiled, widths_nested=widths
            )


class TestWidth:
    def test_a_width_that_is_not_there_is_one_line(self, moqa_command, nested, tiny_model, tmp_path):
        found = moqa_command("generate", nested, "the", "--width", 5)
        assert line(*found) == f"moqa: {nested} has no 5 bits: --width takes 2, 4, 8\n"
        found = moqa_command("generate", tiny_model, "the", "--width", 4)
        assert "is not a checkpoint" in line(*found)
        found = moqa_command("export", tmp_path, "--to", "imatrix", "--width", 4, "-o", tmp_path / "x")
        assert "is not a checkpoint: --width 4 needs one" in line(*found)
        found = moqa_command("serve", nested, "--width", 4, "--adjust", "auto")
        assert "--width 4 --adjust auto cannot be combined" in line(*found)

    def test_of_a_checkpoint_without_nested_widths(self, tiny_model, profiled, tmp_path):
        out = moqa.quantize(tiny_model, uniform(profiled, 4), tmp_path / "out", profile=profiled, method="rtn")
        assert moqa.open_checkpoint(out, width=4).manifest.units
        with pytest.raises(MoqaError, match="has no nested widths: --width 2 needs some: leave it out"):
            moqa.open_checkpoint(out, width=2)

    def test_one_width_becomes_a_checkpoint_of_its_own(self, moqa_command, nested, tmp_path):
        code, printed, _ = moqa_command("export", nested, "--to", "moqa", "--width", 4, "-o", tmp_path / "four")
        assert (code, "four" in printed) == (0, True)
        four, beside = moqa.open_checkpoint(tmp_path / "four"), moqa.open_checkpoint(nested, width=4)
        assert verify(four.folder).faults == []
        assert (four.manifest.format, four.manifest.nested, four.manifest.widths) == (1, {}, (4,))
        assert four.bytes == beside.bytes == sum(path.stat().st_size for path in four.folder.glob("*.safetensors"))
        for layer in range(four.manifest.layers):
            stored, made = four.layer(layer), beside.layer(layer)
            assert stored.keys() == made.keys()
            assert all(stored[name].equal(made[name]) for name in stored)
        assert json.loads((four.folder / "config.json").read_text())["quantization_config"]["widths"] == [4]
        found = moqa_command("export", nested, "--to", "moqa", "-o", tmp_path / "other")
        assert "--to moqa needs one of its widths" in line(*found)

    def test_is_not_trained(self, moqa_command, nested, tmp_path):
        found = moqa_command("recover", nested, "--for", "5", "-o", tmp_path / "out")
        assert "has nested widths, which a training of one of them would change" in line(*found)

    def test_adjustments_are_of_the_widest(self, nested, texts, tmp_path):
        folder = shutil.copytree(nested, tmp_path / "out")
        model, _ = moqa.load(folder, width=2)
        assert model.adjustments is not None
        assert moqa.open_checkpoint(folder, width=2).manifest.checksum != moqa.open_checkpoint(folder).manifest.checksum
