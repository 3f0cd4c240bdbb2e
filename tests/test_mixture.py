"""Mixtures of a tiny random model: built, loaded, routed, measured, verified and refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import REFERENCE, VARIANTS, make_tiny_model
from safetensors.torch import load_file, save_file

import moqa
from moqa.data import Distribution
from moqa.errors import MoqaError
from moqa.format.reader import open_checkpoint
from moqa.mixture.evaluate import evaluate_mixture
from moqa.mixture.features import read
from moqa.mixture.generate import continued, route_of
from moqa.mixture.measure import continuation
from moqa.mixture.record import MIXTURE, ROUTER, read_mixture
from moqa.mixture.route import RoutedPrompt
from moqa.mixture.router import ROUTERS, ROUTERS_OF, SIDE
from moqa.mixture.threshold import train
from moqa.mixture.train import RouterSamples, chosen, soft_targets
from moqa.mixture.variants import AdjustmentVariant, CheckpointVariant, MadeVariant, proposed, read_variants
from moqa.mixture.verify import verify_mixture
from moqa.progress import quiet
from moqa.storage.artifact import checksum

FAST = {"strategy": "uniform", "method": "rtn"}
SMALL = {"samples": 8, "profile_samples": 4}


@pytest.fixture
def changed(mix, tmp_path):
    """A copy that may be changed."""
    return shutil.copytree(mix, tmp_path / "mix")


@pytest.fixture(scope="module")
def held_out():
    def read(name):
        text = (REFERENCE / "text" / f"{name}.test.txt").read_text(encoding="utf-8")[:12_000]
        return Distribution(name, (text,), f"{name}.test.txt")

    return [read(name) for name in ("wiki", "python")]


class TestVariants:
    def test_are_read_in_the_order_of_the_file(self, tmp_path):
        (tmp_path / "v.yaml").write_text(VARIANTS)
        found = read_variants(tmp_path / "v.yaml")
        assert list(found) == ["base", "python", "novels", "wide"]
        assert isinstance(found["base"], CheckpointVariant)
        assert found["python"] == AdjustmentVariant(adjustment="python", bytes="30%", samples=8)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("base: {bits: 3}", "base has the unknown key bits: known are known, budget, method"),
            ("a: {adjustment: x, bites: 3}", "a has the unknown key bites"),
            ("base: {widths: two}", "base has widths 'two'"),
            ("base: {plan: p.json, budget: 3bpw}", "a plan says all but the method: leave out budget"),
            ("base: 3", "base is int: an entry has keys"),
            ("../up: {}", "is no name of a variant"),
            ("[base]", "names no variant"),
            ("", "names no variant"),
            ("a: {b", "is not YAML"),
        ],
    )
    def test_that_are_wrong(self, tmp_path, text, message):
        (tmp_path / "v.yaml").write_text(text)
        with pytest.raises(MoqaError, match=message.replace("[", r"\[")):
            read_variants(tmp_path / "v.yaml")

    def test_of_a_file_that_is_not_there(self):
        with pytest.raises(MoqaError, match=r"nowhere\.yaml cannot be read: No such file"):
            read_variants("nowhere.yaml")

    @pytest.mark.parametrize(
        ("specs", "message"),
        [
            ({"base": CheckpointVariant(**FAST)}, "a mixture of 1 variant has nothing to choose from"),
            ({n: AdjustmentVariant(adjustment="wiki") for n in "ab"}, "no variant is a checkpoint"),
            ({"a": CheckpointVariant(method="awq"), "b": CheckpointVariant()}, "method awq is unknown"),
            ({"a": CheckpointVariant(known=("x",)), "b": CheckpointVariant()}, "known x is unknown: there are wiki"),
            ({"a": CheckpointVariant(), "b": CheckpointVariant()}, "variant a has no budget"),
            ({"a": CheckpointVariant(**FAST), "b": AdjustmentVariant(adjustment="x")}, "adjustment x is unknown"),
            (
                {"a": CheckpointVariant(plan="p.json"), "b": AdjustmentVariant(adjustment="wiki")},
                "its checkpoint is not planned here",
            ),
            (
                {"a": CheckpointVariant(**FAST), "b": AdjustmentVariant(adjustment="wiki", mode="x")},
                "mode x is unknown",
            ),
            (
                {"a": CheckpointVariant(**FAST), "b": AdjustmentVariant(adjustment="wiki", of="c")},
                "of c is unknown: there are a",
            ),
        ],
    )
    def test_that_cannot_be_made_leave_nothing(self, tiny_model, texts, out, specs, message):
        with pytest.raises(MoqaError, match=message):
            moqa.build_mixture(tiny_model, [texts["wiki"]], out, variants=specs, **SMALL)
        assert not list(out.parent.iterdir())

    def test_that_are_proposed(self):
        found = proposed(["wiki", "base"])
        assert list(found) == ["base", "wiki", "base-text"]
        assert found["base-text"].adjustment == "base"


def shape_of(kind, features):
    """Of what a router reads of one token, or of an image."""
    return (features, SIDE, SIDE) if ROUTERS.find(kind).reads == "pixels" else (features,)


class TestRouters:
    @pytest.mark.parametrize("kind", ROUTERS)
    def test_no_token_of_the_continuation_changes_the_route(self, kind):
        torch.manual_seed(0)
        router, shape = ROUTERS.find(kind)(16, 3).eval(), shape_of(kind, 16)
        text = torch.randn(2, 40, *shape)
        other = text.clone()
        other[:, 25:] = torch.randn(2, 15, *shape)
        with torch.no_grad():
            assert torch.allclose(router(text)[:, :25], router(other)[:, :25], atol=1e-6)
            assert torch.allclose(router(text)[:, 24].softmax(-1), router.after(text[:, :25]), atol=1e-5)
            assert not torch.allclose(router(text)[:, 25:], router(other)[:, 25:], atol=1e-3)

    @pytest.mark.parametrize("kind", ROUTERS)
    def test_learns_which_variant_suits_a_text(self, kind):
        shape, kinds = shape_of(kind, 8), torch.arange(48) % 3
        length = 1 if len(shape) > 1 else 64  # an image is one token, and has a loss of its own
        features = torch.randn(48, length, *shape, generator=torch.Generator().manual_seed(1))
        features[torch.arange(48), :, kinds] += 2.0
        loss = torch.full((3, 48, max(length - 1, 1)), 0.2)
        loss[kinds, torch.arange(48)] = 0.1
        order = kinds.argsort(stable=True)  # windows of a distribution follow each other
        samples = RouterSamples.of(features[order], loss[:, order], [16] * 3)
        held = torch.arange(48) % 4 == 3
        trained = train(kind, samples.some(~held), samples.some(held), default=0, seed=0, report=quiet)
        assert trained.oracle == pytest.approx(0.1)
        assert trained.loss < 0.5 * (trained.single + trained.oracle)
        assert all(share > 0.15 for share in trained.usage)

    def test_that_knows_nothing_leaves_all_to_the_best_single_variant(self):
        generator = torch.Generator().manual_seed(0)
        features, loss = torch.randn(32, 64, 8, generator=generator), torch.rand(2, 32, 1, generator=generator)
        loss = torch.cat([loss[:1] * 0.5, loss[1:]]).expand(2, 32, 63)
        samples = RouterSamples.of(features, loss, [16, 16])
        held = torch.arange(32) % 4 == 3
        trained = train("linear", samples.some(~held), samples.some(held), default=0, seed=0, report=quiet)
        assert trained.loss <= trained.single + 1e-6

    def test_each_is_of_a_task(self):
        assert sorted(kind for kinds in ROUTERS_OF.values() for kind in kinds) == sorted(ROUTERS)

    def test_the_loss_of_a_continuation_leaves_out_its_prompt(self):
        loss = torch.rand(3, 20)
        assert torch.allclose(continuation(loss)[:, 7], loss[:, 7:].mean(1))

    def test_targets_follow_the_gap(self):
        targets, weights = soft_targets(torch.tensor([[0.0, 1.0, 1.0], [0.3, 0.2, 0.2]]))
        assert targets.argmax(1).tolist() == [0, 1]
        assert weights[0] > 9 * weights[1]

    def test_below_the_threshold_the_default_is_used(self):
        shares = torch.tensor([[0.6, 0.4], [0.1, 0.9]])
        assert chosen(shares, 0.7, 0).tolist() == [0, 1]
        assert chosen(shares, 1.01, 1).tolist() == [1, 1]


class TestBuilding:
    def test_the_account_is_that_of_the_disk(self, mix):
        record = read_mixture(mix)
        files = {path.stat().st_ino: path.stat().st_size for path in mix.rglob("*.safetensors")}
        assert record.account.total == sum(files.values())
        assert record.account.router == (mix / ROUTER).stat().st_size
        assert record.account.resident <= record.account.total

    def test_files_with_equal_bytes_are_stored_once(self, mix):
        names = ("tokenizer.json", "model-00001-of-00003.safetensors")
        assert all((mix / "base" / name).samefile(mix / "wide" / name) for name in names)
        assert not (mix / "base" / "model-00002-of-00003.safetensors").samefile(
            mix / "wide" / "model-00002-of-00003.safetensors"
        )
        assert read_mixture(mix).account.shared >= (mix / "base" / names[0]).stat().st_size

    def test_nothing_but_the_mixture_and_its_profile_is_left(self, mix):
        assert {path.name for path in mix.iterdir()} == {"base", "python", "novels", "wide", MIXTURE, ROUTER}
        assert {path.name for path in mix.parent.iterdir()} == {"mix", "mix.measured", "variants.yaml"}
        assert not (mix / "base" / "cache").exists()

    def test_a_variant_is_a_checkpoint_of_its_own(self, mix):
        assert moqa.load(mix / "wide")[0].config.model_type == "qwen3_moe"

    def test_a_wider_checkpoint_has_less_loss(self, mix):
        variants = read_mixture(mix).variants
        assert all(variants["wide"].loss[name] < variants["base"].loss[name] for name in variants["base"].loss)

    def test_finished_variants_are_kept_when_it_is_stopped(self, tiny_model, texts, tmp_path, mix, monkeypatch):
        specs = read_variants(mix.parent / "variants.yaml")
        out, options = tmp_path / "mix", {"variants": specs, "router": "linear", **SMALL}
        shutil.copytree(mix.parent / "mix.measured", tmp_path / "mix.measured")

        def stopped(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("moqa.mixture.make.adjust", stopped)
            with pytest.raises(KeyboardInterrupt):
                moqa.build_mixture(tiny_model, list(texts.values()), out, **options)
        assert (tmp_path / ".mix.partial" / "result" / "base" / "moqa.json").is_file()
        with monkeypatch.context() as patch:
            patch.setattr("moqa.mixture.make.quantize", stopped)
            moqa.build_mixture(tiny_model, list(texts.values()), out, **options)
        assert (out / MIXTURE).read_text() == (mix / MIXTURE).read_text()
        assert (out / ROUTER).read_bytes() == (mix / ROUTER).read_bytes()

    def test_a_made_variant_is_taken_over(self, tiny_model, texts, tmp_path, mix):
        specs = {"first": MadeVariant(folder=str(mix / "base")), "second": MadeVariant(folder=str(mix / "wide"))}
        specs["third"] = MadeVariant(folder=str(mix / "python"), of="first")
        built = moqa.build_mixture(
            tiny_model, {"math": (REFERENCE / "text" / "math.calib.txt")}, tmp_path / "mix", variants=specs,
            router="linear", **SMALL,
        )  # fmt: skip
        before, after = read_mixture(mix).variants, built.record.variants
        assert [after[n].checksum for n in ("first", "second", "third")] == [
            before[n].checksum for n in ("base", "wide", "python")
        ]

    def test_text_that_a_variant_was_fitted_on_cannot_train_the_router(self, tiny_model, texts, out, mix):
        specs = {"a": MadeVariant(folder=str(mix / "base")), "b": MadeVariant(folder=str(mix / "wide"))}
        text = texts["wiki"].texts[0]
        flipped = Distribution("wiki", (text[4000:] + text[:4000],), "flipped")
        with pytest.raises(MoqaError, match="of the text of wiki was already fitted on"):
            moqa.build_mixture(tiny_model, [flipped], out, variants=specs, **SMALL)
        assert not out.exists()


class TestRefusals:
    def test_variants_of_different_models(self, tiny_model, texts, out, mix, tmp_path):
        other = make_tiny_model(tmp_path / "other", inner=32)
        profile = moqa.profile(other, [texts["wiki"]], tmp_path / "p", samples=2, context=32, self_samples=0)
        moqa.quantize(other, moqa.plan(profile, strategy="uniform", widths=(3,)), tmp_path / "q", method="rtn")
        specs = {"a": MadeVariant(folder=str(mix / "base")), "b": MadeVariant(folder=str(tmp_path / "q"))}
        with pytest.raises(MoqaError, match="variant b was made from another model"):
            moqa.build_mixture(
                tiny_model, {"math": REFERENCE / "text" / "math.calib.txt"}, out, variants=specs, **SMALL
            )
        assert not list(out.parent.iterdir())

    def test_variants_with_different_tokenizers(self, tiny_model, out, mix, tmp_path):
        other = shutil.copytree(mix / "wide", tmp_path / "wide")
        path = other / "tokenizer_config.json"
        path.unlink()  # a link to that of the mixture
        path.write_text((mix / "wide" / "tokenizer_config.json").read_text() + "\n")
        packed = open_checkpoint(other)
        from moqa.format.manifest import MANIFEST
        from moqa.format.writer import write_manifest

        write_manifest(packed.manifest, other / MANIFEST)
        specs = {"a": MadeVariant(folder=str(mix / "base")), "b": MadeVariant(folder=str(other))}
        with pytest.raises(
            MoqaError, match=r"variant b has another tokenizer: its tokenizer_config\.json is not that of a"
        ):
            moqa.build_mixture(
                tiny_model, {"math": REFERENCE / "text" / "math.calib.txt"}, out, variants=specs, **SMALL
            )

    def test_a_folder_that_is_no_variant(self, tiny_model, texts, out, mix, tmp_path):
        specs = {"a": MadeVariant(folder=str(mix / "base")), "b": MadeVariant(folder=str(tmp_path))}
        with pytest.raises(MoqaError, match=r"variant b: .* is neither a checkpoint nor an adjustment"):
            moqa.build_mixture(tiny_model, [texts["wiki"]], out, variants=specs, **SMALL)

    def test_a_router_of_other_variants(self, changed):
        tensors = load_file(changed / ROUTER)
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, changed / ROUTER)
        with pytest.raises(MoqaError, match="is not the router of these variants"):
            moqa.load(changed)

    def test_a_variant_of_another_mixture(self, changed):
        shutil.rmtree(changed / "python")
        shutil.copytree(changed / "novels", changed / "python")
        with pytest.raises(MoqaError, match="python is not the variant that the router was trained for"):
            moqa.load(changed)

    def test_a_manifest_that_was_changed(self, changed):
        data = json.loads((changed / MIXTURE).read_text())
        data["router"]["threshold"] = 0.99
        (changed / MIXTURE).write_text(json.dumps(data))
        with pytest.raises(MoqaError, match="was changed after it was written"):
            moqa.load(changed)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"default": "french"}, "there is no variant french"),
            (
                {"variants": {"../up": {"kind": "checkpoint", "of": None, "checksum": "", "bytes": 1, "loss": {}}}},
                "no name",
            ),
            (
                {"variants": {"a": {"kind": "adjustment", "of": "b", "checksum": "", "bytes": 1, "loss": {}}}},
                "a is of b",
            ),
            ({"format": 2}, "this moqa reads up to 1"),
        ],
    )
    def test_a_manifest_that_makes_no_sense(self, changed, change, message):
        data = json.loads((changed / MIXTURE).read_text()) | change
        (changed / MIXTURE).write_text(json.dumps(data | {"checksum": checksum(data)}))
        with pytest.raises(MoqaError, match=message):
            moqa.load(changed)

    def test_an_empty_prompt(self, mix):
        model, tokenizer = moqa.load(mix)
        with pytest.raises(MoqaError, match="the prompt has no tokens"):
            next(moqa.generate(model, tokenizer, ""))

    def test_a_variant_that_is_not_there(self, mix):
        model, _ = moqa.load(mix)
        with pytest.raises(MoqaError, match="variant french is unknown: there are base, novels, python, wide"):
            route_of(model, [1, 2], "french")

    def test_text_that_was_fitted_on(self, mix, texts):
        with pytest.raises(MoqaError, match=r"is the text that .* was fitted on|already fitted on"):
            evaluate_mixture(mix, [texts["wiki"]], windows=2)


@torch.inference_mode()
def logits(model):
    return model(torch.tensor([[5, 17, 400, 3, 99, 1024, 7]])).logits


class TestLoaded:
    def test_each_variant_computes_what_it_computes_alone(self, mix):
        model, _ = moqa.load(mix)
        base, _ = moqa.load(mix / "base")
        expected = {"wide": logits(moqa.load(mix / "wide")[0]), "base": logits(base)}
        for name in ("python", "novels"):
            base.apply(mix / name)
            expected[name] = logits(base)
            base.revert()
        for name in ("base", "python", "wide", "novels", "base", "wide", "python"):
            assert torch.equal(logits(model.mixture.use(name)), expected[name])
            model.mixture.rest([name])

    def test_the_continuation_does_not_change_the_route(self, mix, texts):
        model, tokenizer = moqa.load(mix)
        ids = tokenizer(texts["python"].texts[0][:600]).input_ids
        before = model.mixture.choose(ids[:40])
        list(moqa.generate(model, tokenizer, ids[:40], moqa.Sampling(max_tokens=3)))
        assert model.mixture.choose(ids[:40]) == before

    def test_texts_with_different_variants_side_by_side(self, mix):
        model, tokenizer = moqa.load(mix)
        sampling = moqa.Sampling(max_tokens=8, temperature=0)

        def pieces(name):
            return continued(model, tokenizer, [5, 17, 400], sampling, route_of(model, [5], name))

        alone = {name: [piece.text for piece in pieces(name)] for name in ("base", "python", "wide")}
        together = {name: pieces(name) for name in alone}
        mixed = {name: [] for name in alone}
        for _ in range(8):
            for name, made in together.items():
                mixed[name].append(next(made).text)
        assert mixed == alone

    def test_damage_is_noticed_and_another_variant_used(self, changed):
        model, _ = moqa.load(changed)
        mixture, default = model.mixture, read_mixture(changed).default
        other = next(name for name in ("python", "novels") if name != default)
        (changed / other / "adjustment.safetensors").unlink()
        route = mixture.checked(route_of(model, [1], other))
        assert (route.variant, route.problem) == (default, f"{other} lacks adjustment.safetensors")
        assert mixture.checked(route_of(model, [1], default)).problem is None

    def test_evaluation(self, mix, held_out):
        found = evaluate_mixture(mix, held_out, windows=4)
        choices = read_mixture(mix).router.choices
        assert found.mean("oracle") <= min(found.mean("variant", name) for name in choices) + 1e-6
        assert found.mean("best-single") == pytest.approx(min(found.mean("variant", name) for name in choices))
        assert found.mean("uniform-routing") == pytest.approx(
            sum(found.mean("variant", name) for name in choices) / len(choices), rel=1e-4
        )
        assert all(abs(sum(shares.values()) - 1) < 1e-9 for shares in found.usage.values())

    def test_sound(self, mix):
        assert verify_mixture(mix)[1] == []

    def test_a_flipped_bit_is_a_fault(self, changed):
        path = changed / "novels" / "adjustment.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        assert len(verify_mixture(changed)[1]) == 1


def resident(folder):
    """Bytes of weight files below a folder that are in this process's memory."""
    found, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            here = str(folder) in line and line.endswith(".safetensors")
        elif here and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def test_a_checkpoint_that_rests_takes_no_memory(mix, tmp_path):
    # a copy, whose files no other test has mapped
    folder = shutil.copytree(mix, tmp_path / "mix")
    model, _ = moqa.load(folder, verify=False)
    layers = folder / "wide" / "model-0000"
    expected = logits(model.mixture.use("wide"))
    used = resident(layers)
    assert used > 100_000
    model.mixture.rest(["base"])
    assert resident(layers) < 0.2 * used
    assert torch.equal(logits(model.mixture.use("wide")), expected)
    model.mixture.rest(["wide", "python"])
    assert resident(layers) > 0.5 * used


