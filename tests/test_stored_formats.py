"""Originals in FP8 and MXFP4: read as the plain tensors that they stand for, by every command, or refused."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from blockwise import E2M1, as_bfloat16, configure, nibbles, shard, spread, write_pair
from families import TEXTS, random_model, save, train_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config
from transformers.quantizers import quantizer_finegrained_fp8

import moqa
from moqa.cli.main import main
from moqa.errors import MoqaError
from moqa.generation.load import load_any
from moqa.models.load import load_original
from moqa.models.view import open_model
from moqa.originals import OriginalReader, blocks
from moqa.originals.fingerprint import fingerprint

WEIGHTS = "model.safetensors"
# method, family, changes of its configuration, block
PAIRS = {
    "gpt_oss": ("mxfp4", {"intermediate_size": 64}, (1, 32)),
    "deepseek_v3": ("fp8", {}, (24, 40)),
    "qwen3_moe": ("fp8", {}, (32, 32)),
}


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Folders of a family's tiny model, in blocks and plain with the same values."""
    tokenizer = train_tokenizer(sorted(TEXTS.glob("*.calib.txt")))
    root, made = tmp_path_factory.mktemp("stored"), {}
    for family, (method, changes, block) in PAIRS.items():
        source = save(random_model(family, **changes), tokenizer, root / f"{family}-source")
        made[family] = write_pair(source, root / family, method, block)
    return made


@pytest.fixture(scope="session")
def tokens():
    return torch.randint(2, 512, (4, 24), generator=torch.Generator().manual_seed(1))


def same(found, expected) -> bool:
    found, expected = dict(found), dict(expected)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def read(folder: Path, tensors: dict, options: dict) -> dict[str, torch.Tensor]:
    """All tensors of a folder that holds these."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps({"quantization_config": options}))
    stored = OriginalReader(folder)
    with stored.opened() as on_disk:
        found = {name: on_disk(name)[...] for name in stored.headers}
    assert len(fingerprint(folder)) == 4 * 32 + 3
    assert stored.values == sum(tensor.numel() for tensor in found.values())
    assert {n: list(t.shape) for n, t in found.items()} == {n: e["shape"] for n, e in stored.headers.items()}
    return found


@pytest.fixture(scope="session", params=[1, 64, 2**22], ids="{} together".format)
def together(request):
    """Blocks in bands of different heights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_CHUNK", request.param)
        yield


@pytest.fixture(scope="session")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch") / "model"


