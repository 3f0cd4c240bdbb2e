"""What must hold for a tiny random model of every family: all of it is seen, run, quantized and found on disk."""

import functools
import types
from pathlib import Path

import pytest
import torch
from families import EXPERTS, FAMILIES, TEXTS, VOCABULARY, random_model, save, train_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

from moqa.data import Distribution
from moqa.errors import MoqaError
from moqa.format.reader import open_checkpoint
from moqa.format.scheme import Scheme
from moqa.kernels import PackedMatrix
from moqa.models.layerwise import LayerwiseModel
from moqa.models.view import ModelView, open_model
from moqa.originals import folder as original
from moqa.planning import Budget, plan
from moqa.profiling import profile
from moqa.quantization import quantize
from moqa.runtime.decoder import FAMILIES as FUSED
from moqa.runtime.decoder import FusedDecoder
from moqa.runtime.load import load

# Nats per token: more than 8 bits do, routing changed by them included, and less than one wrong unit does.
CLOSE = 0.01
KEPT = (
    "norm", "embed", "lm_head", "router", "gate.weight", "gate.wg", "shared_expert_gate", "bias", "sinks", "conv.conv",
    "conv1d", "A_log", "dt_bias", "mamba.D", "mamba.dt_proj", "in_proj_a", "in_proj_b",
    "_hc.", "hc_head", "tid2eid", "indexer", "layer_scalar",
)  # fmt: skip


def median_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Error of the logits relative to their spread, of the token in the middle."""
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    return float(((found - expected).norm(dim=-1) / spread).median())


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    """Folder of a family's tiny model, made when first asked for."""
    tokenizer = train_tokenizer(sorted(TEXTS.glob("*.calib.txt")))
    root = tmp_path_factory.mktemp("families")

    @functools.cache
    def folder(name: str) -> Path:
        return save(random_model(name), tokenizer, root / name)

    return folder


@pytest.fixture(scope="session")
def quantized(zoo, tmp_path_factory):
    """A family's plan at 8 bits, its profile, and one checkpoint per method."""
    text = (TEXTS / "wiki.calib.txt").read_text(encoding="utf-8")[:4000]
    root = tmp_path_factory.mktemp("quantized")

    @functools.cache
    def make(name: str):
        view, out = open_model(zoo(name)), root / name
        wiki = Distribution("wiki", (text,), "wiki.calib.txt")
        measured = profile(zoo(name), [wiki], out / "profile", samples=16, context=32, self_samples=1, view=view)
        stored = sum(Scheme(width=8).stored_bytes(unit.shape) for unit in view.units.values())
        weights = sum(unit.weights for unit in view.units.values())
        budget = Budget.parse(bpw=stored * 8.001 / weights)
        chosen = plan(measured, budget, strategy="uniform", widths=(8,))
        for method in ("rtn", "gptq"):
            quantize(zoo(name), chosen, out / method, method=method, profile=measured, view=view)
        return types.SimpleNamespace(view=view, profile=measured, plan=chosen, rtn=out / "rtn", gptq=out / "gptq")

    return make


