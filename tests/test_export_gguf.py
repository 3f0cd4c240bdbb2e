"""Files for llama.cpp: planned bytes are bytes on disk, they hold what the plan says, and llama.cpp reads them."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from gguf_models import MODELS, LlamaCpp, make_model
from long_work import refusal
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

import moqa
from moqa.errors import MoqaError, Stopped
from moqa.exports.registry import FORMATS
from moqa.format.encodings import GGML_TYPES
from moqa.format.scheme import Scheme
from moqa.gguf.families import FAMILIES, find_family
from moqa.methods.ggml import encode, rounded_as
from moqa.models.view import open_model
from moqa.planning import for_file, plan
from moqa.profiling import profile
from moqa.storage.artifact import write_sealed

# fast encoders that a plan of a small model can choose from; the others first make tables for seconds
FAST = ("q3_k", "q4_k", "q6_k", "q8_0", "iq4_nl")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("export") / "model")


@pytest.fixture(scope="module")
def measured(model, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "profile"
    return profile(model, [texts["wiki"]], folder, samples=4, context=32, self_samples=1)


@pytest.fixture(scope="module")
def planned(measured):
    return plan(measured, "5bpw", engine="llama.cpp", encodings=FAST)


def saved(made, folder: Path) -> Path:
    path = folder / "plan.json"
    write_sealed(for_file(made, path), path)
    return path


@pytest.fixture(scope="module")
def written(planned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    out = folder / "model.gguf"
    moqa.export(saved(planned, folder), out, to="gguf")
    return out


def tensors(path: Path) -> dict:
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def weights(tensor) -> torch.Tensor:
    return torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type))).float()


class TestPlan:
    def test_experts_of_a_layer_share_a_type_for_each_projection(self, planned):
        found: dict[str, set] = {}
        for name, scheme in planned.units.items():
            found.setdefault(re.sub(r"experts\.\d+", "experts", name), set()).add(scheme)
        assert all(len(schemes) == 1 for schemes in found.values())
        assert len({scheme for schemes in found.values() for scheme in schemes}) > 1

    def test_a_type_is_planned_only_where_rows_are_whole_blocks(self, planned, measured):
        for unit in measured.record.units:
            assert unit.shape[1] % GGML_TYPES[planned.units[unit.name].encoding].weights == 0
        short = {planned.units[u.name].encoding for u in measured.record.units if u.shape[1] == 96}
        assert short <= {"q8_0", "iq4_nl"}

    def test_rows_that_no_candidate_divides_are_refused_with_what_would_work(self, measured):
        message = refusal(lambda: plan(measured, "5bpw", engine="llama.cpp", encodings=("q4_k",)))
        assert re.search(r"down_proj has rows of 96 weights.*add --widths 16 or give --ignore", message)
        found = plan(measured, "6.9bpw", engine="llama.cpp", encodings=("q4_k",), fixed={"*.down_proj": 16})
        assert {s.width for name, s in found.units.items() if name.endswith("down_proj")} == {16}

    def test_a_budget_for_the_file_is_kept(self, measured, planned):
        limit = planned.account.checkpoint
        found = plan(measured, str(limit), engine="llama.cpp", encodings=FAST)
        assert limit - 40_000 < found.account.checkpoint <= limit

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"engine": "ollama"}, "--engine ollama is unknown: there are moqa, llama.cpp, vllm"),
            (
                {"engine": "llama.cpp", "ties": "expert"},
                "--ties expert: it runs layer_projection and layer",
            ),
            ({"engine": "vllm", "ties": "unit"}, "--engine vllm does not run --ties unit: it runs layer"),
            (
                {"engine": "llama.cpp", "encodings": ("trellis",)},
                "--encodings trellis is nothing that --engine",
            ),
            ({"engine": "vllm", "widths": (3,)}, "--engine vllm does not run --widths 3: it runs 4, 8, 16"),
            (
                {"engine": "vllm", "groups": (256,)},
                "--engine vllm runs: it runs 128, 64, 32",
            ),
        ],
    )
    def test_what_an_engine_does_not_run_is_refused(self, measured, options, message):
        assert message in refusal(lambda: plan(measured, "5bpw", **options))

    def test_a_plan_for_llama_cpp_is_not_quantized(self, model, planned, measured, tmp_path):
        message = refusal(lambda: moqa.quantize(model, planned, tmp_path / "out", profile=measured))
        assert "the plan is for llama.cpp" in message
        assert "moqa export PLAN --to gguf" in message
        assert not list(tmp_path.iterdir())


class TestFile:
    def test_planned_bytes_are_bytes_on_disk(self, planned, written):
        assert written.stat().st_size == planned.account.checkpoint
        assert sum(int(t.n_bytes) for t in GGUFReader(written).tensors) == planned.account.units + planned.account.kept

    def test_every_tensor_has_the_type_of_the_plan(self, model, planned, written):
        family = find_family(open_model(model).model.config)
        there = tensors(written)
        for name, scheme in planned.units.items():
            assert there[family.name(f"{name}.weight", 2)].tensor_type.name.lower() == scheme.encoding
        assert there["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"
        assert there["token_embd.weight"].tensor_type.name == "BF16"

    def test_weights_are_near_those_of_the_original_by_their_type(self, model, planned, written):
        view, there = open_model(model), tensors(written)
        family = find_family(view.model.config)
        for unit in view.units.values():
            found = weights(there[family.name(f"{unit.name}.weight", 2)])
            found = found if unit.expert is None else found[unit.expert]
            original = view.weight(unit)
            plain = (rounded_as(original, planned.units[unit.name].encoding) - original).square().sum()
            error = (found - original).square().sum()
            assert 0 < error < 2 * plain

    def test_kept_tensors_are_exact(self, model, written):
        view, there = open_model(model), tensors(written)
        for ours, theirs in {
            "model.embed_tokens.weight": "token_embd.weight",
            "model.layers.1.mlp.gate.weight": "blk.1.ffn_gate_inp.weight",
            "model.norm.weight": "output_norm.weight",
        }.items():
            assert torch.equal(weights(there[theirs]), view.kept()[ours].float())

    def test_it_has_the_tokenizer(self, written):
        fields = GGUFReader(written).fields
        assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
        assert len(fields["tokenizer.ggml.tokens"].data) == 8192
        assert fields["tokenizer.ggml.eos_token_id"].contents() == 0

    def test_a_stopped_export_continues_with_the_same_bytes(self, planned, written, tmp_path):
        source, out = saved(planned, tmp_path), tmp_path / "model.gguf"

        def stop(step, done, *_, **__):
            if done == 1:
                raise Stopped("enough")

        with pytest.raises(Stopped):
            moqa.export(source, out, to="gguf", report=stop)
        assert not out.exists()
        moqa.export(source, out, to="gguf")
        assert out.read_bytes() == written.read_bytes()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "plan.json"]


class TestRefusals:
    def test_a_plan_for_another_engine_names_the_command(self, measured, tmp_path):
        source = saved(plan(measured, "5bpw"), tmp_path)
        message = refusal(lambda: moqa.export(source, tmp_path / "x.gguf", to="gguf"))
        assert re.search(r"is a plan for moqa.*moqa plan .* --engine llama.cpp --bpw 5 -o plan.json", message)

    def test_an_existing_file_stays(self, planned, tmp_path):
        (tmp_path / "x.gguf").write_text("mine")
        for to in ("gguf", "tensor-types"):
            message = refusal(lambda to=to: moqa.export(saved(planned, tmp_path), tmp_path / "x.gguf", to=to))
            assert "exists: choose another -o, or give --overwrite" in message
        assert (tmp_path / "x.gguf").read_text() == "mine"

    def test_an_unknown_format_names_those_that_there_are(self, tmp_path):
        message = refusal(lambda: moqa.export("plan.json", tmp_path / "x", to="onnx"))
        assert message == f"--to onnx is unknown: there are {', '.join(FORMATS)}"

    def test_a_missing_package_is_named_before_anything_is_read(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "libgguf", None)
        message = refusal(lambda: moqa.export("nothing.json", tmp_path / "x", to="gguf"))
        assert "libgguf: pip install 'moqa[gguf]'" in message

    def test_a_family_is_refused_before_its_weights_are_read(self, measured, monkeypatch):
        monkeypatch.setattr("moqa.planning.run.with_errors_of", None)
        monkeypatch.delitem(FAMILIES, "qwen3_moe")
        message = refusal(lambda: plan(measured, "5bpw", engine="llama.cpp"))
        assert message.startswith("qwen3_moe cannot be exported for llama.cpp: there are qwen2_moe, olmoe")

    def test_planning_names_a_missing_package(self, measured, monkeypatch):
        monkeypatch.setitem(sys.modules, "gguf", None)
        message = refusal(lambda: plan(measured, "5bpw", engine="llama.cpp"))
        assert "need the package gguf: pip install 'moqa[gguf]'" in message

    @pytest.mark.parametrize(
        ("kind", "changes", "message"),
        [
            ("qwen3_moe", {"norm_topk_prob": False}, "llama.cpp runs no qwen3_moe with norm_topk_prob False"),
            ("llama", {"attention_bias": True}, "llama.cpp runs no llama with attention_bias True: it needs False"),
            ("qwen3", {"hidden_act": "gelu"}, "llama.cpp runs no qwen3 with hidden_act gelu: it needs silu"),
        ],
    )
    def test_settings_that_llama_cpp_does_not_have(self, tmp_path, kind, changes, message):
        view = open_model(make_model(tmp_path / "model", kind, **changes))
        with pytest.raises(MoqaError, match=re.escape(message)):
            find_family(view.model.config)


class TestImportance:
    @pytest.fixture(scope="class")
    def sums(self, measured, tmp_path_factory):
        out = tmp_path_factory.mktemp("imatrix") / "imatrix.gguf"
        moqa.export(measured.folder, out, to="imatrix")
        return {name: torch.from_numpy(np.array(tensor.data)) for name, tensor in tensors(out).items()}

    def test_every_token_reaches_two_experts(self, sums):
        counted = sums["blk.0.ffn_gate_exps.weight.counts"]
        assert counted.shape == (4, 1)
        assert counted.sum() == 2 * sums["blk.0.attn_q.weight.counts"].sum()

    def test_sums_are_those_of_the_fitted_inputs(self, model, measured, sums):
        view = open_model(model)
        seen = []
        view.module("model.layers.0.self_attn.q_proj").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        # the last of four samples is held out
        with torch.no_grad():
            view.model(measured.samples("wiki")[:3])
        expected = seen[0].flatten(0, 1).square().sum(0)
        assert torch.allclose(sums["blk.0.attn_q.weight.in_sum2"][0], expected, rtol=1e-3)

    def test_it_has_a_row_for_each_expert(self, sums):
        assert sums["blk.1.ffn_down_exps.weight.in_sum2"].shape == (4, 96)


def test_types_are_expressions_for_llama_quantize(planned, tmp_path):
    out = tmp_path / "types.txt"
    moqa.export(saved(planned, tmp_path), out, to="tensor-types")
    lines = dict(line.split("=") for line in out.read_text().splitlines())
    assert len(lines) == 2 * 7
    expression = next(e for e in lines if re.search(e, "blk.1.ffn_up_exps.weight"))
    assert lines[expression] == planned.units["model.layers.1.mlp.experts.0.up_proj"].encoding


@pytest.mark.parametrize("kind", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0", "iq4_nl", "iq4_xs", "q5_1"])
def test_a_type_takes_the_bytes_that_it_says_and_is_decoded_as_it_is_rounded(kind):
    torch.manual_seed(0)
    weight, scheme = torch.randn(3, 512), Scheme(width=GGML_TYPES[kind].width, encoding=kind)
    blocks = encode(weight, kind)
    assert blocks.numel() == scheme.stored_bytes((3, 512))
    decoded = scheme.storage.decode(scheme, (3, 512), {"blocks": blocks})
    assert torch.equal(decoded, rounded_as(weight, kind))


class TestLlamaCpp:
    @pytest.mark.parametrize("kind", MODELS)
    def test_every_family_computes_as_the_original(self, kind, texts, tmp_path):
        assert MODELS.keys() == FAMILIES.keys()
        folder = make_model(tmp_path / "model", kind)
        made = profile(folder, [texts["wiki"]], tmp_path / "profile", samples=2, context=16, sensitivity=False,
                       self_samples=0)  # fmt: skip
        whole = plan(made, strategy="uniform", engine="llama.cpp", widths=(16,))
        moqa.export(saved(whole, tmp_path), tmp_path / "x.gguf", to="gguf")
        tokens = made.samples("wiki")[0].tolist()
        theirs = LlamaCpp(tmp_path / "x.gguf").logits(tokens)
        with torch.no_grad():
            ours = open_model(folder).model(torch.tensor([tokens])).logits[0]
        # llama.cpp rounds what it multiplies to 16 bits: a token between two experts may go to the other one
        alike = torch.nn.functional.cosine_similarity(theirs, ours)
        assert alike.quantile(0.2) > 0.999
        assert (theirs.argmax(-1) == ours.argmax(-1)).float().mean() >= 0.9

    def test_it_cuts_text_into_the_same_tokens(self, model, written):
        from transformers import AutoTokenizer

        text = "The river's 12 bridges,\n\n  über Straße; don't <|endoftext stop.\tx=y**2"
        assert LlamaCpp(written).tokens(text) == AutoTokenizer.from_pretrained(model)(text)["input_ids"]

    @pytest.mark.parametrize("spaces", ["prepended", "metaspace", "kept"])
    def test_it_cuts_text_as_a_tokenizer_that_falls_back_to_bytes(self, spaces, texts, tmp_path):
        from transformers import AutoTokenizer

        folder = make_model(tmp_path / "model", "mixtral")
        sentencepiece_like(folder, texts["wiki"].texts, spaces)
        file = whole_file(folder, texts, tmp_path)
        fields = GGUFReader(file).fields
        assert fields["tokenizer.ggml.model"].contents() == "llama"
        assert fields["tokenizer.ggml.add_bos_token"].contents() is True
        assert fields["tokenizer.ggml.unknown_token_id"].contents() == 0
        assert fields["tokenizer.ggml.add_space_prefix"].contents() is (spaces != "kept")
        theirs, ours = LlamaCpp(file), AutoTokenizer.from_pretrained(folder)
        tried = [texts["python"].texts[0][:3000], "über  Straße;\n\n\t12 <s \U0001f600 don't", ""]
        # a metaspace adds no space to one that is there; SentencePiece and llama.cpp do
        for text in tried if spaces == "metaspace" else [*tried, " a"]:
            assert theirs.tokens(text) == ours(text, add_special_tokens=False)["input_ids"]

    def test_it_cuts_digits_one_by_one(self, texts, tmp_path):
        from transformers import AutoTokenizer

        folder = make_model(tmp_path / "model", "llama")
        data = json.loads((folder / "tokenizer.json").read_text())
        digits = {"type": "Digits", "individual_digits": True}
        data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, data["pre_tokenizer"]]}
        (folder / "tokenizer.json").write_text(json.dumps(data))
        file = whole_file(folder, texts, tmp_path)
        text = "In 1997 he won 23,450.75 of them; x2=y10"
        assert LlamaCpp(file).tokens(text) == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


def whole_file(folder: Path, texts, out: Path) -> Path:
    """A model exported in 16 bits."""
    made = profile(folder, [texts["wiki"]], out / "profile", samples=2, context=16, sensitivity=False, self_samples=0)
    whole = plan(made, strategy="uniform", engine="llama.cpp", widths=(16,))
    moqa.export(saved(whole, out), out / "x.gguf", to="gguf")
    return out / "x.gguf"


def sentencepiece_like(folder: Path, texts: Sequence[str], spaces: str) -> None:
    """Give a model a tokenizer as Llama 2 and Mixtral have it: spaces are parts of tokens, unknown characters bytes."""
    first = ["<unk>", "<s>", "</s>"]
    every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=first + every_byte, show_progress=False)
    made.train_from_iterator(texts, trainer)
    made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    data = json.loads(made.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in first]
    prepend, replace = {"type": "Prepend", "prepend": "▁"}, {
        "type": "Replace", "pattern": {"String": " "}, "content": "▁"
    }  # fmt: skip
    data["normalizer"], data["pre_tokenizer"] = {
        "prepended": ({"type": "Sequence", "normalizers": [prepend, replace]}, None),
        "metaspace": (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}),
        "kept": (replace, None),
    }[spaces]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
