"""`moqa verify`: every byte that loading uses is covered, and every fault has a line."""

import json
import shutil

import pytest

import moqa
from moqa.format.manifest import CARD, MANIFEST
from moqa.runtime.verify import verify
from moqa.storage.artifact import checksum

COMPANIONS = [
    "config.json", "generation_config.json", "model.safetensors.index.json", "routing.json", "tokenizer.json",
    "tokenizer_config.json",
]  # fmt: skip
CACHE = ["cache/cache-00001-of-00002.safetensors", "cache/cache-00002-of-00002.safetensors", "cache/cache.json"]
WEIGHTS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
ADJUSTMENT = ["novel/adjustment.json", "novel/adjustment.safetensors"]


@pytest.fixture(scope="module")
def whole(tiny_model, texts, tmp_path_factory):
    """A checkpoint with a whole cache and an adjustment inside."""
    folder = tmp_path_factory.mktemp("verify")
    profile = moqa.profile(tiny_model, [texts["wiki"]], folder / "profile", samples=4, context=32, self_samples=0)
    plan = moqa.plan(profile, strategy="uniform", widths=(3,))
    out = moqa.quantize(tiny_model, plan, folder / "out", method="rtn", profile=profile, cache="full")
    moqa.adjust(out, [texts["python"]], out / "novel", samples=8, budget="20%")
    return out


@pytest.fixture
def checkpoint(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "out")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


def make_older(folder):
    """As checkpoints were before companions had hashes."""
    path = folder / MANIFEST
    data = json.loads(path.read_text())
    del data["companions"]
    path.write_text(json.dumps(data | {"checksum": checksum(data)}))


def test_says_what_it_covers(checkpoint, moqa_command):
    code, out, err = moqa_command("verify", checkpoint)
    assert (code, err) == (0, "")
    covered = out.splitlines()[1].removeprefix("covered: ").split(", ")
    assert sorted(covered) == sorted([MANIFEST, *WEIGHTS, *COMPANIONS, *CACHE, *ADJUSTMENT])
    assert {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()} == {
        *covered, CARD,  # which people may edit
    }  # fmt: skip
    assert len(out.splitlines()) == 2


@pytest.mark.parametrize("name", [*WEIGHTS, *COMPANIONS, *CACHE, *ADJUSTMENT])
@pytest.mark.parametrize("damage", [flip, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_one_bit_and_one_file(name, damage, checkpoint):
    damage(checkpoint / name)
    if not (checkpoint / ADJUSTMENT[0]).exists():
        assert verify(checkpoint).faults == []  # without its record it is no adjustment, and nothing loads it
        return
    [fault] = verify(checkpoint).faults
    assert name.rpartition("/")[2] in fault


def test_a_vocabulary_with_two_entries_swapped(checkpoint, moqa_command):
    path = checkpoint / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(data))
    code, out, err = moqa_command("verify", checkpoint)
    assert (code, out) == (2, "")
    assert err == f"moqa: {path} was changed after it was written: its sha256 differs from the manifest's\n"


def test_one_line_for_each_fault(checkpoint, moqa_command):
    flip(checkpoint / WEIGHTS[1])
    (checkpoint / WEIGHTS[2]).unlink()
    flip(checkpoint / "tokenizer.json")
    (checkpoint / "generation_config.json").unlink()
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    code, out, err = moqa_command("verify", checkpoint)
    assert (code, out) == (2, "")
    named = (WEIGHTS[1], WEIGHTS[2], "generation_config.json", "tokenizer.json", "chat_template.jinja")
    assert all(name in line for name, line in zip(named, err.splitlines(), strict=True))


@pytest.mark.parametrize(
    "name",
    [
        "added_tokens.json", "chat_template.jinja", "adapter_config.json", "adapter_model.safetensors",
        "special_tokens_map.json", "model.safetensors", "pytorch_model.bin", "tokenizer.model",
        "additional_chat_templates/tool.jinja",
    ],
)  # fmt: skip
def test_a_file_that_nobody_recorded(name, checkpoint):
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).write_text("{}")
    [fault] = verify(checkpoint).faults
    assert fault == f"{checkpoint / name} is not recorded in moqa.json, but loading would use it: remove it"


def test_files_that_loading_does_not_use(checkpoint):
    for name in ("README.md", "plan.json", "proof.json", "report.html", "notes.txt", ".gitattributes"):
        (checkpoint / name).write_text("{}")
    assert verify(checkpoint).faults == []


def test_an_adjustment_of_another_checkpoint(checkpoint):
    manifest = json.loads((checkpoint / MANIFEST).read_text()) | {"model": "elsewhere"}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest | {"checksum": checksum(manifest)}))
    assert verify(checkpoint).faults == [f"{checkpoint / 'novel'} is an adjustment of another checkpoint: remove it"]


def test_an_older_checkpoint_names_what_it_cannot_cover(checkpoint, moqa_command):
    shutil.rmtree(checkpoint / "novel")
    make_older(checkpoint)
    code, out, err = moqa_command("verify", checkpoint)
    assert (code, err) == (0, "")
    assert out.splitlines()[2] == (
        "not covered, because this checkpoint was made by an older moqa: generation_config.json, "
        "model.safetensors.index.json, tokenizer.json, tokenizer_config.json"
    )
    for name in (*WEIGHTS, "config.json", "routing.json", *CACHE):
        assert name in out.splitlines()[1]


@pytest.mark.parametrize("name", ["routing.json", *CACHE])
def test_an_older_checkpoint_still_checks_what_has_hashes_of_its_own(name, checkpoint):
    shutil.rmtree(checkpoint / "novel")
    make_older(checkpoint)
    flip(checkpoint / name)
    assert len(verify(checkpoint).faults) == 1
