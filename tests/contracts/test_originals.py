"""The original is what transformers loads, for every family and every layout in which its weights may lie on disk."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import FAMILIES, TEXTS, random_model, train_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moqa
from moqa.errors import MoqaError
from moqa.generation import load_any
from moqa.models.experts import IMPLEMENTATION, register_experts
from moqa.models.view import open_model
from moqa.originals.folder import INDEX, locate

WEIGHTS, HEAD, EMBEDDING = "model.safetensors", "lm_head.weight", "model.embed_tokens.weight"
# their adapters compute the experts' sums in another order
REORDERED = ("llama4_text", "jetmoe", "deepseek_v4")


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(2, 512, (2, 24), generator=torch.Generator().manual_seed(1))


def edit(folder, change):
    """Change the tensors of a folder's only file of weights."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def configure(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def shard(folder):
    """Store the weights in two files with an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    index = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(index.values()):
        part = {name: tensors[name] for name in index if index[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def set_ends(folder, kind):
    """Store the embedding and the head of a model whose configuration ties them in one of four ways."""

    def change(tensors):
        head, embedding = (tensors.pop(name, None) for name in (HEAD, EMBEDDING))
        embedding = head if embedding is None else embedding
        head = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(5)).to(embedding.dtype) * 0.15
        if kind != "head only":
            tensors[EMBEDDING] = embedding
        if kind != "embedding only":
            tensors[HEAD] = head if kind == "both, different" else embedding.clone()

    edit(folder, change)


def make(family, folder, kind, dtype=torch.bfloat16, fused=False):
    """A family's tiny model whose configuration ties the head."""
    model = random_model(family, tie_word_embeddings=True)
    model.to(dtype).save_pretrained(folder, save_original_format=not fused)
    set_ends(folder, kind)
    return folder


def check_same(folder, tokens, keep=True, exact=True):
    """The view of a folder has the values of transformers, bit for bit, and computes the same."""
    register_experts()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation=IMPLEMENTATION)
    ours = open_model(folder, keep=keep).model
    with torch.no_grad():
        expected, found = theirs(tokens).logits, ours(tokens).logits
    assert expected.isfinite().all()
    assert expected.std() > 0.01
    if exact:
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if keep:
        values, wanted = ours.state_dict(), theirs.state_dict()
        assert values.keys() == wanted.keys()
        assert [name for name in wanted if not torch.equal(values[name], wanted[name])] == []
    return theirs


