"""Image classifiers go the same way as language models: profile, plan, quantize, verify, load, evaluate."""

import json
import shutil

import pytest
import torch
from images import CLASSES, MODELS, ROLES, SIZE, save_classifier, save_images
from PIL import Image
from transformers import AutoModelForImageClassification

import moqa
from moqa.cli.main import main
from moqa.data import cut_images, read_images
from moqa.errors import MoqaError
from moqa.estimate import estimate
from moqa.models.layerwise import LayerwiseModel
from moqa.models.layout import Convolution, input_rows, output_rows
from moqa.models.view import open_model
from moqa.tasks import find_task

SAMPLES = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for name in MODELS:
        save_classifier(name, root / name)
    save_images(root / "calib", each=8, seed=1)
    save_images(root / "test", each=6, seed=2)
    return root


@pytest.fixture(scope="module", params=MODELS)
def made(request, folders):
    """Name of a classifier, its profile, and checkpoints at 8 and 2 bits."""
    name = request.param
    profile = moqa.profile(folders / name, {"a": folders / "calib"}, folders / f"{name}.profile", samples=SAMPLES)
    for width in (8, 2):
        plan = moqa.plan(profile, widths=[width], strategy="uniform")
        moqa.quantize(folders / name, plan, folders / f"{name}-{width}", profile=profile)
    return name, profile


class TestSteps:
    def test_a_dry_run_tells_what_it_costs(self, made, folders):
        name, profile = made
        chosen = moqa.plan(profile, widths=[3], strategy="uniform")
        some, more = (
            estimate(folders / name, chosen, profile, profiled=profiled, held_out=12) for profiled in (True, False)
        )
        assert some.checkpoint_bytes == more.checkpoint_bytes == chosen.account.checkpoint
        assert min(some.seconds, more.seconds) > 0

    def test_a_profile_measures_every_unit(self, made):
        name, profile = made
        record = profile.record
        assert {unit.role for unit in record.units} == ROLES[name]
        assert (record.task, record.settings.context, list(record.distributions)) == ("image_classification", 1, ["a"])
        assert (record.distributions["a"].samples, record.distributions["a"].tokens) == (SAMPLES, SAMPLES)
        assert profile.samples("a").shape == (SAMPLES, 3, SIZE, SIZE)
        sensitivity = profile.sensitivity("a")
        assert bool((sensitivity[:, 0] > 0).all())
        assert bool((sensitivity.diff(dim=1) <= 0).all())

    def test_fewer_bits_lose_more(self, made, folders):
        name, _ = made
        found = {
            width: moqa.evaluate(folders / f"{name}-{width}", {"t": folders / "test"}, against=folders / name)
            for width in (8, 2)
        }
        quality = {width: one.distributions["t"] for width, one in found.items()}
        assert quality[8].kl_divergence < 1e-3
        assert quality[2].kl_divergence > 20 * quality[8].kl_divergence
        assert (quality[8].tokens, quality[8].bits_per_byte) == (24, None)
        assert 0 <= quality[8].accuracy <= 1
        assert found[2].bytes < found[8].bytes

    def test_sensitivity_tells_the_divergence_of_a_plan(self, made, folders):
        name, profile = made
        plan = moqa.plan(profile, widths=[2], strategy="uniform")
        measured = moqa.evaluate(folders / f"{name}-2", {"t": folders / "test"}, against=folders / name)
        ratio = measured.distributions["t"].kl_divergence / plan.predicted["a"]
        assert 0.2 < ratio < 5

    def test_the_default_plan_needs_no_text_of_the_model(self, made):
        _, profile = made
        plan = moqa.plan(profile, "4bpw")
        assert (plan.options.hedge, plan.mixture) == (0.0, {"a": 1.0})
        assert plan.account.bits_per_weight <= 4

    def test_one_command_does_it_all(self, made, folders, tmp_path, monkeypatch, capsys):
        name, _ = made
        out = tmp_path / "out"
        monkeypatch.setattr("sys.argv", [
            "moqa", "quantize", str(folders / name), "--bpw", "4", "--samples", "16", "-o", str(out), "--data",
            f"a={folders / 'calib'}",
        ])  # fmt: skip
        with pytest.raises(SystemExit) as done:
            main()
        assert not done.value.code, capsys.readouterr().err
        proof = json.loads((out / "proof.json").read_text())
        assert proof["ours"]["distributions"]["a"]["accuracy"] is not None
        assert (out / "report.html").is_file()


