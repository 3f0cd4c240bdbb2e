"""`moqa merge`: the algebra of EMR-Merging, its bytes, and variants that a request switches to."""

import json
import shutil
from functools import partial

import httpx
import pytest
import torch
from conftest import REFERENCE, make_tiny_model
from safetensors.torch import load_file, save_file
from serving import PATIENCE, running

import moqa
from moqa.errors import MoqaError
from moqa.mixture.elect import agrees, elected, packed_mask, unpacked_mask
from moqa.mixture.load import load_any
from moqa.mixture.merge import merge
from moqa.mixture.merged import read_merged
from moqa.models.view import open_model
from moqa.serve.mixture import RoutedVariants

TEXT = REFERENCE / "text" / "wiki.test.txt"


def refused(moqa_command, *words):
    code, _, stderr = moqa_command(*words)
    assert code == 2
    assert stderr.count("\n") == 1
    return stderr


def published(base, variants):
    """EMR-Merging as its paper's formulas say it, on whole state dicts: another way to the same numbers."""
    vectors = [{k: v[k] - base[k] for k in base} for v in variants]
    unified, merged = {}, []
    for key in base:
        stack = torch.stack([vector[key] for vector in vectors])
        gamma = torch.sign(stack.sum(0))
        best = torch.zeros_like(base[key])
        for vector in stack:
            best = torch.maximum(best, torch.where(torch.sign(vector) == gamma, vector.abs(), torch.zeros_like(best)))
        unified[key] = gamma * best
    for vector in vectors:
        masks = {k: ((vector[k] * unified[k]) > 0).float() for k in base}
        above = sum(vector[k].abs().mean() for k in base)
        below = sum((masks[k] * unified[k]).abs().mean() for k in base)
        merged.append({k: base[k] + above / below * masks[k] * unified[k] for k in base})
    return merged


def parameters(view):
    names = {*view.kept(), *view.unit_parameters()}
    return {name: tensor.detach().clone() for name, tensor in view.model.state_dict().items() if name in names}


