"""Mixtures of image classifiers: built from folders of images, loaded, routed by the image, measured and refused."""

import json

import pytest
import torch
from images import CLASSES, save_classifier, save_images

import moqa
from moqa.errors import MoqaError
from moqa.mixture.evaluate import evaluate_mixture
from moqa.mixture.features import read
from moqa.mixture.load import load_any
from moqa.mixture.record import read_mixture
from moqa.mixture.variants import CheckpointVariant
from moqa.mixture.verify import verify_mixture

FAST = {"samples": 8, "profile_samples": 8}
PLAIN = {"strategy": "uniform", "method": "rtn"}


def of_width(width, **more):
    return CheckpointVariant(widths=(width,), **{**PLAIN, **more})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    save_classifier("resnet", root / "model")
    for seed, name in enumerate(("plain", "other", "test"), 1):
        save_images(root / name, each=10, seed=seed)
    return root


@pytest.fixture(scope="module")
def mix(folders):
    """Checkpoints of 2 and 4 bits; do not change it."""
    data = {name: folders / name for name in ("plain", "other")}
    specs = {"small": of_width(2, groups=(64,)), "wide": of_width(4)}
    return moqa.build_mixture(folders / "model", data, folders / "mix", variants=specs, **FAST).folder


def test_it_is_built_with_the_router_of_images(mix):
    record = read_mixture(mix)
    assert (record.router.kind, record.router.features, record.router.context) == ("se-resnet", 3, 1)
    assert record.default == "wide"
    assert record.variants["wide"].loss["plain"] < record.variants["small"].loss["plain"]
    assert record.router.windows == {"plain": 8, "other": 8}
    assert verify_mixture(mix)[1] == []


def test_each_image_is_answered_by_the_variant_that_it_is_routed_to(mix):
    model, processor = moqa.load(mix)
    pixels = processor(images=torch.full((3, 40, 40), 90, dtype=torch.uint8), return_tensors="pt")["pixel_values"]
    route = model.mixture.choose(pixels[0])
    alone = moqa.load(mix / route.variant)[0]
    with torch.inference_mode():
        answer = model.mixture.use(route.variant)(pixels).logits
        assert torch.equal(answer, alone(pixels).logits)
    assert answer.shape == (1, len(CLASSES))
    assert 0 < route.confidence <= 1


def test_a_router_sees_an_image_of_any_size_as_one():
    assert read(None, torch.rand(2, 3, 64, 48), "pixels").shape == (2, 1, 3, 32, 32)


def test_it_is_measured_on_held_out_images(mix, folders, moqa_command, tmp_path):
    found = evaluate_mixture(mix, {"test": folders / "test"}, against=folders / "model")
    assert (found.prompt, found.context, found.prompts) == (0, 1, {"test": 40})
    assert found.mean("oracle") <= found.mean("router")
    assert found.mean("oracle") <= found.mean("best-single") <= found.mean("variant", "small")
    code, said, _ = moqa_command(
        "evaluate", mix, "--data", f"test={folders / 'test'}", "--against", folders / "model", "--json",
        tmp_path / "found.json",
    )  # fmt: skip
    assert code == 0
    assert "KL of images" in said
    assert json.loads((tmp_path / "found.json").read_text())["rows"][0]["kind"] == "variant"


def test_images_that_were_fitted_on_are_refused(mix, folders):
    with pytest.raises(MoqaError, match="fitted on"):
        evaluate_mixture(mix, {"plain": folders / "plain"}, against=folders / "model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "linear"}, "--router linear does not read what image classifiers read: give se-resnet"),
        ({"variants": "auto", "budget": "3bpw"}, "variant plain is an adjustment, which no image classifier has"),
        ({"samples": 1}, "the router's fifth of plain has one image: give more images"),
    ],
)
def test_mistakes_leave_nothing(folders, out, options, message):
    specs = {"variants": {"a": of_width(2), "b": of_width(4)}}
    with pytest.raises(MoqaError, match=message):
        moqa.build_mixture(folders / "model", {"plain": folders / "plain"}, out, **{**FAST, **specs, **options})
    assert not list(out.parent.iterdir())


def test_an_unreadable_image_is_named_in_one_line(folders, out, tmp_path, moqa_command):
    bad = save_images(tmp_path / "bad", each=10, seed=9)
    for file in bad.rglob("*.png"):
        file.write_bytes(file.read_bytes()[:40])
    variants = tmp_path / "variants.yaml"
    variants.write_text("a: {strategy: uniform, widths: [2], method: rtn}\nb: {strategy: uniform, widths: [4]}\n")
    code, _, said = moqa_command(
        "mixture", "build", folders / "model", "--data", f"bad={bad}", "--variants", variants, "-o", out
    )
    assert code == 2
    assert said.strip().count("\n") == 0
    assert "cannot be read as an image" in said
    assert not list(out.parent.iterdir())


def test_a_text_router_is_not_for_pixels(mix):
    model, _ = moqa.load(mix)
    with pytest.raises(MoqaError, match=r"the mixture was given list: its router reads \[channels, height, width\]"):
        model.mixture.choose([1, 2, 3])
    with pytest.raises(MoqaError, match=r"the mixture was given \[1, 3, 32, 32\]"):
        model.mixture.choose(torch.zeros(1, 3, 32, 32))


def test_it_writes_no_text(mix, folders):
    with pytest.raises(MoqaError, match="is an image classifier: give a causal language model"):
        load_any(mix)
    with pytest.raises(MoqaError, match="--prompt 8 is of texts"):
        evaluate_mixture(mix, {"test": folders / "test"}, against=folders / "model", prompt=8)
