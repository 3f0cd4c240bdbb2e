"""The main job from Python, and a strategy that nothing but its own function knows of."""

import inspect
import json
import subprocess
import sys
from dataclasses import fields, replace

import pytest

import moqa
from moqa.cli.main import main
from moqa.compression.options import DEFAULTS, help_of
from moqa.compression.run import forecast
from moqa.errors import MoqaError
from moqa.execution.registry import EXECUTORS
from moqa.methods.registry import METHODS
from moqa.planning.engines import ENGINES
from moqa.planning.registry import STRATEGIES, strategy
from moqa.planning.run import read_plan
from moqa.training.optimizers import OPTIMIZERS

SMALL = moqa.CompressOptions(samples=4, context=32, self_samples=2, method="rtn")


class TestCompress:
    def test_from_texts_to_a_proof_and_a_page(self, tiny_model, texts, tmp_path):
        steps, quantized = [], []
        result = moqa.compress(
            tiny_model, [texts["wiki"], texts["novels"]], "6bpw", tmp_path / "out", options=SMALL,
            report=lambda step, *_, **__: steps.append(step), when_quantized=quantized.append,
        )  # fmt: skip
        out = tmp_path / "out"
        assert result.checkpoint == out
        assert result.plan.account.bits_per_weight <= 6
        assert set(result.proof.ours.distributions) == {"wiki", "novels"}
        original = result.proof.original
        assert (original.strategy, original.context) == (None, 32)
        assert original.bytes == sum(path.stat().st_size for path in tiny_model.glob("*.safetensors"))
        assert {q.kl_divergence for q in original.distributions.values()} == {0.0}
        assert result.report == out / "report.html"
        assert "Expected gain over uniform" in result.report.read_text()  # of the plan that lies beside the checkpoint
        assert '<h1 class="open">' not in result.report.read_text()  # it judges the checkpoint
        assert json.loads((out / "proof.json").read_text()) == result.proof.model_dump(mode="json")
        assert read_plan(out / "plan.json").units == result.plan.units
        assert [(found.plan, found.proof) for found in quantized] == [(result.plan, None)]
        assert list(dict.fromkeys(steps)) == ["self-sampling", "activation", "sensitivity", "quantize", "evaluate"]
        assert result.summary() == result.proof

    def test_goes_on_with_a_checkpoint_that_lacks_its_proof(self, tiny_model, texts, tmp_path):
        steps = []
        job = (tiny_model, [texts["wiki"]], "6bpw", tmp_path / "out")
        first = moqa.compress(*job, options=replace(SMALL, proof=False), held_out=[texts["python"]])
        assert first.proof is None
        assert first.summary() == {"checkpoint": str(tmp_path / "out"), "bytes": first.plan.account.checkpoint}
        written = (tmp_path / "out" / "moqa.json").stat().st_mtime_ns
        again = moqa.compress(
            *job, options=SMALL, held_out=[texts["python"]], report=lambda step, *_, **__: steps.append(step)
        )
        assert steps[0] == "evaluate"
        assert set(again.proof.ours.distributions) == {"python"}
        assert (tmp_path / "out" / "moqa.json").stat().st_mtime_ns == written

    def test_does_not_take_a_checkpoint_of_other_texts_for_its_own(self, tiny_model, texts, tmp_path):
        options = replace(SMALL, strategy="uniform", widths=(8,))
        out, held_out = tmp_path / "out", [texts["python"]]
        moqa.compress(tiny_model, [texts["wiki"]], None, out, options=replace(options, proof=False), held_out=held_out)
        other = replace(texts["novels"], name="wiki")
        with pytest.raises(MoqaError, match=f"{out} exists"):
            moqa.compress(tiny_model, [other], None, out, options=options, held_out=held_out)
        assert not (out / "proof.json").exists()

    def test_takes_texts_in_every_form(self, tiny_model, texts, tmp_path):
        (tmp_path / "wiki.txt").write_text(texts["wiki"].texts[0])
        forms = ([f"wiki={tmp_path / 'wiki.txt'}"], {"wiki": tmp_path / "wiki.txt"}, {"wiki": texts["wiki"].texts})
        found = [forecast(tiny_model, data, "6bpw", tmp_path / "out", options=SMALL) for data in forms]
        assert len({cost.checkpoint_bytes for cost, _, _ in found}) == 1
        assert found[0][1].known == ("wiki",)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("budget", "options", "match"),
        [
            ("6", {}, "--size 6|below"),
            ("0.5bpw", {}, "--bpw 0.5 is below the smallest plan"),
            (None, {}, "--strategy auto needs a budget: give --bpw, --size or --fit"),
            ("6bpw", {"strategy": "magic"}, "--strategy magic is unknown: there are alphaq, attention-first, auto, "),
            ("6bpw", {"method": "awq"}, "--method awq is unknown: there are gptq, rtn, gptq-affinity, gptq-plain"),
            ("6bpw", {"recover": "3", "optimizer": "adam"}, "--optimizer adam is unknown: there are adamw, muon, sgd"),
            ("6bpw", {"optimizer": "muon"}, "--optimizer muon has nothing to train: give --recover 15m"),
            ("6bpw", {"cache": "3x"}, "--cache 3x"),
            ("6bpw", {"ties": "all"}, "--ties all is unknown"),
        ],
    )
    def test_refuses_before_it_measures(self, tiny_model, texts, tmp_path, budget, options, match):
        with pytest.raises(MoqaError, match=match):
            moqa.compress(tiny_model, [texts["wiki"]], budget, tmp_path / "out", options=replace(SMALL, **options))
        assert not list(tmp_path.iterdir())

    def test_does_not_replace_what_is_there(self, tiny_model, texts, tmp_path):
        (tmp_path / "thesis.txt").write_text("years of work")
        with pytest.raises(MoqaError, match="exists"):
            moqa.compress(tiny_model, [texts["wiki"]], "6bpw", tmp_path, options=SMALL)