class TestLoading:
    def test_packed_and_reference_kernels_agree(self, made, folders):
        name, _ = made
        x = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        packed, processor = moqa.load(folders / f"{name}-8")
        reference, _ = moqa.load(folders / f"{name}-8", kernels="reference")
        original = open_model(folders / name).model
        with torch.no_grad():
            found, expected, whole = packed(x).logits, reference(x).logits, original(x).logits
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
        assert (expected - whole).norm() < 0.05 * whole.norm()
        pixels = processor(images=[torch.zeros(3, 40, 40, dtype=torch.uint8).numpy()])["pixel_values"]
        assert pixels[0].shape[-1] == SIZE

    def test_transformers_loads_it(self, made, folders):
        name, _ = made
        x = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
        ours, _ = moqa.load(folders / f"{name}-8")
        theirs = AutoModelForImageClassification.from_pretrained(folders / f"{name}-8", dtype=torch.float32)
        with torch.no_grad():
            assert torch.equal(theirs(x).logits, ours(x).logits)
        card = (folders / f"{name}-8" / "README.md").read_text()
        assert 'AutoModelForImageClassification.from_pretrained("FOLDER_OR_ID")' in card
        assert "CausalLM" not in card

    def test_stages_are_the_model(self, made, folders):
        name, _ = made
        model = open_model(folders / name, keep=False).model
        stages, x = LayerwiseModel(model), torch.randn(2, 3, SIZE, SIZE)
        hidden = stages.embed(x)
        for index in range(stages.depth):
            hidden = stages.run_block(index, hidden)
        with torch.no_grad():
            assert torch.equal(stages.head(hidden), model(x).logits)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": (2, 1)}])
