"""The commands of docs/serving.md run as they stand there, on a small model."""

import re
import shlex
from pathlib import Path

import pytest
from gguf_models import make_model

import moqa

PAGE = Path(__file__).parents[1] / "docs" / "serving.md"
COMMANDS = re.findall(r"^\$ moqa (.*)$", PAGE.read_text(), re.MULTILINE)


@pytest.mark.slow
def test_commands_do_what_the_page_says(moqa_command, texts, tmp_path):
    model = make_model(tmp_path / "model", moe_intermediate_size=256, num_hidden_layers=1)
    moqa.profile(model, [texts["wiki"]], tmp_path / "profile", samples=4, context=32, self_samples=1)
    places = {"runs/profile": tmp_path / "profile", "reference/model": model}
    assert len(COMMANDS) == 7
    for command in COMMANDS:
        words = [
            str(places.get(word, tmp_path / word if word.startswith("runs/") else word))
            for word in shlex.split(command)
        ]
        code, _, err = moqa_command(*words)
        assert code == 0, err
    for made in ("model.gguf", "imatrix.gguf", "types.txt", "vllm/config.json"):
        assert (tmp_path / "runs" / made).is_file()