@pytest.fixture(scope="session")
def tokens():
    return torch.randint(2, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def divergence(model: nn.Module, other: nn.Module, tokens: torch.Tensor) -> float:
    """Mean KL divergence of another model's predictions, in nats per token."""
    true, found = (m(tokens).logits.log_softmax(-1) for m in (model, other))
    return float((true.exp() * (true - found)).sum(-1).mean())


@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamily:
    def test_has_the_roles_that_it_should_have(self, family, zoo):
        view, expected = open_model(zoo(family)), FAMILIES[family]
        assert {unit.role for unit in view.units.values()} == expected.roles
        experts = [unit for unit in view.units.values() if unit.role == "expert"]
        assert len(experts) == expected.moe_layers * EXPERTS * 3
        assert view.top_k == (2 if expected.moe_layers else 0)
        assert len(view.blocks) == expected.layers

    def test_keeps_routers_norms_and_embeddings(self, family, zoo):
        view = open_model(zoo(family))
        assert [name for name in view.units if any(word in f"{name}.weight" for word in KEPT)] == []
        assert [name for name in view.kept() if not any(word in name for word in KEPT)] == []

    def test_accounts_for_every_stored_value_once(self, family, zoo):
        view = open_model(zoo(family))
        view.check_complete()
        stored = sum(tensor.numel() for _, tensor in original.tensors(zoo(family)))
        kept = sum(tensor.numel() for tensor in view.kept().values())
        assert stored == kept + sum(unit.weights for unit in view.units.values())

    def test_runs_experts_as_transformers_does(self, family, zoo, tokens):
        ours = open_model(zoo(family)).model
        theirs = AutoModelForCausalLM.from_pretrained(
            zoo(family), dtype=torch.float32, experts_implementation="eager"
        ).eval()
        with torch.no_grad():
            torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)

    def test_goes_through_stages_as_through_its_forward(self, family, zoo, tokens):
        model = open_model(zoo(family)).model
        stages = LayerwiseModel(model)
        with torch.no_grad():
            hidden = stages.embed(tokens)
            stages.embed(tokens.flip(0, 1))  # another batch must change nothing
            assert hidden.dim() == 3
            for index in range(stages.depth):
                hidden = stages.run_block(index, hidden)
            assert torch.equal(stages.head(hidden), model(tokens).logits)

    def test_computes_the_same_layer_by_layer_from_disk(self, family, zoo, tokens):
        whole, streamed = open_model(zoo(family)), open_model(zoo(family), keep=False)
        with torch.no_grad():
            assert torch.equal(streamed.model(tokens).logits, whole.model(tokens).logits)
        assert all(torch.equal(streamed.weight(u).float(), whole.weight(u)) for u in whole.units.values())

    def test_every_unit_is_watched_by_the_profile(self, family, quantized):
        made = quantized(family)
        reached = {
            (layer, expert)
            for layer in range(len(made.view.blocks))
            if made.view.experts_path(layer)
            for expert in made.profile.statistics["wiki"][f"layer.{layer}.tokens"].nonzero()[:, 0].tolist()
        }
        sensitivity = dict(zip(made.view.units.values(), made.profile.sensitivity("wiki"), strict=True))
        for unit, row in sensitivity.items():
            assert (unit.role == "expert" and (unit.layer, unit.expert) not in reached) or bool((row > 0).all()), unit

    @pytest.mark.parametrize("method", ["rtn", "gptq"])
    def test_is_close_to_the_original_at_8_bits(self, family, method, quantized, tokens):
        made = quantized(family)
        folder = getattr(made, method)
        model, _ = load(folder, kernels="reference")
        assert divergence(made.view.model, model, tokens) < CLOSE
        stored = open_checkpoint(folder)
        assert (
            stored.bytes == made.plan.account.checkpoint == sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        )
        assert {scheme.width for scheme in made.plan.units.values()} == {8}

    def test_packed_weights_compute_what_they_stand_for(self, family, quantized, zoo, tokens):
        made = quantized(family)
        model, _ = load(made.gptq, kernels="reference")
        dense, stored = open_model(zoo(family)), open_checkpoint(made.gptq)
        for layer in range(len(dense.blocks)):
            tensors = stored.layer(layer)
            for unit in dense.block_units(layer):
                scheme = made.plan.units[unit.name]
                parts = {suffix: tensors[f"{unit.name}.{suffix}"] for suffix in scheme.tensors(unit.shape)}
                matrix, original = PackedMatrix(scheme, unit.shape, parts).dense(), dense.weight(unit)
                assert (matrix - original).norm() < 0.02 * original.norm(), unit.name
                dense.set_weight(unit, matrix)
        with torch.no_grad():
            torch.testing.assert_close(model(tokens).logits, dense.model(tokens).logits, rtol=1e-5, atol=1e-5)
            assert torch.equal(model(tokens).logits, load(made.gptq, kernels="reference")[0](tokens).logits)

    def test_native_kernels_compute_the_same(self, family, quantized, tokens):
        slow, fast = (load(quantized(family).rtn, kernels=kernels)[0] for kernels in ("reference", "native"))
        # a router whose experts are nearly even turns any rounding into another choice: the median tells
        assert median_error(fast(tokens).logits, slow(tokens).logits) < 0.06

    def test_from_pretrained_gives_the_same_model(self, family, quantized, tokens):
        folder = quantized(family).rtn
        ours, theirs = load(folder)[0], AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)

    def test_in_bfloat16_it_keeps_in_float32_what_transformers_keeps(self, family, quantized, tokens):
        folder = quantized(family).rtn
        ours, theirs = (
            load(folder, dtype=torch.bfloat16)[0], AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16),
        )  # fmt: skip
        found, expected = ours.state_dict(), theirs.state_dict()
        assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in expected.items()}
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
        with torch.no_grad():
            assert ours(tokens).logits.isfinite().all()

    def test_the_fused_decoder_computes_the_same_or_is_not_used(self, family, quantized, tokens):
        model, _ = load(quantized(family).rtn)
        decoder = FusedDecoder.of(model)
        assert (decoder is not None) == (model.config.model_type in FUSED)
        if decoder is not None:
            cache, ids = decoder.cache(), tokens[:1, :300]
            with torch.no_grad():
                model(ids[:, :5], past_key_values=cache, use_cache=True)
                found = torch.stack([decoder.step(int(token), cache) for token in ids[0, 5:]])
                assert median_error(found, model(ids).logits[0, 5:]) < 0.01
            assert cache.get_seq_length() == ids.shape[1]

    def test_generates(self, family, quantized, tokens):
        model, tokenizer = load(quantized(family).rtn)
        written = model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=4, min_new_tokens=4)
        assert written.shape[1] == len(tokenizer("The")["input_ids"]) + 4

    def test_a_wrong_unit_would_not_pass_for_close(self, family, quantized, zoo, tokens):
        made, wrong = quantized(family), open_model(zoo(family))
        harm = dict(zip(made.view.units, made.profile.sensitivity("wiki")[:, 0].tolist(), strict=True))
        for role in FAMILIES[family].roles:
            unit = max((u for u in wrong.units.values() if u.role == role), key=lambda unit: harm[unit.name])
            wrong.set_weight(unit, made.view.weight(unit).flip(1))
            assert divergence(made.view.model, wrong.model, tokens) > CLOSE, unit.name
            wrong.set_weight(unit, made.view.weight(unit))


