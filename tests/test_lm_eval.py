"""The evaluation harness against the server measures what `moqa evaluate` measures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from serving import PATIENCE, running

import moqa
from moqa.generation import load_any

pytest.importorskip("lm_eval", reason="needs pip install 'lm_eval[api,hf]'")

ROOT = Path(__file__).parents[1]
CONTEXT = 4095


@pytest.fixture(scope="module")
def packed(tiny_model, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    options = {"samples": 2, "context": 32, "self_samples": 0, "method": "rtn"}
    measured = moqa.profile(tiny_model, [texts["novels"]], folder / "profile", **options)
    chosen = moqa.plan(measured, None, strategy="uniform", widths=(4,))
    return moqa.quantize(tiny_model, chosen, folder / "out", method="rtn", profile=measured)


@pytest.fixture(scope="module")
def measured(packed, tmp_path_factory):
    """A folder with one window of text, and the bits per byte that moqa measures on it."""
    folder, tokenizer = tmp_path_factory.mktemp("text"), load_any(packed)[1]
    text = (ROOT / "reference" / "text" / "wiki.test.txt").read_text()[: 8 * CONTEXT]
    ends = [end for _, end in tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]]
    # one window: at the borders of several, the harness also scores tokens that only begin a window for moqa
    (folder / "text.txt").write_text(text[: ends[CONTEXT - 1]])
    found = moqa.evaluate(packed, {"text": folder / "text.txt"}, context=CONTEXT, windows=None)
    return folder, found.distributions["text"].bits_per_byte


def harness(folder, model, options):
    """Bits per byte by the harness's own command, and what it printed."""
    done = subprocess.run(
        [
            sys.executable, "-m", "lm_eval", "run", "--model", model, "--model_args", options, "--include_path",
            ROOT / "recipes" / "lm_eval", "--tasks", "text_file", "--output_path", f"{model}.json",
        ],
        cwd=folder, env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")},
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(next(folder.glob(f"{model}*.json")).read_text())["results"]
    return results["text_file"]["bits_per_byte,none"], done.stderr


def test_local_completions_agrees_with_moqa_evaluate(packed, measured):
    folder, ours = measured
    with running(load_any(packed)) as url:
        # the harness keeps a place for a token to write, and one to begin the window with
        options = f"model=tiny,base_url={url}/v1/completions,max_length={CONTEXT + 2}"
        found, printed = harness(folder, "local-completions", options)
    assert "remote tokenizer" in printed
    assert found == pytest.approx(ours, abs=1e-3)


def test_a_checkpoint_that_the_harness_loads_itself_agrees_too(packed, measured):
    folder, ours = measured
    found, _ = harness(folder, "hf", f"pretrained={packed},dtype=float32,max_length={CONTEXT}")
    assert found == pytest.approx(ours, abs=1e-3)