@pytest.mark.usefixtures("together")
class TestBlocks:
    @given(
        st.sampled_from([(), (1,), (3,), (2, 2)]), st.tuples(st.integers(1, 9), st.integers(1, 9)),
        st.tuples(st.integers(1, 5), st.integers(1, 5)), st.sampled_from(["F32", "BF16", "E8M0", "U8"]),
        st.sampled_from(["weight_scale_inv", "scale"]), st.integers(0, 2**32 - 1),
    )  # fmt: skip
    def test_fp8(self, scratch, stack, shape, block, kind, suffix, seed):
        random = np.random.default_rng(seed)
        # every code but the two that are no numbers
        codes = random.choice(np.setdiff1d(np.arange(256), [0x7F, 0xFF]), (*stack, *shape)).astype(np.uint8)
        grid = (*stack, *(-(-side // length) for side, length in zip(shape, block, strict=True)))
        bytes_ = random.integers(100, 150, grid).astype(np.uint8)
        scales = {
            "F32": torch.from_numpy(random.uniform(1e-4, 10, grid).astype(np.float32)),
            "BF16": as_bfloat16(random.uniform(1e-4, 10, grid)),
            "E8M0": torch.from_numpy(bytes_).view(torch.float8_e8m0fnu),
            "U8": torch.from_numpy(bytes_),
        }[kind]
        numbers = torch.from_numpy(codes).view(torch.float8_e4m3fn)
        options = {"quant_method": "fp8", "weight_block_size": list(block)}
        tensors = {"a.weight": numbers, f"a.{suffix}": scales, "a.activation_scale": torch.ones(())}
        found = read(scratch, {**tensors, "b.bias": torch.ones(2)}, options)
        values = np.ldexp(np.float32(1), bytes_.astype(int) - 127) if kind in ("E8M0", "U8") else scales.float().numpy()
        every = np.stack([spread(part, block, shape) for part in values.reshape(-1, *grid[-2:])])
        expected = as_bfloat16(numbers.float().numpy() * every.reshape(codes.shape))
        assert same(found, {"a.weight": expected, "b.bias": torch.ones(2)})

    @given(st.integers(0, 2**32 - 1), st.sampled_from([(), (1,), (1, 1)]))
    def test_fp8_with_one_scale(self, scratch, seed, shape):
        numbers = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)).to(torch.float8_e4m3fn)
        scale, options = torch.full(shape, 0.3), {"quant_method": "fp8", "weight_block_size": None}
        found = read(scratch, {"a.weight": numbers, "a.weight_scale_inv": scale}, options)
        assert same(found, {"a.weight": (numbers.float() * 0.3).bfloat16()})

    @given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**32 - 1))
    def test_4_bits_of_deepseek_v4(self, scratch, rows, groups, seed):
        random = np.random.default_rng(seed)
        codes, exponents = random.integers(16, size=(rows, 32 * groups)), random.integers(100, 150, (rows, groups))
        tensors = {
            "a.weight": torch.from_numpy(nibbles(codes)).view(torch.int8),
            "a.scale": torch.from_numpy(exponents.astype(np.uint8)).view(torch.float8_e8m0fnu),
        }
        found = read(scratch, tensors, {"quant_method": "fp8", "scale_fmt": "ue8m0"})
        assert same(found, {"a.weight": as_bfloat16(E2M1[codes] * 2.0 ** (exponents.repeat(32, 1) - 127))})

    @given(
        st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.integers(1, 250), st.integers(0, 2**32 - 1)
    )  # fmt: skip
    def test_mxfp4(self, scratch, experts, rows, groups, exponent, seed):
        random = np.random.default_rng(seed)
        codes = random.integers(16, size=(experts, rows, groups, 32))
        exponents = random.integers(exponent, exponent + 3, (experts, rows, groups))
        tensors = {"a.down_proj_blocks": nibbles(codes), "a.down_proj_scales": exponents.astype(np.uint8)}
        tensors = {name: torch.from_numpy(array) for name, array in tensors.items()}
        found = read(scratch, tensors, {"quant_method": "mxfp4"})["a.down_proj"]
        plain = (E2M1[codes] * 2.0 ** (exponents[..., None] - 127)).reshape(experts, rows, -1).swapaxes(1, 2)
        assert torch.equal(found, as_bfloat16(plain))
        assert np.array_equal(found.double().numpy(), plain)  # nothing was rounded


@pytest.mark.parametrize("family", PAIRS)
class TestModels:
    @pytest.mark.parametrize("keep", [True, False])
    def test_is_the_plain_model(self, family, keep, pairs, tokens):
        ours, expected = (open_model(folder, keep=keep) for folder in pairs[family])
        assert torch.equal(ours.model(tokens).logits, expected.model(tokens).logits)
        for unit in expected.units.values():
            assert torch.equal(ours.weight(unit), expected.weight(unit)), unit.name
            assert ours.itemsize(unit) == expected.itemsize(unit)
        assert same(ours.kept_on_disk(), expected.kept_on_disk())
        assert ours.kept_entries() == expected.kept_entries()

    def test_holds_one_layer_in_16_bits(self, family, pairs):
        view = open_model(pairs[family][0], keep=False)
        view.need(1)
        assert view.experts(1).down_proj.dtype == torch.bfloat16
        there = [n for n, layer in enumerate(view.blocks) if not any(p.is_meta for p in layer.parameters())]
        assert there == [1]

    def test_numbers_and_scales_in_different_files(self, family, pairs, tokens, tmp_path):
        folder = Path(shutil.copytree(pairs[family][0], tmp_path / "model"))
        shard(folder)
        expected = open_model(pairs[family][1])
        assert same(open_model(folder).model.state_dict(), expected.model.state_dict())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_is_run_by_transformers_as_the_plain_one_is(self, family, dtype, pairs, tokens):
        ours, expected = (load_original(folder, dtype) for folder in pairs[family])
        assert same(ours.state_dict(), expected.state_dict())
        assert torch.equal(ours(tokens).logits, expected(tokens).logits)
        assert ours.generation_config.to_dict() == expected.generation_config.to_dict()

    def test_generates(self, family, pairs):
        found = []
        for folder in pairs[family]:
            model, tokenizer = load_any(folder)
            found.append(model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=6, do_sample=False))
        assert torch.equal(*found)


