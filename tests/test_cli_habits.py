"""What users of command lines expect of every command: version, help, completion, JSON, Ctrl-C and recipes."""

import json
import pydoc
import shlex
import signal
import subprocess
import sys

import pytest
import typer
import yaml

import moqa
from moqa.cli.examples import EXAMPLES
from moqa.cli.main import application
from moqa.cli.recipe import read_recipe
from moqa.format.reader import open_checkpoint
from moqa.methods.registry import METHODS
from moqa.planning.registry import STRATEGIES

COMMANDS = typer.main.get_command(application()).commands


RECIPE = {
    "model": "m", "data": {"wiki": "wiki.txt", "code": "code.jsonl:text"}, "out": "o", "bpw": 3, "strategy": "uniform",
    "widths": [2, 4], "group-size": 32, "symmetric": True, "set": {"*.layers.0.*": 8}, "ignore": ["*.layers.1.*"],
    "proof": False,
}  # fmt: skip


def completed(*words: str) -> list[str]:
    """What a shell gets for the last word."""
    asked = {"_MOQA_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    program = "from moqa.cli.main import application; application()(prog_name='moqa')"
    done = subprocess.run([sys.executable, "-c", program], env=asked, capture_output=True, text=True, check=True)
    return done.stdout.split()


class TestHelp:
    def test_version(self, moqa_command):
        assert moqa_command("--version")[:2] == (0, f"moqa {moqa.__version__}\n")

    def test_commands_are_in_the_order_of_the_work(self, moqa_command):
        text = moqa_command("--help")[1].partition("Commands:")[2]
        assert [line.split()[0] for line in text.splitlines() if line.strip()] == list(EXAMPLES)
        assert list(EXAMPLES)[:4] == ["quantize", "profile", "plan", "compare-plans"]

    @pytest.mark.parametrize("name", COMMANDS)
    def test_every_command_shows_examples_that_it_understands(self, moqa_command, name):
        text = moqa_command(name, "--help")[1]
        for line in EXAMPLES[name]:
            assert f"\n  {line}\n" in text
            program, command, *words = shlex.split(line)
            assert (program, command) == ("moqa", name)
            COMMANDS[name].make_context(name, words)

    @pytest.mark.parametrize(
        ("words", "names"),
        [
            (("moqa", "quantize", "model", "--strategy", ""), list(STRATEGIES)),
            (("moqa", "profile", "model", "--method", ""), list(METHODS)),
            (("moqa", "plan", "profile", "--ties", "layer"), ["layer", "layer_projection"]),
            (("moqa", "plan", "profile", "--objective", "mi"), ["minimax"]),
        ],
    )
    def test_names_are_completed(self, words, names):
        assert sorted(completed(*words)) == sorted(names)


def test_json_on_stdout_is_only_json(moqa_command, tiny_model):
    code, out, err = moqa_command("inspect", tiny_model, "--json", "-")
    assert code == 0
    assert json.loads(out)
    assert "expert" in err  # the table, for a person who looks on


@pytest.mark.parametrize("size", [48, 0, 2**17])
def test_group_sizes_that_do_not_exist(moqa_command, size, tmp_path):
    code, _, err = moqa_command("profile", "m", "--data", "a=b", "-o", tmp_path / "p", "--group-size", size)
    assert (code, err) == (
        2, f"moqa: --group-size {size} does not exist: there are 32, 64, 96, 128 and so on up to 65536\n",
    )  # fmt: skip


class TestCtrlC:
    @pytest.mark.parametrize(
        ("module", "words", "kept"),
        [
            ("moqa.profiling.profile", ("profile", "m", "--data", "a=b", "-o", "p"),
             "what is finished is kept beside p, and the same command goes on from there"),
            ("moqa.adjustment.adjust", ("adjust", "m", "--data", "a=b", "-o", "p"), "no file was written"),
        ],
    )  # fmt: skip
    def test_says_what_is_kept(self, moqa_command, monkeypatch, module, words, kept):
        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(module, interrupted)
        code, _, err = moqa_command(*words)
        assert (code, err) == (128 + signal.SIGINT, f"moqa: interrupted: {kept}\n")


class TestRecipe:
    @pytest.fixture
    def asked(self, monkeypatch):
        """The arguments of `moqa.compress` that a command makes."""
        found = []

        def compress(model, data, budget, out, *, options, **_):
            found.append((model, data, budget.typed, str(out), options))
            raise moqa.MoqaError("that is enough")

        monkeypatch.setattr("moqa.compression.run.compress", compress)
        return found

    @pytest.mark.parametrize("form", ["yaml", "json"])
    def test_from_a_file(self, moqa_command, asked, tmp_path, form):
        path = tmp_path / f"recipe.{form}"
        path.write_text(yaml.safe_dump(RECIPE) if form == "yaml" else json.dumps(RECIPE))
        code, _, err = moqa_command("quantize", "--config", path)
        assert (code, err.splitlines()[-1]) == (2, "moqa: that is enough")
        model, data, budget, out, options = asked[0]
        assert (model, sorted(data), budget, out) == ("m", ["code=code.jsonl:text", "wiki=wiki.txt"], "--bpw 3", "o")
        assert (options.strategy, options.widths, options.group_size) == ("uniform", (2, 4), 32)
        assert (options.symmetric, options.proof) == (True, False)
        assert options.fixed == {"*.layers.0.*": 8, "*.layers.1.*": 16}

    def test_what_is_typed_wins(self, moqa_command, asked, tmp_path):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(RECIPE))
        moqa_command("quantize", "mine", "--size", "12MiB", "--data", "a=b", "--config", path, "--proof")
        model, data, budget, _, options = asked[0]
        assert (model, data, budget, options.proof, options.strategy) == (
            "mine",
            ["a=b"],
            "--size 12MiB",
            True,
            "uniform",
        )

    def test_a_checkpoint_is_a_recipe(self, moqa_command, asked, sharded, sharded_profile, tmp_path):
        fixed = {"*.layers.0.self_attn.*": 8}
        plan = moqa.plan(sharded_profile, "8bpw", widths=(3, 4, 6), objective="minimax", fixed=fixed)
        made = moqa.quantize(sharded, plan, tmp_path / "made", method="rtn", profile=sharded_profile)
        for path in (made, made / "moqa.json"):
            moqa_command("quantize", "--config", path, "--data", "wiki=wiki.txt", "-o", "again")
        for model, _, budget, _, options in asked:
            assert (model, budget, options.method) == (str(sharded.resolve()), "--bpw 8", "rtn")
            again = moqa.plan(
                sharded_profile, budget.removeprefix("--bpw ") + "bpw", strategy=options.strategy,
                widths=options.widths, hedge=options.hedge, objective=options.objective, ties=options.ties,
                fixed=options.fixed,
            )  # fmt: skip
            assert again.units == plan.units

    def test_the_recipe_of_a_mixed_plan_has_the_grid_of_its_profile(
        self, moqa_command, asked, sharded, sharded_profile, tmp_path
    ):
        asked_for = {"groups": (128, 32), "encodings": ("trellis", "int"), "floors": {"shared": 3}}
        plan = moqa.plan(sharded_profile, "2.2bpw", **asked_for)
        made = moqa.quantize(sharded, plan, tmp_path / "made", method="rtn", profile=sharded_profile)
        moqa_command("quantize", "--config", made, "--data", "wiki=wiki.txt", "-o", "again")
        (_, _, _, _, options), settings = asked[0], sharded_profile.record.settings
        assert {scheme.group_size for scheme in plan.units.values()} != {settings.group_size}
        assert (options.group_size, options.symmetric) == (settings.group_size, settings.symmetric)
        assert {name: getattr(options, name) for name in asked_for} == asked_for

    def test_a_checkpoint_from_before_mixed_plans_is_made_again_without_mixing(self, checkpoint):
        manifest = open_checkpoint(checkpoint).manifest
        group = next(iter(manifest.units.values())).scheme.group_size
        assert manifest.group_size is None
        recipe = read_recipe(checkpoint)
        assert (recipe["group_size"], recipe["groups"], recipe["encodings"]) == (group, (group,), ("int",))
        assert (recipe["symmetric"], recipe["floor"]) == (False, "none")

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("bwp: 3", "quantize has no option bwp: there are batch, bpw, cache, context, data,"),
            ("- bpw", "holds no options by name: give a file of options such as `bpw: 3`"),
            ("bpw: [", "cannot be read: while parsing"),
            (None, "cannot be read: No such file or directory"),
        ],
    )
    def test_refuses(self, moqa_command, tmp_path, text, problem):
        if text is not None:
            (tmp_path / "r.yaml").write_text(text)
        code, _, err = moqa_command("quantize", "--config", tmp_path / "r.yaml")
        assert code == 2
        assert err.startswith(f"moqa: --config {tmp_path / 'r.yaml'}")
        assert problem in err

    def test_a_budget_is_read_as_it_was_typed(self, checkpoint):
        assert read_recipe(checkpoint)["bpw"] == "3"