class TestOptions:
    # commands have --ignore and --set in place of `fixed`, and --floor in place of `floors`
    @pytest.mark.parametrize(
        "option", [option.name for option in fields(moqa.CompressOptions) if option.name not in ("fixed", "floors")]
    )
    def test_every_option_has_help_and_the_default_of_its_step(self, option):
        assert help_of(option)
        assert "{" not in help_of(option)
        for step in (moqa.profile, moqa.plan, moqa.quantize):
            parameter = inspect.signature(step).parameters.get(option)
            if parameter is not None and parameter.default is not inspect.Parameter.empty and option != "profile":
                default = parameter.default
                if (step, option) == (moqa.plan, "ties"):  # None: those of the engine
                    default = ENGINES["moqa"].checked(default)
                assert default == getattr(DEFAULTS, option), step

    def test_one_that_does_not_exist(self):
        with pytest.raises(TypeError, match="nonsense"):
            moqa.CompressOptions(nonsense=1)


@pytest.fixture
def made_up():
    """A strategy that is registered here and nowhere else."""

    @strategy("made-up", needs_budget=True, needs_experts=True, hedge=lambda bits: 0.7, options=("objective",))
    def choose(problem):
        """The narrowest widths, then in turn."""
        return problem.fill(problem.smallest(), range(len(problem.groups)))

    yield "made-up"
    del STRATEGIES["made-up"]


class TestAStrategyThatIsNew:
    @pytest.mark.parametrize("command", ["plan", "quantize"])
    def test_is_in_the_help(self, made_up, command, monkeypatch, capsys):
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["moqa", command, "--help"])
        with pytest.raises(SystemExit):
            main()
        shown = capsys.readouterr().out
        text = " ".join(shown.split())
        assert "uniform or made-up" in text
        assert "made-up The narrowest widths, then in turn." in text
        assert "budget or made-up: share of the model's own text" in text
        assert "budget or made-up: mean or minimax" in text

    def test_is_in_errors(self, made_up, tiny_profile, dense_profile):
        with pytest.raises(MoqaError, match=r"--strategy best is unknown: there are .*made-up"):
            moqa.plan(tiny_profile, "6bpw", strategy="best")
        with pytest.raises(MoqaError, match=r"--strategy made-up needs a budget: give --bpw or --size"):
            moqa.plan(tiny_profile, strategy=made_up)
        with pytest.raises(MoqaError, match=r"made-up ranks experts.*has none: use uniform or auto or budget"):
            moqa.plan(dense_profile, "6bpw", strategy=made_up)
        with pytest.raises(MoqaError, match=r"--hedge 0\.1 does not apply to --strategy random: it .* to .*made-up"):
            moqa.plan(tiny_profile, "6bpw", strategy="random", hedge=0.1)

    def test_is_recommended_where_it_works(self, dense_profile):
        @strategy("plain")
        def choose(problem):
            """All alike."""
            return problem.smallest()

        try:
            with pytest.raises(MoqaError, match="use plain or uniform or auto or budget"):
                moqa.plan(dense_profile, "6bpw", strategy="frequency")
        finally:
            del STRATEGIES["plain"]

    def test_does_the_main_job(self, made_up, tiny_model, texts, tmp_path):
        options = replace(SMALL, strategy=made_up, proof=False)
        with pytest.raises(MoqaError, match="--strategy made-up needs a budget: give --bpw, --size or --fit"):
            moqa.compress(tiny_model, [texts["wiki"]], None, tmp_path / "out", options=options)
        result = moqa.compress(tiny_model, [texts["wiki"]], "6bpw", tmp_path / "out", options=options)
        assert result.plan.strategy == "made-up"
        assert result.plan.options.hedge == 0.7
        assert result.profile.record.settings.sensitivity


def test_help_of_every_registry_loads_nothing_heavy():
    script = (
        "import sys\n"
        "from moqa.cli.main import main\n"
        "sys.argv = ['moqa', 'quantize', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print({'torch', 'transformers', 'scipy', 'datasets'} & set(sys.modules) or 'light')"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "light"
    text = " ".join(done.stdout.split())
    assert all(name in text for name in (*STRATEGIES, *METHODS, *EXECUTORS, *OPTIMIZERS))
    assert all(member.help and f"{name} {member.help}"[:40] in text for name, member in STRATEGIES.items())


def test_a_new_method_is_in_the_help():
    METHODS["made-up"] = METHODS["rtn"]
    try:
        assert help_of("method") == "gptq, rtn, gptq-affinity, gptq-plain or made-up"
        with pytest.raises(MoqaError, match=r"--method awq is unknown: there are gptq, rtn, .*made-up"):
            METHODS.find("awq")
    finally:
        del METHODS["made-up"]