class TestAsTransformersDoes:
    def check(self, folder, config):
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
        for ours in (load_original(folder, torch.bfloat16), open_model(folder, torch.bfloat16).model):
            assert same(ours.state_dict(), theirs.state_dict())

    def test_mxfp4(self, pairs):
        self.check(pairs["gpt_oss"][0], Mxfp4Config(dequantize=True))

    def test_fp8(self, pairs, monkeypatch):
        # accelerate is for devices; transformers takes whole blocks only
        monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)
        self.check(pairs["qwen3_moe"][0], FineGrainedFP8Config(dequantize=True, weight_block_size=(32, 32)))


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
class TestCommands:
    @pytest.fixture
    def moqa(self, monkeypatch, capsys):
        """Run a command in this process, which must go well."""

        def run(*args):
            monkeypatch.setattr(sys, "argv", ["moqa", *map(str, args)])
            code = 0
            try:
                main()
            except SystemExit as stop:
                code = stop.code or 0
            assert code == 0, capsys.readouterr().err

        return run

    def test_from_profile_to_proof(self, family, pairs, tokens, moqa, tmp_path):
        """Every file of weights has the bytes that the plain folder gives."""
        text, held_out = TEXTS / "wiki.calib.txt", TEXTS / "wiki.test.txt"
        for folder in pairs[family]:
            work = tmp_path / folder.name
            moqa(
                "profile", folder, "--data", f"wiki={text}", "--samples", 6, "--context", 32, "--self-samples", 1,
                "-o", work / "profile",
            )  # fmt: skip
            moqa("plan", work / "profile", "--bpw", 5, "-o", work / "plan.json")
            options = ("quantize", folder, "--plan", work / "plan.json", "--method", "gptq", "--cache", "10%")
            moqa(*options, "-o", work / "out", "--dry-run", "--json", work / "dry.json")
            moqa(*options, "-o", work / "out")
            moqa("verify", work / "out")
            moqa("inspect", folder, "--json", work / "inspect.json")
            for what, against in ((work / "out", ("--against", folder)), (folder, ())):
                moqa(
                    "evaluate", what, "--data", f"wiki={held_out}", "--windows", 2, "--context", 32, *against, "--json",
                    work / f"{what.name}.json",
                )  # fmt: skip
        (ours, plain), (at, beside) = pairs[family], (tmp_path / folder.name for folder in pairs[family])
        shards = sorted(path.relative_to(beside) for path in (beside / "out").rglob("*.safetensors"))
        assert len(shards) > 3
        assert all((at / path).read_bytes() == (beside / path).read_bytes() for path in shards)
        for name in ("dry", "inspect", "out"):
            found, expected = (json.loads((work / f"{name}.json").read_text()) for work in (at, beside))
            for volatile in ("seconds", "peak_bytes", "model", "against"):
                found.pop(volatile, None), expected.pop(volatile, None)
            assert found == expected
        told = json.loads((at / f"{ours.name}.json").read_text())
        assert told["bytes"] == (ours / WEIGHTS).stat().st_size
        assert told["distributions"]["wiki"]["kl_divergence"] == 0
        expected = json.loads((beside / f"{plain.name}.json").read_text())
        assert told["bits_per_weight"] < expected["bits_per_weight"] == 16
        assert told["model_bits_per_weight"] < expected["model_bits_per_weight"]
        assert told["distributions"]["wiki"]["perplexity"] == expected["distributions"]["wiki"]["perplexity"]

    def test_the_checkpoint_is_moqas(self, family, pairs, texts, tokens, tmp_path):
        folder, plain = pairs[family]
        measured = moqa.profile(folder, [texts["wiki"]], tmp_path / "p", samples=6, context=32, self_samples=0)
        chosen = moqa.plan(measured, strategy="uniform", widths=(8,))
        out = moqa.quantize(folder, chosen, tmp_path / "out")
        assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "moqa"
        original = open_model(plain).model(tokens).logits.log_softmax(-1)
        for model in (moqa.load(out)[0], AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)):
            logits = model(tokens).logits.log_softmax(-1)
            # where routing changes by a hair the model is another one: the median tells
            assert float((original.exp() * (original - logits)).sum(-1).median()) < 0.005


def broken(folder: Path) -> str:
    with pytest.raises(MoqaError) as caught:
        open_model(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(folder), "MODEL")