class TestAdjustment:
    @pytest.fixture(scope="class")
    def adjusted(self, sharded, sharded_plan, sharded_profile, texts, tmp_path_factory):
        """A checkpoint and an adjustment of it."""
        folder = tmp_path_factory.mktemp("adjusted")
        out = moqa.quantize(sharded, sharded_plan, folder / "q", method="rtn", profile=sharded_profile, cache="full")
        moqa.adjust(out, [texts["novels"]], folder / "adj", samples=8, budget="20%")
        return out, folder / "adj"

    @pytest.mark.parametrize("command", [("generate", "The"), ("chat",)])
    def test_is_applied(self, moqa_command, monkeypatch, adjusted, command):
        """The model that is asked has it; the answer of a random model says little."""
        used = []

        def answer(model, *_):
            used.append(model.adjustments.current)
            raise moqa.MoqaError("that is enough")

        monkeypatch.setattr("moqa.mixture.generate.with_model", answer)
        monkeypatch.setattr("moqa.generation.Chat", answer)
        for option in ([], ["--adjustment", adjusted[1]]):
            code, _, err = moqa_command(command[0], adjusted[0], *command[1:], *option)
            assert (code, err) == (2, "moqa: that is enough\n")
        assert used == [None, "novels"]

    @pytest.mark.parametrize("command", [("generate", "The"), ("chat",)])
    def test_needs_a_checkpoint(self, moqa_command, sharded, adjusted, command):
        code, _, err = moqa_command(command[0], sharded, *command[1:], "--adjustment", adjusted[1])
        assert (code, err) == (
            2, f"moqa: {sharded} is not a checkpoint: an adjustment such as {adjusted[1]} needs one\n",
        )  # fmt: skip


def test_records_are_one_short_line(tiny_profile, checkpoint, texts, sharded):
    made = moqa.plan(tiny_profile, "6bpw")
    records = (
        tiny_profile, made, moqa.open_checkpoint(checkpoint), texts["wiki"], moqa.Budget.parse(3), moqa.Sampling(),
        moqa.CompressResult(checkpoint, made, tiny_profile, None), moqa.memory_budget(sharded, "2GiB", context=64),
        moqa.MemoryLimit.parse("1GiB"), moqa.CompressOptions(),
    )  # fmt: skip
    for record in records:
        assert "\n" not in repr(record)
        assert len(repr(record)) < 600
        assert type(record).__name__ in repr(record)
    assert str(made) == repr(made) == (
        f"<Plan of tiny by {made.label}: {made.account.bits_per_weight:.3f} bits per weight, "
        f"{made.account.checkpoint} bytes, {len(made.units)} units>"
    )  # fmt: skip


def test_help_shows_the_function():
    for name in ("plan", "compress", "load"):
        assert f"function {name} in moqa" in pydoc.plain(pydoc.render_doc(f"moqa.{name}"))
        assert pydoc.plain(pydoc.render_doc(getattr(moqa, name))).splitlines()[2].startswith(f"{name}(")