def finetuned(base, folder, seed, scale=0.02):
    """A copy of a model whose weights have moved a little, in bfloat16."""
    shutil.copytree(base, folder)
    path = folder / "model.safetensors"
    generator = torch.Generator().manual_seed(seed)
    moved = {n: t + scale * torch.randn(t.shape, generator=generator).to(t.dtype) for n, t in load_file(path).items()}
    save_file(moved, path, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def variants(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    return {name: finetuned(tiny_model, folder / name, seed) for seed, name in enumerate(("math", "code", "law"))}


@pytest.fixture(scope="module")
def folder(tiny_model, variants, tmp_path_factory):
    return merge(tiny_model, variants, tmp_path_factory.mktemp("merged") / "out")


class TestAlgebra:
    def test_the_sign_is_the_means_and_the_size_the_largest_that_agrees(self):
        vectors = torch.tensor([[1.0, -3.0, 2.0, 0.0], [2.0, 1.0, -2.0, 0.0]])
        assert elected(vectors).tolist() == [2.0, -3.0, 0.0, 0.0]

    def test_one_variant_is_itself(self):
        vector = torch.randn(50)
        assert torch.equal(elected(vector[None]), vector)
        assert agrees(vector, vector).all()

    @pytest.mark.parametrize("length", [1, 7, 8, 9, 100])
    def test_a_mask_takes_a_bit_per_weight(self, length):
        mask = torch.rand(length) < 0.5
        packed = packed_mask(mask)
        assert len(packed) == -(-length // 8)
        assert torch.equal(unpacked_mask(packed, mask.shape), mask)

    def test_the_files_give_what_the_paper_says(self, folder, tiny_model, variants):
        model, _ = moqa.load(folder)
        base = parameters(open_model(tiny_model))
        wanted = published(base, [parameters(open_model(path)) for path in variants.values()])
        for name, one in zip(variants, wanted, strict=True):
            state = model.mixture.use(name).state_dict()
            for key, weights in one.items():
                # the unified vector is stored in bfloat16
                assert torch.allclose(state[key], weights, atol=4e-4), key
        state = model.mixture.use("base").state_dict()
        assert all(torch.equal(state[key], weights) for key, weights in base.items())


class TestMerged:
    def test_its_bytes_are_accounted_for(self, folder, tiny_model):
        account = read_merged(folder).account
        weights = sum(t.numel() for t in parameters(open_model(tiny_model)).values())
        assert account.base == account.unified
        assert 3 * weights / 8 <= account.masks < 3 * (weights / 8 + 100)
        assert account.total == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        assert account.total < account.apart

    def test_a_variant_is_nearer_to_its_own_model_than_the_base_is(self, folder, tiny_model, variants):
        model, _ = moqa.load(folder)
        base = parameters(open_model(tiny_model))
        for name, path in variants.items():
            wanted, state = parameters(open_model(path)), model.mixture.use(name).state_dict()
            before, after = (sum(float((one[k] - wanted[k]).square().sum()) for k in wanted) for one in (base, state))
            assert after < before

    def test_each_is_measured_from_its_own_model(self, folder, moqa_command, tmp_path):
        asked = ("--data", f"wiki={TEXT}", "--context", 64, "--windows", 4, "--json", tmp_path / "found.json")
        code, stdout, _ = moqa_command("evaluate", folder, *asked)
        assert code == 0
        assert "KL of the base" in stdout
        found = json.loads((tmp_path / "found.json").read_text())
        assert [row["variant"] for row in found["rows"]] == ["code", "law", "math"]
        for row in found["rows"]:
            assert abs(row["own"]["kl_divergence"]) < 1e-6
            assert 0 < row["merged"]["kl_divergence"] < row["base"]["kl_divergence"]

    def test_a_variant_whose_own_model_is_another_now(self, tiny_model, variants, moqa_command, tmp_path):
        mine = {name: shutil.copytree(path, tmp_path / name) for name, path in variants.items() if name != "law"}
        folder = merge(tiny_model, mine, tmp_path / "merged")
        shutil.rmtree(mine["math"])
        finetuned(tiny_model, mine["math"], 9)
        said = refused(moqa_command, "evaluate", folder, "--data", f"wiki={TEXT}", "--context", 64, "--windows", 2)
        assert "is not the model that became variant math" in said

    @pytest.mark.parametrize("option", [("--against", "x"), ("--adjustment", "x"), ("--prompt", "8")])
    def test_an_option_of_other_models(self, folder, moqa_command, option):
        said = refused(moqa_command, "evaluate", folder, "--data", f"wiki={TEXT}", *option)
        assert f"holds merged variants, which take no {option[0]}: leave it out" in said

    def test_each_prompt_gets_the_variant_that_it_names(self, folder, moqa_command):
        texts = {}
        for name in ("base", "math", "law"):
            code, stdout, _ = moqa_command(
                "generate", folder, "The history", "--variant", name, "--max-tokens", 8, "--temperature", 0, "--json"
            )
            assert code == 0
            found = json.loads(stdout)
            assert found["variant"] == name
            texts[name] = found["text"]
        assert len(set(texts.values())) > 1

    def test_a_server_switches_between_requests(self, folder):
        loaded = load_any(folder)
        assert loaded[0].mixture.names == ["base", "code", "law", "math"]
        with running(loaded, adjusting=partial(RoutedVariants, loaded[0].mixture)) as address:
            asked = {"model": "tiny", "prompt": "The", "max_tokens": 4, "temperature": 0}
            answers = [
                httpx.post(f"{address}/v1/completions", json=asked | more, timeout=PATIENCE).json()
                for more in ({"variant": "math"}, {"variant": "law"}, {})
            ]
        assert [answer["variant"] for answer in answers] == ["math", "law", "base"]

    def test_verify_finds_a_changed_byte(self, folder, moqa_command, tmp_path):
        copy = shutil.copytree(folder, tmp_path / "copy")
        assert moqa_command("verify", copy)[0] == 0
        path = sorted(copy.glob("merged-*"))[1]
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        code, _, stderr = moqa_command("verify", copy)
        assert code == 2
        assert path.name in stderr
        with pytest.raises(MoqaError, match="was changed"):
            moqa.load(copy)

    def test_a_stopped_run_goes_on_to_the_same_bytes(self, folder, tiny_model, variants, tmp_path):
        def stop(step, done, total):
            if done == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            merge(tiny_model, variants, tmp_path / "out", report=stop)
        made = merge(tiny_model, variants, tmp_path / "out")
        assert read_merged(made).files == read_merged(folder).files


class TestRefused:
    def test_variants_of_different_bases(self, tiny_model, variants, tmp_path):
        other = finetuned(tiny_model, tmp_path / "other", 9, scale=3.0)
        with pytest.raises(MoqaError, match=r"variant other .* was not fine-tuned from .*cosine of their weights is"):
            merge(tiny_model, {**variants, "other": other}, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_another_shape(self, tiny_model, variants, tmp_path):
        other = make_tiny_model(tmp_path / "other", inner=48)
        with pytest.raises(MoqaError, match=r"variant other .* has model.layers.0.mlp.experts.0.down_proj"):
            merge(tiny_model, {**variants, "other": other}, tmp_path / "out")

    def test_a_single_variant_and_bad_names(self, tiny_model, variants, tmp_path, moqa_command):
        with pytest.raises(MoqaError, match="1 variant has nothing to be merged with"):
            merge(tiny_model, {"math": variants["math"]}, tmp_path / "out")
        with pytest.raises(MoqaError, match=r"--variant base=\.\.\. is no name"):
            merge(tiny_model, {"base": variants["math"], "code": variants["code"]}, tmp_path / "out")
        code, _, stderr = moqa_command("merge", tiny_model, "--variant", "math", "-o", tmp_path / "out")
        assert (code, stderr.count("\n")) == (2, 1)
        assert "is not a new NAME=MODEL" in stderr

    def test_a_record_that_names_files_elsewhere(self, folder, tmp_path):
        copy = shutil.copytree(folder, tmp_path / "copy")
        record = json.loads((copy / "merged.json").read_text())
        record["files"]["../other.safetensors"] = next(iter(record["files"].values()))
        (copy / "merged.json").write_text(json.dumps(record))
        with pytest.raises(MoqaError, match=r"merged\.json"):
            moqa.load(copy)
