"""Loading and decoding: mapped weights, transformers' own loader, growing cache, fused decoder, `moqa bench`."""

import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from families import random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from long_work import refusal
from transformers.cache_utils import DynamicLayer

import moqa
from moqa.cli.main import main
from moqa.errors import MoqaError
from moqa.generation import PromptCache
from moqa.kernels import PackedMatrix, native
from moqa.planning import plan
from moqa.profiling import profile
from moqa.quantization import quantize
from moqa.runtime.decoder import FusedDecoder
from moqa.runtime.growing import SMALLEST, GrowingCache, GrowingLayer, cache_for, from_bytes, round_cache, to_bytes

FORMAT1 = Path(__file__).parent / "format1" / "checkpoint"


@pytest.fixture(scope="module")
def packed(tiny_model, texts, tmp_path_factory):
    """A checkpoint with experts of every width side by side."""
    folder = tmp_path_factory.mktemp("runtime")
    measured = profile(tiny_model, [texts["wiki"]], folder / "profile", samples=2, context=32, self_samples=1)
    return quantize(tiny_model, plan(measured, "4.5bpw", strategy="random"), folder / "out", method="rtn")


def run_python(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return done.stdout


class TestLoad:
    def test_weights_are_mapped_not_copied(self, packed):
        model, _ = moqa.load(packed)
        folder = moqa.format.reader.open_checkpoint(packed)
        sizes = {shard.bytes for shard in folder.shards}
        matrices = [m for m in model.modules() if isinstance(m, PackedMatrix)]
        # every tensor is a part of a whole file
        assert {t.untyped_storage().nbytes() for m in matrices for t in m.buffers()} <= sizes

    @pytest.mark.parametrize("order", [("moqa", "transformers"), ("transformers", "moqa")])
    def test_from_pretrained_works_after_import_moqa(self, packed, order):
        script = (
            f"import sys, {order[0]}, {order[1]}, torch\n"
            "from transformers import AutoModelForCausalLM\n"
            "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
            "ours = moqa.load(sys.argv[1])[0]\n"
            "ids = torch.arange(40)[None]\n"
            "print(torch.equal(model(ids).logits, ours(ids).logits))"
        )
        assert run_python(script, packed).split()[-1] == "True"

    @pytest.mark.parametrize(
        "load", ["AutoModelForCausalLM.from_pretrained(F)", "pipeline('text-generation', F).model"]
    )
    def test_transformers_alone_loads_it(self, packed, load):
        script = (
            "import sys, torch\n"
            "from transformers import AutoModelForCausalLM, pipeline\n"
            f"F = sys.argv[1]; model = {load}\n"
            "import moqa\n"
            "ids = torch.arange(40)[None]\n"
            "print(torch.equal(model(ids).logits, moqa.load(F, dtype=model.dtype)[0](ids).logits))"
        )
        assert run_python(script, packed).split()[-1] == "True"

    def test_transformers_without_moqa_fails(self, packed, monkeypatch):
        monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # as if moqa were not installed
        script = "import sys; from transformers import AutoModel; AutoModel.from_pretrained(sys.argv[1])"
        with pytest.raises(subprocess.CalledProcessError) as error:
            run_python(script, packed)
        assert "pip-install-moqa" in error.value.stderr

    def test_bfloat16_activations(self, packed):
        model, _ = moqa.load(packed, dtype=torch.bfloat16)
        exact, _ = moqa.load(packed)
        ids = torch.arange(40)[None]
        found, expected = model(ids).logits, exact(ids).logits
        assert found.dtype == torch.bfloat16
        assert float((found.float() - expected).norm() / expected.norm()) < 0.1

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"kernels": "fast"}, "no kernels named 'fast'"),
            ({"dtype": torch.float16}, "torch.float16 is not supported for activations"),
        ],
    )
    def test_what_does_not_exist_is_refused(self, packed, options, message):
        with pytest.raises(MoqaError, match=message):
            moqa.load(packed, **options)

    def test_the_slow_path_is_not_silent(self, packed, monkeypatch):
        monkeypatch.setattr(native, "_native", None)
        monkeypatch.setattr(native, "_missing", "No module named _native", raising=False)
        with pytest.warns(UserWarning, match="slow reference kernels, native kernels are missing: .*C\\+\\+ compiler"):
            moqa.load(packed)
        with pytest.raises(MoqaError, match="'native' do not run on cpu"):
            moqa.load(packed, kernels="native")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            moqa.load(packed, kernels="reference")