class TestRefusals:
    """A family that is understood in part must not be quantized in part."""

    @pytest.mark.parametrize(
        ("family", "changes", "named"),
        [
            (
                "nemotron_h",
                {"n_routed_experts": 4, "moe_intermediate_size": 32, "hybrid_override_pattern": "E*", "head_dim": 16},
                "NemotronHExperts",
            ),
        ],
    )
    def test_experts_outside_the_interface(self, family, changes, named):
        with pytest.raises(MoqaError, match=rf"{named}, \[4, .*that moqa cannot quantize: .*looked at {named}"):
            ModelView(random_model(family, **changes))

    def test_layers_that_pass_on_more_than_hidden_states(self):
        model = random_model("glm_moe_dsa", **FAMILIES["deepseek_v32"].config)
        with pytest.raises(MoqaError, match=r"GlmMoeDsaForCausalLM .* one block at a time: .* more than hidden states"):
            LayerwiseModel(model)

    @pytest.mark.parametrize(
        "changes", [{"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY},
                    {"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 2}],
        ids=["inputs of their own", "caches of others"],
    )  # fmt: skip
    def test_layers_that_read_more_than_hidden_states(self, changes):
        model = random_model("gemma4_text", **changes)
        with pytest.raises(
            MoqaError, match=r"Gemma4ForCausalLM .* one block at a time: its blocks read more of a text"
        ):
            LayerwiseModel(model)

    def test_a_number_of_experts_under_an_unknown_name(self):
        model = random_model("qwen3_moe")
        model.config.num_experts_per_tok = 0  # as if its name were not known
        with pytest.raises(
            MoqaError, match=r"qwen3_moe does not say how many experts a token .* num_experts_per_tok, "
        ):
            ModelView(model)

    def test_experts_in_embeddings(self):
        changes = {"is_moe": True, "num_experts": 64, "intermediate_size": 96}
        with pytest.raises(MoqaError, match=r"_embed.weight \(Embedding, \[64, 64\]\)"):
            ModelView(random_model("doge", **changes))

    def test_experts_without_a_gate(self):
        model = random_model("qwen3_moe")
        model.model.layers[1].mlp.experts.has_gate = False
        with pytest.raises(
            MoqaError, match=r"model.layers.1.mlp.experts \(Qwen3MoeExperts\) has experts without a gate"
        ):
            ModelView(model)

    def test_experts_with_a_parameter_of_unknown_use(self):
        model = random_model("qwen3_moe")
        model.model.layers[0].mlp.experts.per_expert_scale = nn.Parameter(torch.ones(4))
        with pytest.raises(MoqaError, match=r"model.layers.0.mlp.experts .* has experts with per_expert_scale"):
            ModelView(model)

    def test_a_linear_layer_that_computes_something_else(self):
        class Doubling(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        model = random_model("llama")
        model.model.layers[1].mlp.up_proj = Doubling(64, 96, bias=False)
        with pytest.raises(MoqaError, match=r"model.layers.1.mlp.up_proj.weight \(Doubling, \[96, 64\]\)"):
            ModelView(model)

    def test_a_matrix_outside_any_linear_layer(self):
        model = random_model("llama")
        model.model.layers[0].mixing = nn.Parameter(torch.ones(64, 64))
        with pytest.raises(MoqaError, match=r"model.layers.0.mixing \(LlamaDecoderLayer, \[64, 64\]\)"):
            ModelView(model)

    def test_one_parameter_in_two_places(self):
        model = random_model("llama")
        layers = model.model.layers
        layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
        with pytest.raises(MoqaError, match=r"layers.1.mlp.up_proj.weight and model.layers.0.* are one parameter"):
            ModelView(model).check_complete()


class TestManyExperts:
    """With as many experts as a unit's smallest side, a router is as large as a unit: it is still kept."""

    @pytest.mark.parametrize("family", ["qwen3_moe", "hunyuan_v1_moe", "gpt_oss"])
    def test_router_is_kept(self, family):
        size = {"num_local_experts": 32} if family == "gpt_oss" else {"num_experts": 32}
        more = {"moe_topk": 2, "intermediate_size": 32, "head_dim": 16} if family == "hunyuan_v1_moe" else {}
        view = ModelView(random_model(family, **size, **more))
        view.check_complete()
        assert sum(unit.role == "expert" for unit in view.units.values()) == 2 * 32 * 3
        assert [name for name in view.units if "gate.wg" in name or "router" in name] == []

    def test_a_linear_layer_of_the_same_function_is_a_unit(self):
        class Renamed(nn.Linear):
            """The same function under another name."""

        model = random_model("llama")
        model.model.layers[1].mlp.up_proj = Renamed(64, 96, bias=False)
        assert "model.layers.1.mlp.up_proj" in ModelView(model).units