@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamily:
    def test_in_shards_of_several_dtypes_with_a_head_of_its_own(self, family, tmp_path, tokens):
        folder = make(family, tmp_path / "model", "both, different", torch.float32)

        def mix(tensors):
            for number, name in enumerate(sorted(tensors)):
                if tensors[name].is_floating_point():
                    tensors[name] = tensors[name].to((torch.float32, torch.bfloat16, torch.float16)[number % 3])

        edit(folder, mix)
        shard(folder)
        theirs = check_same(folder, tokens, exact=family not in REORDERED)
        assert not torch.equal(theirs.get_output_embeddings().weight, theirs.get_input_embeddings().weight)

    def test_fused_in_16_bits_tied_the_other_way(self, family, tmp_path, tokens):
        folder = make(family, tmp_path / "model", "head only", torch.float16, fused=True)
        theirs = check_same(folder, tokens, exact=family not in REORDERED)
        assert theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight

    def test_in_bfloat16_keeps_in_float32_what_transformers_keeps(self, family, tmp_path):
        random_model(family).to(torch.bfloat16).save_pretrained(tmp_path)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
        ours = open_model(tmp_path, torch.bfloat16).model.state_dict()
        assert {name: t.dtype for name, t in ours.items()} == {name: t.dtype for name, t in theirs.items()}
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("kind", ["both, different", "both, equal", "head only", "embedding only"])
class TestTiedEnds:
    @pytest.fixture
    def folder(self, kind, tmp_path):
        make("qwen3_moe", tmp_path / "model", kind)
        train_tokenizer([TEXTS / "wiki.calib.txt"]).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    @pytest.mark.parametrize("keep", [True, False])
    def test_are_read_as_transformers_does(self, folder, kind, keep, tokens):
        check_same(folder, tokens, keep)
        view = open_model(folder, keep=keep)
        size = 512 * 64 * 4
        assert view.ends_bytes() == (2 * size if kind == "both, different" else size)
        assert view.kept_entries() == {name: (t.dtype, tuple(t.shape)) for name, t in view.kept_on_disk().items()}
        ends = {name for name in view.kept() if name in (HEAD, EMBEDDING)}
        assert ends == ({HEAD, EMBEDDING} if kind == "both, different" else {EMBEDDING})

    def test_from_profile_to_evaluation(self, folder, kind, tmp_path, tokens):
        data = {"w": [(TEXTS / "wiki.calib.txt").read_text()[:20_000]]}
        profile = moqa.profile(folder, data, tmp_path / "p", samples=4, context=32, self_samples=0)
        out = moqa.quantize(folder, moqa.plan(profile, strategy="uniform", widths=(8,)), tmp_path / "out")
        original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        loaded = moqa.load(out)[0], AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        with torch.no_grad():
            true = original(tokens).logits.log_softmax(-1)
            for model in loaded:
                divergence = (true.exp() * (true - model(tokens).logits.log_softmax(-1))).sum(-1)
                assert float(divergence.median()) < 0.001
            # an original generates with the same values
            assert torch.equal(load_any(folder)[0](tokens).logits, open_model(folder).model(tokens).logits)
        held_out = {"w": [(TEXTS / "wiki.test.txt").read_text()[:20_000]]}
        result = moqa.evaluate(out, held_out, against=folder, context=32, windows=2)
        assert 0 < result.distributions["w"].kl_divergence < 0.01


class TestWhatTransformersReadsBesidesOrInstead:
    @pytest.fixture
    def folder(self, tiny_model, tmp_path):
        return Path(shutil.copytree(tiny_model, tmp_path / "model"))

    def refusal(self, folder):
        messages = set()
        for opening in (locate, open_model, load_any):
            with pytest.raises(MoqaError) as caught:
                opening(folder)
            messages.add(str(caught.value))
        assert len(messages) == 1
        return messages.pop()

    @pytest.mark.parametrize("alone", [False, True])
    def test_an_adapter(self, folder, alone):
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/name"}')
        if alone:
            (folder / "config.json").unlink()
        assert self.refusal(folder) == (
            f"{folder} holds an adapter (adapter_config.json), which transformers applies to the weights: merge it "
            "into them with PEFT's merge_and_unload, or remove the file to use the weights without it"
        )

    def test_parts_of_a_distributed_run(self, folder):
        shutil.copyfile(folder / WEIGHTS, folder / "shard-00001-model-00001-of-00001.safetensors")
        assert "holds shard-00001-model-00001-of-00001.safetensors, a part of a distributed run" in self.refusal(folder)

    def test_weights_of_another_name(self, folder):
        shutil.copyfile(folder / WEIGHTS, folder / "other.safetensors")
        configure(folder, transformers_weights="other.safetensors")
        with pytest.raises(MoqaError, match=r"names its weights other\.safetensors \(transformers_w"):
            open_model(folder)

    def test_one_parameter_under_two_names(self, folder):
        edit(folder, lambda tensors: tensors.update({"norm.weight": tensors["model.norm.weight"] + 1}))
        with pytest.raises(MoqaError, match=r"model\.norm\.weight twice: as model\.norm\.weight and as n"):
            open_model(folder)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", None])
    @pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
    def test_the_dtype_that_a_configuration_names_changes_no_value(self, folder, key, dtype, tokens):
        values = json.loads((folder / "config.json").read_text())
        values.pop("dtype")
        (folder / "config.json").write_text(json.dumps({**values, key: dtype}))
        check_same(folder, tokens)