class TestGrowingCache:
    @settings(max_examples=50)
    @given(st.lists(st.one_of(st.integers(1, 300), st.integers(-200, -1)), max_size=8), st.integers(0, 1000))
    def test_holds_what_a_dynamic_cache_holds(self, steps, seed):
        random = torch.Generator().manual_seed(seed)
        ours, theirs = GrowingLayer(), DynamicLayer()
        for step in steps:
            if step > 0:
                states = torch.randn(2, 1, 2, step, 4, generator=random).unbind(0)
                found, expected = ours.update(*states), theirs.update(*states)
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            elif ours.get_seq_length() > -step:
                ours.crop(step)
                theirs.crop(step)
            assert ours.get_seq_length() == theirs.get_seq_length()
            assert ours.capacity >= ours.get_seq_length()

    def test_follows_changes_along_the_batch(self):
        ours, theirs = GrowingLayer(), DynamicLayer()
        for layer in (ours, theirs):
            layer.update(torch.arange(24.0).reshape(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
            layer.batch_repeat_interleave(3)
            layer.batch_select_indices(torch.tensor([2, 0]))
            layer.update(torch.full((2, 2, 1, 4), 7.0), torch.zeros(2, 2, 1, 4))
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)

    @settings(max_examples=50)
    @given(st.integers(0, 2**31), st.integers(1, 70))
    def test_bytes_are_the_nearest_steps(self, seed, features):
        random = torch.Generator().manual_seed(seed)
        states = torch.randn(2, 3, 5, features, generator=random) * torch.rand(2, 3, 5, 1, generator=random).exp()
        states[0, 0, 0] = 0
        stored = to_bytes(states)
        assert (stored.dtype, stored.shape) == (torch.int8, (2, 3, 5, features + 4))
        found, step = from_bytes(stored), states.abs().amax(-1, keepdim=True) / 127
        assert bool(((found - states).abs() <= step * 0.5001).all())
        assert torch.equal(to_bytes(found)[..., :-4], stored[..., :-4])

    def test_rounded_states_follow_changes_along_the_batch(self):
        layer, states = GrowingLayer(rounded=True), torch.randn(1, 2, 3, 4)
        keys, _ = layer.update(states, states)
        assert torch.equal(keys, from_bytes(to_bytes(states)))
        layer.batch_repeat_interleave(2)
        assert torch.allclose(layer.keys, keys.repeat_interleave(2, 0), rtol=1e-6)
        layer.update(torch.ones(2, 2, 1, 4), torch.ones(2, 2, 1, 4))
        layer.crop(-1)
        assert layer.keys.shape == (2, 2, 3, 4)

    def test_grows_by_doubling(self):
        layer, states = GrowingLayer(), torch.zeros(1, 1, 1, 2)
        rooms = [layer.capacity for _ in range(3 * SMALLEST) if layer.update(states, states)]
        assert sorted(set(rooms) | {layer.capacity}) == [SMALLEST, 2 * SMALLEST, 4 * SMALLEST]

    def test_transformers_generates_with_it(self, packed):
        model, _ = moqa.load(packed)
        ids = torch.arange(5, 25)[None]
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        cache = GrowingCache(model.config.num_hidden_layers)
        assert torch.equal(model.generate(ids, **options), model.generate(ids, past_key_values=cache, **options))


class TestRoundedCache:
    @torch.no_grad()
    def test_takes_a_quarter_of_the_memory_and_hardly_changes_what_is_written(self, packed):
        model, _ = moqa.load(packed)
        exact, ids = PromptCache(), torch.arange(5, 45)[None]
        plain = [exact.read(model, part) for part in (ids[:, :30], *ids[:, 30:].split(1, 1))]
        round_cache(model, 8)
        rounded = PromptCache()
        found = [rounded.read(model, part) for part in (ids[:, :30], *ids[:, 30:].split(1, 1))]
        sizes = [
            sum(buffer.nbytes for layer in memory._cache.layers for buffer in layer._buffers.values())
            for memory in (exact, rounded)
        ]
        head = model.config.head_dim
        assert sizes[1] * 4 * head == sizes[0] * (head + 4)
        truth, others = torch.stack(plain).log_softmax(-1), torch.stack(found).log_softmax(-1)
        assert 0 < float((truth.exp() * (truth - others)).sum(-1).mean()) < 1e-3

    @torch.no_grad()
    def test_one_native_call_reads_what_torch_reads(self, packed):
        model, _ = moqa.load(packed)
        round_cache(model, 8)
        decoder, ids = FusedDecoder.of(model), torch.arange(5, 35)[None]
        ours, theirs = cache_for(model), cache_for(model)
        for cache in (ours, theirs):
            model(ids[:, :20], past_key_values=cache, use_cache=True)
        for token in ids[0, 20:].tolist():
            found = decoder.step(token, ours)
            expected = model(torch.tensor([[token]]), past_key_values=theirs, use_cache=True).logits[0, -1]
            assert torch.allclose(found, expected, atol=0.02 * float(expected.abs().max()))
        assert torch.allclose(ours.layers[-1].values, theirs.layers[-1].values, atol=0.05)

    def test_refusals(self, packed):
        model, _ = moqa.load(packed)
        assert refusal(round_cache, model, 4) == "keys and values of 4 bits are not supported: give 8, or nothing"
        sliding = random_model("gemma3_text")
        said = refusal(round_cache, sliding, 8)
        assert said.startswith("a gemma3_text model has a DynamicSlidingWindowLayer, which cannot be rounded")


class TestFusedDecoder:
    def test_is_not_used_where_it_does_not_agree(self, packed, monkeypatch):
        model, _ = moqa.load(packed)
        describe = FusedDecoder._describe
        monkeypatch.setattr(
            FusedDecoder,
            "_describe",
            lambda self, layer: describe(self, layer) | {"scale": layer.self_attn.scaling * 3},
        )
        assert FusedDecoder.of(model) is None

    def test_is_not_used_for_the_reference_or_bfloat16(self, packed):
        assert FusedDecoder.of(moqa.load(packed, kernels="reference")[0]) is None
        assert FusedDecoder.of(moqa.load(packed, dtype=torch.bfloat16)[0]) is None
        assert FusedDecoder.of(moqa.load(packed)[0]) is not None

    @torch.no_grad()
    def test_goes_on_beyond_the_room_of_its_cache(self, packed):
        model, _ = moqa.load(packed)
        decoder = FusedDecoder.of(model)
        ids = torch.randint(8192, (1, SMALLEST + 40), generator=torch.Generator().manual_seed(0))
        cache = decoder.cache()
        model(ids[:, : SMALLEST - 10], past_key_values=cache, use_cache=True)
        for token in ids[0, SMALLEST - 10 :]:
            logits = decoder.step(int(token), cache)
        expected = model(ids).logits[0, -1]
        assert float((logits - expected).norm() / expected.norm()) < 0.05

    @torch.no_grad()
    def test_the_number_of_threads_changes_nothing(self, packed):
        model, _ = moqa.load(packed)
        decoder, found = FusedDecoder.of(model), []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            cache = decoder.cache()
            model(torch.arange(9)[None], past_key_values=cache, use_cache=True)
            found.append(torch.stack([decoder.step(token, cache) for token in (5, 900, 31)]))
        assert torch.equal(*found)


class TestBench:
    def test_measures_a_checkpoint_and_its_original(self, packed, tiny_model, tmp_path, capsys):
        for model, engine in ((packed, "moqa"), (tiny_model, "transformers")):
            path = tmp_path / f"{engine}.json"
            arguments = ["bench", model, "--threads", 1, "--prompt-tokens", 9, "--new-tokens", 5, "--repeats", 1]
            sys.argv = ["moqa", *map(str, arguments), "--json", str(path)]
            with pytest.raises(SystemExit) as stopped:
                main()
            assert stopped.value.code == 0
            found = json.loads(path.read_text())
            assert (found["engine"], found["threads"], found["prompt_tokens"]) == (engine, 1, 9)
            assert found["bytes"] == sum(file.stat().st_size for file in model.glob("*.safetensors"))
            assert min(found["decode_tokens_per_second"], found["prefill_tokens_per_second"]) > 0
            assert found["peak_bytes"] > 10**8
            assert engine in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("model", "options", "message"),
        [("nowhere", {}, "nowhere"), (None, {"prompt_tokens": 10**6}, "the context of the model holds")],
    )
    def test_mistakes_are_one_line(self, packed, model, options, message):
        with pytest.raises(MoqaError, match=message):
            moqa.bench(model or packed, **options)