def test_a_convolution_is_a_product_of_rows(options):
    module = torch.nn.Conv2d(5, 7, (3, 2), **options)
    x = torch.randn(2, 5, 9, 11)
    rows = input_rows(module, x) @ module.weight.flatten(1).T
    out = module(x)
    torch.testing.assert_close(rows + module.bias, output_rows(module, out), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(Convolution.of(module).outputs(rows + module.bias, x), out, rtol=1e-4, atol=1e-5)


class TestRefusals:
    """One line that says what does not fit, and nothing is written."""

    @pytest.fixture
    def out(self, tmp_path):
        yield tmp_path / "out"
        assert not list(tmp_path.glob("*out*"))

    def refused(self, model, data, out) -> str:
        with pytest.raises(MoqaError) as error:
            moqa.profile(model, data, out, samples=4)
        return str(error.value)

    def test_text_for_an_image_classifier(self, folders, tmp_path, out):
        (tmp_path / "wiki.txt").write_text("some text")
        message = self.refused(folders / "resnet", {"wiki": tmp_path / "wiki.txt"}, out)
        assert "wiki.txt is a file: an image classifier reads a folder with one folder for each class" in message

    def test_images_for_a_language_model(self, tiny_model, folders, out):
        message = self.refused(tiny_model, {"a": folders / "test"}, out)
        assert message.endswith("holds images: a causal language model reads text")

    def test_no_such_folder(self, folders, out):
        assert "nowhere does not exist" in self.refused(folders / "vit", {"a": "nowhere"}, out)

    def test_a_damaged_image(self, folders, tmp_path, out):
        shutil.copytree(folders / "test", tmp_path / "broken")
        path = tmp_path / "broken" / "dog" / "003.png"
        path.write_bytes(path.read_bytes()[:300])
        with pytest.raises(MoqaError, match=r"a=.*broken: .*dog/003.png cannot be read as an image"):
            moqa.profile(folders / "vit", {"a": tmp_path / "broken"}, out, samples=24)

    def test_images_without_labels(self, folders, tmp_path, out):
        (tmp_path / "flat").mkdir()
        shutil.copy(folders / "test" / "cat" / "000.png", tmp_path / "flat" / "one.png")
        message = self.refused(folders / "vit", {"a": tmp_path / "flat"}, out)
        assert "flat/one.png has no label: put it into a folder named as its class" in message

    @pytest.mark.parametrize("label", ["horse", "4", "-1", "²"])
    def test_a_label_that_the_model_does_not_have(self, label, folders, tmp_path, out):
        shutil.copytree(folders / "test" / "cat", tmp_path / "other" / label)
        message = self.refused(folders / "resnet", {"a": tmp_path / "other"}, out)
        assert f"{label} is not a class of {folders / 'resnet'}: its 4 classes are {', '.join(CLASSES)}" in message

    def test_a_label_by_its_number(self, folders, tmp_path):
        for index, name in enumerate(CLASSES):
            shutil.copytree(folders / "test" / name, tmp_path / "numbered" / str(index))
        found = [
            moqa.evaluate(folders / "vit", {"t": where}).distributions["t"].accuracy
            for where in (folders / "test", tmp_path / "numbered")
        ]
        assert found[0] == found[1]

    def test_the_images_that_it_was_fitted_on(self, made, folders, tmp_path):
        name, _ = made
        with pytest.raises(MoqaError, match=r"is the text that .* was fitted on"):
            moqa.evaluate(folders / f"{name}-8", {"t": folders / "calib"})
        # the same pictures under other names
        shutil.copytree(folders / "calib", tmp_path / "copy")
        (tmp_path / "copy" / "cat" / "000.png").unlink()
        with pytest.raises(MoqaError, match="was already fitted on"):
            moqa.evaluate(folders / f"{name}-8", {"t": tmp_path / "copy"})

    @pytest.mark.parametrize(
        ("settings", "word"),
        [
            ({"size": {"height": 10**6, "width": 32}}, "has height 1000000: moqa takes -1024 to 1024"),
            ({"size": {"shortest_edge": 10**30}}, f"has shortest_edge {10**30}: moqa takes"),
            ({"do_center_crop": True, "crop_size": {"height": 1025, "width": 8}}, "has height 1025: moqa takes"),
            ({"do_pad": True, "pad_size": {"height": 8, "width": 10**5}}, "has width 100000: moqa takes"),
            ({"rescale_factor": float("nan")}, "has rescale_factor nan: moqa takes"),
            (
                {"image_processor_type": "ConvNextImageProcessor", "crop_pct": 1e-6},
                "has crop_pct 1e-06: moqa takes 0.5 to 1024",
            ),
            ({"image_processor_type": "Siglip2ImageProcessor"}, "is of type Siglip2: moqa knows Beit, "),
            ({"resample": 99}, "fails: Unknown resampling filter"),
            ({"image_mean": [0.5]}, "fails: mean must have 3 elements"),
            ({"size": {"height": "x", "width": 8}}, "fails: 'str' object"),
            ({"image_std": [0, 0, 0]}, "makes NaN or infinite pixels"),
            ({"size": {"height": 64, "width": 64}}, "does not fit the model: Input image size"),
        ],
    )
    def test_an_image_processor_that_costs_more_or_makes_no_pixels(self, settings, word, folders, tmp_path, out):
        model = shutil.copytree(folders / "vit", tmp_path / "model")
        path = model / "preprocessor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        assert word in self.refused(model, {"a": folders / "calib"}, out)

    @pytest.mark.parametrize(("size", "allowed"), [(600, 1200), ([500, 8], 1024), (10**4, None)])
    def test_an_image_processor_may_make_twice_the_size_of_the_model(self, size, allowed, folders, tmp_path):
        model = shutil.copytree(folders / "vit", tmp_path / "model")
        config, settings = model / "config.json", model / "preprocessor_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"image_size": size}))
        most = allowed or 2**10
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"size": {"height": most, "width": 8}}))
        task = find_task("image_classification")
        if allowed is None:
            with pytest.raises(MoqaError, match="image_size is 10000: moqa builds models with up to 4096"):
                task.processor(model)
            return
        assert task.processor(model).size["height"] == most
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"size": {"height": most + 1, "width": 8}}))
        with pytest.raises(MoqaError, match=f"has height {most + 1}"):
            task.processor(model)

    def test_a_size_that_the_family_does_not_have_allows_nothing(self, folders, tmp_path, out):
        model = shutil.copytree(folders / "resnet", tmp_path / "model")
        config, settings = model / "config.json", model / "preprocessor_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"image_size": 2**12}))
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"size": {"height": 2**12, "width": 8}}))
        assert "has height 4096: moqa takes -1024 to 1024" in self.refused(model, {"a": folders / "calib"}, out)

    @pytest.mark.parametrize(("each", "word"), [(8, "fails: "), (64, r"of shapes \(3, 36, 36\) and \(3, 40, 40\)")])
    def test_images_of_several_sizes_for_a_processor_that_leaves_them(self, each, word, folders, tmp_path):
        model = shutil.copytree(folders / "resnet", tmp_path / "model")
        settings = model / "preprocessor_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"do_resize": False}))
        save_images(tmp_path / "data", each=each, seed=3)
        for path in (tmp_path / "data" / min(CLASSES)).iterdir():
            with Image.open(path) as image:
                image.resize((40, 40)).save(path)
        with pytest.raises(MoqaError, match=word):
            cut_images(read_images(f"a={tmp_path}/data"), find_task("image_classification").reader(model))

    def test_own_samples(self, folders, out):
        with pytest.raises(MoqaError, match="resnet is an image classifier: it writes no samples"):
            moqa.profile(folders / "resnet", {"a": folders / "calib"}, out, self_samples=3)

    @pytest.mark.parametrize("use", [moqa.bench, lambda folder: moqa.memory_budget(folder, "1GiB")])
    def test_what_only_language_models_do(self, use, folders):
        with pytest.raises(MoqaError, match="is an image classifier: give a causal language model"):
            use(folders / "resnet")