def test_without_an_intact_variant_what_is_mapped_goes_on(changed):
    mixture = moqa.load(changed)[0].mixture
    expected, files = (
        logits(mixture.use("base")),
        [changed / name / "model-00002-of-00003.safetensors" for name in ("base", "wide")],
    )
    for path in files:
        path.unlink()
    route = mixture.checked(RoutedPrompt("base"))
    assert (route.variant, route.problem) == ("base", "base lacks model-00002-of-00003.safetensors")
    assert torch.equal(logits(mixture.use("base")), expected)


def test_without_a_readable_variant_nothing_is_answered(changed):
    mixture = moqa.load(changed)[0].mixture
    for name in ("base", "wide"):
        with (changed / name / "model-00002-of-00003.safetensors").open("r+b") as file:
            file.truncate(1000)
    with pytest.raises(MoqaError, match="no variant can be read"):
        mixture.checked(RoutedPrompt("python"))
    assert mixture.choose([1, 2]).problem.startswith("the router reads base, which has a model-00002")


def test_routing_is_read_of_each_token(mix):
    model = moqa.load(mix)[0].mixture.use("base")
    ids = torch.randint(8192, (9, 200), generator=torch.Generator().manual_seed(0))  # more than one batch
    shares = read(model, ids, "routing")
    assert shares.shape == (9, 200, 2 * 6)
    assert torch.allclose(shares.sum(-1), torch.tensor(2.0))
    assert torch.allclose(read(model, ids[3:4, :50], "routing"), shares[3:4, :50])
