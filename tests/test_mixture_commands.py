"""`moqa mixture build`, and the commands that take a mixture."""

import json
import shutil

import pytest
from conftest import REFERENCE, VARIANTS

import moqa
from moqa.mixture.record import read_mixture


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """An option for text that was in no fit."""
    path = tmp_path_factory.mktemp("texts") / "python.txt"
    path.write_text((REFERENCE / "text" / "python.test.txt").read_text(encoding="utf-8")[:6000])
    return f"python={path}"


def test_build(moqa_command, tiny_model, texts, mix, tmp_path):
    shutil.copytree(mix.parent / "mix.measured", tmp_path / "measured")
    data = []
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text.texts[0])
        data += ["--data", f"{name}={tmp_path / name}.txt"]
    made = f"a: {{folder: {mix / 'base'}}}\nb: {{folder: {mix / 'python'}}}\nc: {{folder: {mix / 'wide'}}}\n"
    (tmp_path / "variants.yaml").write_text(made)
    code, out, err = moqa_command(
        "mixture", "build", tiny_model, *data, "-o", tmp_path / "mix", "--variants", tmp_path / "variants.yaml",
        "--router", "histogram", "--samples", "8", "--measured", tmp_path / "measured", "--json", tmp_path / "mix.json",
    )  # fmt: skip
    assert code == 0, err
    assert "router (histogram)" in out
    record = read_mixture(tmp_path / "mix")
    assert json.loads((tmp_path / "mix.json").read_text())["checksum"] == record.checksum
    # the routing of a prompt is read by a run of the base, whatever variant is in use
    model, tokenizer = moqa.load(tmp_path / "mix")
    ids = tokenizer("The history of").input_ids
    routes = []
    for name in record.variants:
        model.mixture.use(name)
        routes.append(model.mixture.choose(ids))
    assert len(set(routes)) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--variants", "v.yaml", "--router", "cnn"),
            "--router cnn is unknown: there are encoder, linear, histogram, se-resnet",
        ),
        (("--variants", "v.yaml", "--labels", "luck"), "--labels luck is unknown: there are divergence, likelihood"),
        (("--variants", "nowhere.yaml"), "--variants nowhere.yaml cannot be read: No such file or directory"),
        (("--variants", "wrong.yaml"), "--variants wrong.yaml: base has the unknown key bits"),
        (("--variants", "one.yaml"), "a mixture of 1 variant has nothing to choose from: give two or more"),
        ((), "variant base has no budget: give it one, or --budget for all"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(moqa_command, tiny_model, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v.yaml").write_text(VARIANTS)
    (tmp_path / "wrong.yaml").write_text("base: {bits: 3}")
    (tmp_path / "one.yaml").write_text("base: {strategy: uniform}")
    before = set(tmp_path.iterdir())
    data = f"wiki={REFERENCE / 'text' / 'wiki.calib.txt'}"
    code, out, err = moqa_command("mixture", "build", tiny_model, "--data", data, "-o", "mix", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"moqa: {message}")
    assert set(tmp_path.iterdir()) == before


def test_evaluate(moqa_command, mix, held_out, tmp_path):
    code, out, err = moqa_command(
        "evaluate", mix, "--data", held_out, "--windows", "3", "--prompt", "32", "--json", tmp_path / "found.json"
    )
    assert code == 0, err
    assert all(kind in out for kind in ("best-single", "uniform-routing", "oracle", "router linear"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["prompt"], found["prompts"]) == (32, {"python": 3})
    code, out, err = moqa_command("report", mix, tmp_path / "found.json", "-o", tmp_path / "page.html")
    assert code == 0, err
    page = (tmp_path / "page.html").read_text()
    assert "Mixtures of variants" in page
    assert "best choice of each" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [(("--context", "128"), "takes no --context"), (("--prompt", "300"), "--prompt 300 leaves nothing to read")],
)
def test_evaluate_refuses(moqa_command, mix, held_out, words, message):
    code, _, err = moqa_command("evaluate", mix, "--data", held_out, *words)
    assert code == 2
    assert message in err


def test_prompt_is_of_mixtures(moqa_command, mix, held_out):
    code, _, err = moqa_command("evaluate", mix / "base", "--data", held_out, "--prompt", "8")
    assert (code, "--prompt 8 is of mixtures" in err) == (2, True)


def test_generate(moqa_command, mix):
    code, out, _ = moqa_command("generate", mix, "The history of", "--max-tokens", "4", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["variant"] in read_mixture(mix).router.choices
    assert 0 < found["confidence"] <= 1
    code, out, _ = moqa_command("generate", mix, "The", "--max-tokens", "4", "--json", "--variant", "wide")
    assert (json.loads(out)["variant"], json.loads(out)["confidence"]) == ("wide", None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--variant", "french"), "variant french is unknown"),
        (("--adjustment", "x"), "is a mixture: an adjustment such as x needs a checkpoint"),
    ],
)
def test_generate_refuses(moqa_command, mix, words, message):
    code, _, err = moqa_command("generate", mix, "The", *words)
    assert (code, message in err) == (2, True)
    code, _, err = moqa_command("generate", mix, "")
    assert (code, "the prompt has no tokens" in err) == (2, True)


def test_verify(moqa_command, mix, tmp_path):
    code, out, _ = moqa_command("verify", mix)
    assert (code, "sound, 4 variants (base, novels, python, wide) and their router" in out) == (0, True)
    changed = shutil.copytree(mix, tmp_path / "mix")
    (changed / "router.safetensors").write_bytes(b"nothing")
    (changed / "python" / "adjustment.safetensors").unlink()
    code, _, err = moqa_command("verify", changed)
    assert (code, err.count("\n")) == (2, 2)