class TestRefusals:
    @pytest.fixture
    def fp8(self, pairs, tmp_path):
        return Path(shutil.copytree(pairs["qwen3_moe"][0], tmp_path / "model"))

    @pytest.fixture
    def mxfp4(self, pairs, tmp_path):
        return Path(shutil.copytree(pairs["gpt_oss"][0], tmp_path / "model"))

    def change(self, folder, edit):
        tensors = load_file(folder / WEIGHTS)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    Q = "model.layers.1.self_attn.q_proj.weight"
    DOWN = "model.layers.1.mlp.experts.down_proj"

    @pytest.mark.parametrize(
        ("edit", "said"),
        [
            (lambda t, q: t.pop(f"{q}_scale_inv"), "MODEL: NAME is F8_E4M3 without scales: NAME_scale_inv must"),
            (lambda t, q: t.update({f"{q}_scale_inv": torch.ones(2, 3)}), "MODEL: NAME_scale_inv is [2, 3]: NAME [64,"),
            (
                lambda t, q: t.update({f"{q}_scale_inv": torch.ones(())}),
                "MODEL: NAME_scale_inv is []: NAME [64, 64]",
            ),
            (lambda t, q: t.update({f"{q}_scale_inv": torch.ones(2, 2).int()}), "MODEL: NAME_scale_inv is I32: scales"),
            (lambda t, q: t[f"{q}_scale_inv"].fill_(torch.nan), "MODEL: tensor NAME_scale_inv has 4 NaN or infinite"),
            (lambda t, q: t[q].view(torch.uint8)[3].fill_(0x7F), "MODEL: tensor NAME has 64 NaN or infinite values of"),
            (lambda t, q: t.update({q: t[q].float()}), "MODEL is not what its config.json says: "),
            (lambda t, q: t.update({q: t[q][0].clone()}), "MODEL: NAME is F8_E4M3 [64]: FP8 tensors are matrices"),
        ],
    )
    def test_fp8(self, fp8, edit, said):
        self.change(fp8, lambda tensors: edit(tensors, self.Q))
        assert broken(fp8).replace(self.Q, "NAME").startswith(said)

    @pytest.mark.parametrize(
        ("edit", "said"),
        [
            (lambda t, d: t.pop(f"{d}_scales"), "MODEL lacks NAME_scales: blocks and scales belong together"),
            (lambda t, d: t.pop(f"{d}_blocks"), "MODEL lacks NAME_blocks: blocks and scales belong together"),
            (
                lambda t, d: t.update({f"{d}_scales": t[f"{d}_scales"][:, 1:].clone()}),
                "MODEL: NAME_scales is [4, 63",
            ),
            (lambda t, d: t.update({f"{d}_blocks": t[f"{d}_blocks"].int()}), "MODEL: NAME_blocks is I32: MXFP4 needs"),
            (lambda t, d: t[f"{d}_scales"][0, 0].fill_(255), "MODEL: tensor NAME has 64 NaN or infinite values of"),
            (lambda t, d: t.update({d: torch.ones(4, 64, 64)}), "MODEL holds NAME twice: plain, and as NAME_bl"),
            (
                lambda t, d: t.update({f"{d}_{p}": t[f"{d}_{p}"][:, 1:].clone() for p in ("blocks", "scales")}),
                "MODEL is not what its config.json says: NAME is [4, 64, 63], should be [4, 64, 64]",
            ),
        ],
    )
    def test_mxfp4(self, mxfp4, edit, said):
        self.change(mxfp4, lambda tensors: edit(tensors, self.DOWN))
        assert broken(mxfp4).replace(self.DOWN, "NAME").startswith(said)

    @pytest.mark.parametrize("size", [128, [128], [0, 128], [1.5, 2], "128x128"])
    def test_no_block_size(self, fp8, size):
        configure(fp8, quantization_config={"quant_method": "fp8", "weight_block_size": size})
        assert broken(fp8) == f"MODEL has a weight_block_size of {size}: give rows and columns, e.g. [128, 128]"

    def test_a_format_that_no_tensor_has(self, pairs, tmp_path):
        folder = Path(shutil.copytree(pairs["gpt_oss"][1], tmp_path / "model"))
        configure(folder, quantization_config={"quant_method": "mxfp4"})
        assert broken(folder) == "MODEL has no tensor in mxfp4: remove quantization_config from its config.json"
