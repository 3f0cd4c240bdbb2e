"""LoRA on packed layers and experts: trained with PEFT, saved, loaded and served."""

import json
import re
import subprocess
import sys

import httpx
import pytest
import torch
from long_work import contents
from safetensors.torch import load_file, save_file
from serving import GREEDY, alone, complete, running
from transformers import AutoModelForCausalLM

import moqa
from moqa.errors import MoqaError
from moqa.generation.load import load_any
from moqa.integrations.lora import CONFIG, WEIGHTS, add_lora
from moqa.kernels import find_kernels
from moqa.models.experts import expert_matrix, projection_rows
from moqa.runtime.decoder import FusedDecoder
from moqa.runtime.packed import PackedExperts, PackedLinear

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'moqa[peft]'")
ATTENTION, EXPERTS = ["q_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
IDS = torch.randint(0, 8192, (2, 24), generator=torch.Generator().manual_seed(1))
PLACE = re.compile(r"(.*\.experts)\.moqa_weights\.experts\.(\d+)\.(\w+)")


def adapted(out, targets="all-linear", **options):
    """A model with a LoRA that is not zero, as PEFT wraps it."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(moqa.load(out, **options)[0], config)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def packed(made):
    return made[0]


@pytest.fixture(scope="module")
def saved(packed, tmp_path_factory):
    """Folder of a LoRA on every matrix, and the logits with it."""
    folder, model = tmp_path_factory.mktemp("lora") / "lora", adapted(packed).eval()
    model.save_pretrained(folder)
    return folder, logits(model)


@pytest.fixture
def spoiled(saved, tmp_path):
    """A copy of the folder with a changed configuration or tensors."""

    def spoil(tensors=None, **config):
        given = json.loads((saved[0] / CONFIG).read_text())
        (tmp_path / CONFIG).write_text(json.dumps({**given, **config}))
        save_file((tensors or dict)(load_file(saved[0] / WEIGHTS)), tmp_path / WEIGHTS)
        return tmp_path

    return spoil


class TestTraining:
    @pytest.mark.parametrize(
        ("targets", "kinds"),
        [
            (ATTENTION, set(ATTENTION)), (EXPERTS, set(EXPERTS)), (["experts.0.gate_proj"], {"gate_proj"}),
            (r".*\.experts\.[01]\.down_proj", {"down_proj"}),
            ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", *EXPERTS}),
        ],
    )  # fmt: skip
    def test_targets_are_found_by_their_names(self, packed, targets, kinds):
        found = [name for name, module in adapted(packed, targets).named_modules() if hasattr(module, "lora_A")]
        assert {name.rpartition(".")[2] for name in found} == kinds

    def test_gradients_are_those_of_the_unpacked_model(self, packed, tiny_model):
        """With W + s B A in the place of W: dB is s dW A^T, and dA is s B^T dW."""
        model = adapted(packed, kernels="reference")
        plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")}
        parts = {}
        for name, layer in layers.items():
            a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
            with torch.no_grad():
                merged = layer.base_layer.weight + layer.scaling["default"] * b @ a
            place = PLACE.fullmatch(name)
            if place:
                module = plain.get_submodule(place[1])
                expert_matrix(module, int(place[2]), place[3]).copy_(merged)
            else:
                module = plain.get_submodule(name)
                module.weight.data.copy_(merged)
            parts[name] = place, module, a, b, layer.scaling["default"]
        for one in (model, plain):
            one(IDS, labels=IDS).loss.backward()
        assert len(parts) == 2 * (4 + 3 * 6)
        for place, module, a, b, scaling in parts.values():
            if place is None:
                gradient = module.weight.grad
            else:
                stacked = module.down_proj.grad if place[3] == "down_proj" else module.gate_up_proj.grad
                gradient = stacked[int(place[2])].T if module.is_transposed else stacked[int(place[2])]
                if place[3] != "down_proj":
                    gradient = gradient[projection_rows(module)[place[3]]]
            for mine, wanted in ((b.grad, scaling * gradient @ a.T), (a.grad, scaling * b.T @ gradient)):
                mine = torch.zeros_like(wanted) if mine is None else mine  # an expert without tokens
                assert torch.allclose(mine, wanted, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))

    def test_a_bias_can_be_trained(self):
        weight, x = torch.randn(16, 32).bfloat16(), torch.randn(2, 3, 32, requires_grad=True)
        layer, plain = PackedLinear.of_kept(weight, torch.zeros(16), find_kernels("reference")), torch.nn.Linear(32, 16)
        plain.weight.data, plain.bias.data = weight.float(), torch.zeros(16)
        layer.bias.requires_grad_()
        found = []
        for one in (layer, plain):
            loss = (one(x) ** 2).sum()
            found.append(torch.autograd.grad(loss, [x, one.bias]))
        for mine, wanted in zip(*found, strict=True):
            assert torch.allclose(mine, wanted, rtol=1e-4, atol=1e-4)
        (only,) = torch.autograd.grad(layer(x.detach()).sum(), [layer.bias])
        assert torch.equal(only, torch.full((16,), 6.0))

    def test_a_program_may_end_with_its_last_loss(self, packed):
        """A graph that holds native objects keeps them past the end of the module that made them, which complains."""
        script = (
            "import sys, torch, moqa, peft\n"
            "model = peft.get_peft_model(moqa.load(sys.argv[1])[0], peft.LoraConfig(target_modules=['q_proj']))\n"
            "ids = torch.ones(1, 4, dtype=torch.long)\n"
            "loss = model(ids, labels=ids).loss\n"
            "loss.backward()\n"
        )
        done = subprocess.run([sys.executable, "-c", script, str(packed)], capture_output=True, text=True, check=True)
        assert "leaked" not in done.stderr

    @pytest.mark.parametrize("targets", [ATTENTION, EXPERTS])
    def test_a_few_steps_lower_the_loss_and_change_nothing_else(self, packed, targets):
        before = contents(packed)
        model = adapted(packed, targets)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert all(".lora_" in name for name in trained)
        matrices = {n: b.clone() for n, b in model.named_buffers()}
        optimizer, losses = torch.optim.AdamW(trained.values(), lr=0.01), []
        for _ in range(4):
            loss = model(IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses == sorted(losses, reverse=True)
        assert all(p.grad is None for n, p in model.named_parameters() if n not in trained)
        assert all(torch.equal(b, matrices[n]) for n, b in model.named_buffers())
        assert contents(packed) == before

    def test_nothing_can_be_merged(self, packed):
        model = adapted(packed, EXPERTS).eval()
        before = logits(model)
        layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
        for merge in (model.merge_and_unload, model.merge_adapter, layer.merge, lambda: layer.merge(safe_merge=True)):
            with pytest.raises(MoqaError, match="a LoRA cannot be merged into packed weights: save it"):
                merge()
        assert torch.equal(logits(model), before)

    def test_unloaded_and_disabled_it_is_the_checkpoint(self, packed):
        plain = moqa.load(packed)[0]
        model = adapted(packed)
        assert not torch.equal(logits(model), logits(plain))
        with model.disable_adapter():
            assert torch.allclose(logits(model), logits(plain), rtol=1e-3, atol=1e-3)
        assert torch.equal(logits(model.unload()), logits(plain))

    def test_models_without_one_compute_as_before(self, packed):
        plain, model = moqa.load(packed)[0], adapted(packed, ATTENTION)
        for one, whole in ((plain, True), (model, True), (adapted(packed, EXPERTS), False)):
            module = next(m for m in one.modules() if hasattr(m, "moqa_weights"))
            tokens = torch.randn(3, 72), torch.tensor([[0, 1]] * 3), torch.full((3, 2), 0.5)
            with torch.no_grad():
                assert (module.moqa_weights.run(module, *tokens) is not None) == whole
        assert FusedDecoder.of(plain) is not None
        assert FusedDecoder.of(model.get_base_model()) is FusedDecoder.of(model) is None
        assert FusedDecoder.of(model.unload()) is not None
        # the matrices of experts are those of the layers that PEFT sees, stored once
        packs = [m for m in plain.modules() if isinstance(m, PackedExperts)]
        assert all(type(layer) is PackedLinear for pack in packs for e in pack.experts for layer in e.values())


class TestSaved:
    def test_loaded_by_peft_it_is_the_same(self, packed, saved):
        assert torch.equal(logits(peft.PeftModel.from_pretrained(moqa.load(packed)[0], saved[0])), saved[1])

    def test_loaded_by_transformers_and_peft_it_is_the_same(self, packed, saved):
        base = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
        assert torch.equal(logits(peft.PeftModel.from_pretrained(base, saved[0])), saved[1])

    @pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "lora_alpha": 3}])
    def test_loaded_by_moqa_it_is_the_same(self, packed, tmp_path, options):
        config = peft.LoraConfig(r=4, target_modules=[*ATTENTION, *EXPERTS], init_lora_weights=False, **options)
        model = peft.get_peft_model(moqa.load(packed)[0], config).eval()
        model.save_pretrained(tmp_path)
        other = moqa.load(packed)[0]
        add_lora(other, tmp_path)
        assert torch.equal(logits(other), logits(model))

    def test_experts_may_be_named_as_in_the_files_of_the_original(self, packed, saved, spoiled):
        model = moqa.load(packed)[0]
        folder = spoiled(lambda t: {n.replace(".moqa_weights.experts", ""): v for n, v in t.items()})
        assert any(name.endswith("mlp.experts.3.up_proj.lora_A.weight") for name in load_file(folder / WEIGHTS))
        add_lora(model, folder)
        assert torch.equal(logits(model), saved[1])

    def test_commands_and_the_server_compute_with_it(self, packed, saved, texts, moqa_command, tmp_path):
        written, _ = alone(load_any(packed, lora=saved[0]), "The", **GREEDY)
        assert written != alone(load_any(packed), "The", **GREEDY)[0]
        typed = ("The", "--max-tokens", "12", "--temperature", "0", "--lora", saved[0])
        code, shown, _ = moqa_command("generate", packed, *typed, "--json")
        assert (code, json.loads(shown)["text"]) == (0, written)
        with running(load_any(packed, lora=saved[0])) as url, httpx.Client(base_url=url) as http:
            assert complete(http, prompt="The", **GREEDY).json()["choices"][0]["text"] == written
        text = tmp_path / "novels.txt"
        text.write_text(texts["novels"].texts[0])
        found = [
            moqa.evaluate(packed, {"novels": str(text)}, windows=2, context=32, lora=lora) for lora in (None, saved[0])
        ]
        assert [one.lora for one in found] == [None, str(saved[0])]
        assert len({one.distributions["novels"].perplexity for one in found}) == 2

    def test_a_lora_on_experts_and_an_adjustment_exclude_each_other(self, packed, made, saved):
        model = load_any(packed, lora=saved[0])[0]
        with pytest.raises(MoqaError, match="an adjustment cannot be used together with a LoRA on experts"):
            model.apply(made[1][0])
        model = moqa.load(packed)[0]
        model.apply(made[1][0])
        add_lora(model, saved[0])
        with pytest.raises(MoqaError, match="an adjustment cannot be used together with a LoRA on experts"):
            logits(model)
        model.revert()
        assert torch.equal(logits(model), saved[1])


class TestRefused:
    @pytest.mark.parametrize("command", ["generate", "chat", "serve", "evaluate"])
    def test_by_every_command_in_one_line(self, packed, tiny_model, texts, moqa_command, tmp_path, command):
        (tmp_path / "text.txt").write_text(texts["novels"].texts[0])
        more = {"generate": ["The"], "evaluate": ["--data", f"a={tmp_path}/text.txt"]}.get(command, [])
        for model, words in ((packed, "is not the folder of a LoRA: adapter_config.json is missing"),
                             (tiny_model, "is not a checkpoint: a LoRA such as")):  # fmt: skip
            code, _, shown = moqa_command(command, model, *more, "--lora", tmp_path)
            assert code == 2
            assert words in shown
        code, _, shown = moqa_command("serve", packed, "--lora", tmp_path, "--adjust", "auto")
        assert (code, "--adjust auto cannot be combined" in shown) == (2, True)

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            ({"peft_type": "IA3"}, "peft_type in adapter_config.json is not LORA"),
            ({"r": 10**9}, "'r': 1000000000"),
            ({"r": 2}, "cannot be used"),
            ({"rank_pattern": {"(a+)+": 2}}, "'rank_pattern'"),
            ({"lora_alpha": float("nan")}, "has lora_alpha NaN"),
            ({"lora_alpha": 0}, "'lora_alpha': 0"),
            ({"init_lora_weights": "pissa"}, "'init_lora_weights': 'pissa'"),
            ({"target_parameters": ["gate_up_proj"]}, "'target_parameters'"),
            ({"layer_replication": [[0, 2], [1, 2]]}, "'layer_replication'"),
            ({"invented": 3}, "'invented': 3"),
        ],
    )
    def test_what_moqa_does_not_know(self, packed, spoiled, config, words):
        with pytest.raises(MoqaError) as refused:
            add_lora(moqa.load(packed)[0], spoiled(**config))
        assert words in str(refused.value)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda t: {n.replace("layers.1", "layers.7"): v for n, v in t.items()}, "the model has no such matrix"),
            (lambda t: {n: v[:, 1:].contiguous() for n, v in t.items()}, "the matrix is (72, 40)"),
            (lambda t: {n: v for n, v in t.items() if "lora_A" in n}, "(0,): the matrix is"),
            (lambda t: {n: v.to(torch.int8) for n, v in t.items()}, "the matrix is"),
            (lambda t: {**t, "base_model.model.lm_head.weight": torch.zeros(2)}, "has base_model.model.lm_head.weight"),
            (lambda t: {}, "is empty"),
        ],
    )  # fmt: skip
    def test_tensors_that_do_not_fit(self, packed, spoiled, change, words):
        with pytest.raises(MoqaError) as refused:
            add_lora(moqa.load(packed)[0], spoiled(change))
        assert words in str(refused.value)

    def test_a_damaged_file(self, packed, spoiled):
        folder = spoiled()
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
        with pytest.raises(MoqaError, match="is not the folder of a LoRA"):
            add_lora(moqa.load(packed)[0], folder)
