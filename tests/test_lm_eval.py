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

pytest.importorskip("lm_eval", reason="needs pip install 'lm_eval[api]'")

ROOT = Path(__file__).parents[1]
CONTEXT = 4095


@pytest.fixture(scope="module")
def packed(tiny_model, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    options = {"samples": 2, "context": 32, "self_samples": 0, "method": "rtn"}
    measured = moqa.profile(tiny_model, [texts["novels"]], folder / "profile", **options)
    chosen = moqa.plan(measured, None, strategy="uniform", widths=(4,))
    return moqa.quantize(tiny_model, chosen, folder / "out", method="rtn", profile=measured)


def test_local_completions_agrees_with_moqa_evaluate(packed, tmp_path):
    model, tokenizer = load_any(packed)
    text = (ROOT / "reference" / "text" / "wiki.test.txt").read_text()[: 8 * CONTEXT]
    ends = [end for _, end in tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]]
    # one window: at the borders of several, the harness also scores tokens that only begin a window for moqa
    (tmp_path / "text.txt").write_text(text[: ends[CONTEXT - 1]])
    measured = moqa.evaluate(packed, {"text": tmp_path / "text.txt"}, context=CONTEXT, windows=None)
    with running((model, tokenizer)) as url:
        # the harness keeps a place for a token to write, and one to begin the window with
        options = f"model=tiny,base_url={url}/v1/completions,max_length={CONTEXT + 2}"
        done = subprocess.run(
            [
                sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", options,
                "--include_path", ROOT / "recipes" / "lm_eval", "--tasks", "text_file",
                "--output_path", "results.json",
            ],
            cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")},
            capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "remote tokenizer" in done.stderr
    found = json.loads(next(tmp_path.glob("results*.json")).read_text())["results"]["text_file"]["bits_per_byte,none"]
    assert found == pytest.approx(measured.distributions["text"].bits_per_byte, abs=1e-3)