class TestCasts:
    @pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
    def test_are_refused_before_anything_changes(self, loaded, cast):
        model, wanted = loaded
        for part in (model, model.model):
            with pytest.raises(MoqaError, match="cannot be cast: load it again with dtype="):
                getattr(part, cast)()
        with pytest.raises(MoqaError, match="cannot be cast"):
            model.to(torch.float16)
        assert torch.equal(logits(model), wanted)

    @pytest.mark.parametrize("name", ["save_pretrained", "push_to_hub", "dequantize", "resize_token_embeddings"])
    def test_nothing_is_written_as_another_format(self, loaded, tmp_path, name):
        with pytest.raises(MoqaError, match=f"a packed model has no {name}"):
            getattr(loaded[0], name)(tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_what_changes_nothing_works(self, loaded):
        model, wanted = loaded
        for same in (model.float(), model.to("cpu"), model.to(torch.float32), copy.deepcopy(model)):
            assert torch.equal(logits(same), wanted)

    def test_a_copy_refuses_for_itself(self, loaded):
        twin = copy.deepcopy(loaded[0])
        with pytest.raises(MoqaError, match="cannot be cast"):
            twin.half()
        twin.to("meta")
        assert torch.equal(logits(loaded[0]), loaded[1])

    def test_wider_tensors_stay_wide(self):
        model, _ = moqa.load(FORMAT1, dtype=torch.bfloat16)
        model.register_buffer("wide", torch.ones(2, dtype=torch.float32))
        assert model.to(torch.bfloat16).wide.dtype == torch.float32

    def test_those_of_transformers_own_loader(self):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(FORMAT1, dtype=torch.float32)
        with pytest.raises(MoqaError, match="cannot be cast"):
            model.to(torch.bfloat16)
        with pytest.raises(MoqaError, match="has no save_pretrained"):
            model.save_pretrained("out")


@pytest.fixture
def loaded():
    model, _ = moqa.load(FORMAT1)
    return model, logits(model)


def logits(model):
    with torch.no_grad():
        return model(torch.arange(12)[None]).logits
