"""Budgets of memory: caches as real ones are, a served process that keeps its limit, and every mistake in one line."""

import json
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
import torch
from families import FAMILIES, random_model

from moqa.errors import MoqaError
from moqa.forecast.serving import ServedModel
from moqa.generation.loop import CHUNK
from moqa.memory.limit import free_memory
from moqa.planning import MemoryBudget, memory_budget, plan
from moqa.planning.fit import smallest_plan
from moqa.profiling import profile

ROOT = Path(__file__).parents[1]
MODEL, WIKI = ROOT / "reference" / "model", ROOT / "reference" / "text" / "wiki.calib.txt"
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "intermediate_size": 96}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
# what the tiny models of the other tests lack: windows, recurrent states, rotary angles that depend on the length
OTHERS: dict[str, dict] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96, "sliding_window": 100},
    "gpt_oss": {"sliding_window": 128},
    "gemma3_text": {"head_dim": 16, "intermediate_size": 96, "sliding_window": 64, "num_hidden_layers": 7},
    "qwen3_next": {
        **_EXPERTS, **_LINEAR, "shared_expert_intermediate_size": 32, "head_dim": 16, "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "bamba": {"intermediate_size": 96, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16},
    "llama": {
        "intermediate_size": 96,
        "rope_parameters": {
            "rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64,
        },
    },
}  # fmt: skip
CASES = [*((name, {}) for name in FAMILIES), *OTHERS.items()]


def held(cache) -> int:
    """Bytes of all tensors of a cache, each with the whole memory that it keeps alive."""
    found: dict[int, int] = {}

    def add(value) -> None:
        if isinstance(value, torch.Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict | list | tuple):
            for part in value.values() if isinstance(value, dict) else value:
                add(part)

    for layer in cache.layers:
        add(vars(layer))
    return sum(found.values())


class TestCache:
    @pytest.mark.parametrize(("family", "changes"), CASES, ids=lambda case: case if isinstance(case, str) else "")
    @pytest.mark.parametrize("context", [5, 3 * CHUNK])
    def test_is_what_a_real_one_takes(self, family, changes, context, tmp_path):
        model = random_model(family, **{"max_position_embeddings": 2048, **changes})
        model.config.save_pretrained(tmp_path)
        cache = None
        with torch.no_grad():
            for ids in torch.full((1, context), 7).split(CHUNK, dim=1):
                cache = model(ids, past_key_values=cache, use_cache=True).past_key_values
        assert ServedModel(tmp_path).needs(context).cache == held(cache)

    def test_a_window_ends_its_growth_and_a_state_has_none(self, tmp_path):
        def growth(family: str) -> list[int]:
            random_model(family, max_position_embeddings=8192, **OTHERS[family]).config.save_pretrained(tmp_path)
            model = ServedModel(tmp_path)
            sizes = [model.needs(context).cache for context in (2048, 4096, 8192)]
            return [after - before for before, after in pairwise(sizes)]

        assert growth("mixtral") == [0, 0]
        # one layer of two is attention: 2 heads of 16, keys and values, 4 bytes
        assert growth("qwen3_next") == [2048 * 2 * 2 * 16 * 4, 4096 * 2 * 2 * 16 * 4]

    def test_a_model_without_one_is_refused(self, tmp_path):
        random_model("mamba", state_size=8).config.save_pretrained(tmp_path)
        with pytest.raises(MoqaError, match="a mamba model has no cache"):
            ServedModel(tmp_path).needs(16)

    def test_needs_grow_with_the_context(self):
        model = ServedModel(MODEL)
        needs = [model.needs(context) for context in (1, 256, 1000, 2048)]
        assert needs == sorted(needs, key=lambda found: (found.cache, found.fixed))
        assert needs[-1].cache == 2048 * 6 * 2 * 2 * 64 * 4


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A small profile of the reference model."""
    folder = tmp_path_factory.mktemp("fit") / "profile"
    return profile(MODEL, {"wiki": str(WIKI)}, folder, samples=2, self_samples=1, method="rtn")


class TestFit:
    def test_leaves_weights_what_the_rest_does_not_take(self, measured):
        budget = memory_budget(measured, "600MiB", context=1024, batch=3)
        assert budget.typed == "--fit 600MiB --context 1024 --batch 3"
        assert budget.bytes == 600 * 2**20 - budget.cache - budget.overhead
        assert budget.cache == 3 * ServedModel(MODEL).needs(1024).cache

    def test_default_context_is_the_models_if_that_is_short(self):
        assert (memory_budget(MODEL, "1GiB").context, memory_budget(MODEL, "1GiB").batch) == (2048, 1)

    def test_default_context_is_8192_at_most(self, tmp_path):
        random_model("qwen3_moe", max_position_embeddings=32768).config.save_pretrained(tmp_path)
        assert memory_budget(tmp_path, "1GiB").context == 8192

    def test_a_plan_fills_what_is_left(self, measured):
        budget = fitting(measured, left=12 * 2**20)
        chosen = plan(measured, budget)
        assert 0.98 * budget.bytes < chosen.account.checkpoint <= budget.bytes
        assert chosen.budget == budget.typed

    def test_more_memory_than_the_widest_plan_takes_is_no_mistake(self, measured):
        assert {
            scheme.width
            for scheme in plan(measured, memory_budget(measured, "16GiB"), strategy="uniform").units.values()
        } == {8}
        # units that no text reached are not widened for nothing
        assert max(scheme.width for scheme in plan(measured, memory_budget(measured, "16GiB")).units.values()) == 8

    def test_the_smallest_plan_is_known_before_there_is_a_profile(self, measured):
        for widths in ((2, 3, 4), (3,), (8,), (2, 6)):
            known = plan(
                measured, fitting(measured, 10**9), strategy="uniform", widths=[min(widths)]
            ).account.checkpoint
            assert smallest_plan(ServedModel(MODEL).view, widths, groups=(64,), mixed=False) == known
            mixed = plan(measured, fitting(measured, 10**9), widths=[min(widths)], encodings=("int",), groups=(256,))
            assert smallest_plan(ServedModel(MODEL).view, widths, encodings=("int",)) == mixed.account.checkpoint

    def test_too_little_says_how_memory_divides_and_what_fits(self, measured):
        budget = fitting(measured, left=5 * 2**20, context=2048, batch=4)
        with pytest.raises(MoqaError) as caught:
            plan(measured, budget)
        line = str(caught.value)
        assert line.startswith(f"{budget.typed} is too little, weights take at least 7 MiB, the cache 48 MiB, the over")
        size, batch, context = re.search(
            r"it fits in (\d+) MiB or with --batch (\d+) or with --context (\d+)$", line
        ).groups()
        memory = budget.typed.split()[1]
        for typed, length, count in ((f"{size}MiB", 2048, 4), (memory, 2048, int(batch)), (memory, int(context), 4)):
            other = memory_budget(measured, typed, context=length, batch=count)
            assert plan(measured, other).account.checkpoint <= other.bytes
        with pytest.raises(MoqaError, match="is too little"):
            plan(measured, memory_budget(measured, memory, context=2048, batch=int(batch) + 1))

    def test_too_little_for_anything(self, measured):
        with pytest.raises(MoqaError, match=r"--fit 1MiB .* it fits in \d+ MiB$"):
            plan(measured, memory_budget(measured, "1MiB"))


def fitting(measured, left: int, context: int = 512, batch: int = 1) -> MemoryBudget:
    """A limit that leaves so many bytes for weights."""
    found = memory_budget(measured, "1TiB", context=context, batch=batch)
    return memory_budget(measured, str(found.memory - found.bytes + left), context=context, batch=batch)


class TestCommands:
    def test_plan_shows_how_memory_divides(self, moqa_command, measured, tmp_path):
        options = ("--fit", "600MiB", "--context", "1024", "--batch", "2", "-o", tmp_path / "plan.json")
        code, _, err = moqa_command("plan", measured.folder, *options, "--json", "-")
        assert code == 0, err
        row = next(line for line in err.splitlines() if line.startswith("2 x 1024 tokens"))
        weights, cache, overhead, total, limit = (float(size) for size in re.findall(r"([\d.]+) MiB", row))
        assert (cache, limit) == (12.0, 600.0)
        assert math.isclose(weights + cache + overhead, total, abs_tol=0.03)
        assert total <= limit
        written = json.loads((tmp_path / "plan.json").read_text())
        assert written["budget"] == "--fit 600MiB --context 1024 --batch 2"
        assert math.isclose(
            sum(written["account"][key] for key in ("units", "kept", "headers")) / 2**20, weights, abs_tol=0.01
        )

    @pytest.mark.parametrize(
        ("options", "parts"),
        [
            (("--fit", "8GiB", "--bpw", "3"), ("--bpw 3", "--fit 8GiB", "two budgets", "give one")),
            (("--fit", "8GiB", "--size", "9MiB"), ("--size 9MiB", "--fit 8GiB", "two budgets")),
            (
                ("--fit", "8GiB", "--size", "9MiB", "--bpw", "3"),
                ("--bpw 3", "--size 9MiB", "--fit 8GiB", "three budgets"),
            ),
            (("--bpw", "3", "--batch", "2"), ("--batch 2 needs --fit",)),
            (("--fit", "lots"), ("--fit lots is not a size", "3.5GB")),
            (("--fit", "8GiB", "--context", "4096"), ("--fit 8GiB --context 4096", "context is 2048 tokens")),
            (
                ("--fit", "200MiB", "--batch", "2"),
                ("--fit 200MiB --context 2048 --batch 2", "weights", "cache", "it fits in"),
            ),
        ],
    )
    def test_mistakes(self, moqa_command, measured, tmp_path, options, parts):
        both = (
            ("plan", measured.folder, "-o", tmp_path / "out"),
            ("quantize", MODEL, "--data", f"wiki={WIKI}", "-o", tmp_path / "out"),
        )
        for command in both:
            code, _, err = moqa_command(*command, *options)
            assert code == 2, err
            assert "Traceback" not in err
            assert all(part in err.splitlines()[-1] for part in parts), err
            assert list(tmp_path.iterdir()) == []

    def test_context_of_a_plan_needs_a_fit(self, moqa_command, measured, tmp_path):
        code, _, err = moqa_command(
            "plan", measured.folder, "--bpw", "3", "--context", "512", "-o", tmp_path / "plan.json"
        )
        assert (code, err) == (2, "moqa: --context 512 needs --fit: it belongs to a memory budget, e.g. --fit 8GiB\n")

    @pytest.mark.parametrize("option", [("--fit", "8GiB"), ("--batch", "2")])
    def test_a_plan_holds_its_budget(self, moqa_command, tmp_path, option):
        code, _, err = moqa_command(
            "quantize", MODEL, "--plan", tmp_path / "plan.json", *option, "-o", tmp_path / "out"
        )
        assert code == 2
        assert "already contains the texts and the budget" in err
        assert "--fit" in err

    def test_widths_that_cannot_be_stored(self, moqa_command, tmp_path):
        data = ("--data", f"wiki={WIKI}", "-o", tmp_path / "out")
        code, _, err = moqa_command("quantize", MODEL, "--fit", "8GiB", "--widths", "2,9", *data)
        assert (code, "--widths 2,9 cannot be planned" in err) == (2, True)

    def test_a_model_that_has_moved(self, moqa_command, measured, tmp_path):
        folder = tmp_path / "profile"
        folder.mkdir()
        for file in measured.folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        record = json.loads((folder / "profile.json").read_text())
        del record["checksum"]
        (folder / "profile.json").write_text(json.dumps(record | {"model": str(tmp_path / "gone")}))
        code, _, err = moqa_command("plan", folder, "--fit", "8GiB", "-o", tmp_path / "plan.json")
        assert code == 2
        assert err.startswith(f"moqa: --fit 8GiB needs the configuration of {tmp_path / 'gone'}")
        random_model("qwen3_moe").config.save_pretrained(tmp_path / "gone")
        code, _, err = moqa_command("plan", folder, "--fit", "8GiB", "-o", tmp_path / "plan.json")
        assert (code, "is not the model of" in err) == (2, True)


class TestFreeMemory:
    @pytest.fixture
    def system(self, tmp_path):
        def make(**files: str) -> Path:
            for name, text in {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n", **files}.items():
                path = tmp_path / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            return tmp_path

        return make

    def group(self, folder: str, limit: str, taken: int, idle: int) -> dict[str, str]:
        return {
            f"sys/fs/cgroup/{folder}memory.max": f"{limit}\n", f"sys/fs/cgroup/{folder}memory.current": f"{taken}\n",
            f"sys/fs/cgroup/{folder}memory.stat": f"anon 7\ninactive_file {idle}\nactive_file 5\n",
        }  # fmt: skip

    def test_is_the_machines(self, system):
        assert free_memory(system()) == 8000 * 1024

    def test_is_the_cgroups_if_that_is_less(self, system):
        root = system(**{"proc/self/cgroup": "0::/a/b\n", **self.group("a/b/", "5000000", 1000000, 200000)})
        assert free_memory(root) == 4200000

    def test_is_what_the_strictest_of_all_groups_leaves(self, system):
        groups = {**self.group("a/b/", "max", 1000000, 0), **self.group("a/", "3000000", 2000000, 0)}
        assert free_memory(system(**{"proc/self/cgroup": "0::/a/b\n", **groups})) == 1000000

    def test_is_that_at_the_top_in_a_container(self, system):
        root = system(**{"proc/self/cgroup": "0::/docker/123\n", **self.group("", "4000000", 1000000, 0)})
        assert free_memory(root) == 3000000

    def test_follows_the_first_version_of_cgroups_too(self, system):
        files = {
            "proc/self/cgroup": "5:cpu:/x\n4:memory:/job\n0::/\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "6000000\n",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "1000000\n",
            "sys/fs/cgroup/memory/job/memory.stat": "total_inactive_file 500000\n",
        }
        assert free_memory(system(**files)) == 5500000

    def test_a_system_that_does_not_say(self, tmp_path):
        with pytest.raises(MoqaError, match="shows no free memory"):
            free_memory(tmp_path)

    def test_the_gpu_counts_where_there_is_one(self, monkeypatch, system):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (123, 456))
        assert free_memory(system()) == 123

    def test_auto_says_what_it_found(self, monkeypatch):
        monkeypatch.setattr(sys.modules["moqa.planning.fit"], "free_memory", lambda: 3 * 2**30)
        found = memory_budget(MODEL, "auto", context=128)
        assert (found.memory, found.typed) == (3 * 2**30, "--fit auto (3072 MiB free) --context 128 --batch 1")


class TestServed:
    CONTEXT, BATCH, WRITTEN = 2048, 4, 4

    def test_a_process_stays_within_its_limit_and_uses_most_of_it(self, measured, tmp_path):
        """Most is 80 %: what the allocator keeps around buffers is allowed for at its worst."""
        model = ServedModel(MODEL)
        needs = model.needs(self.CONTEXT)
        rest = self.BATCH * needs.cache + needs.overhead(self.BATCH)
        limit = math.ceil((rest + smallest_plan(model.view, [3])) / 2**20)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        # the profile is only reused if windows have 256 tokens, not as many as a conversation
        command = [
            "quantize", MODEL, "--fit", f"{limit}MiB", "--context", self.CONTEXT, "--batch", self.BATCH, "--no-proof",
            "--data", f"wiki={WIKI}", "--samples", 2, "--self-samples", 1, "--method", "rtn", "-o", tmp_path / "out",
            "--profile", measured.folder,
        ]  # fmt: skip
        moqa = [sys.executable, "-m", "moqa"]
        done = subprocess.run([*moqa, *map(str, command)], capture_output=True, text=True, check=True, env=environment)
        assert f"{self.BATCH} x {self.CONTEXT} tokens" in done.stdout
        weights = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
        assert 0.97 * (limit * 2**20 - rest) < weights <= limit * 2**20 - rest
        peak = self.peak(
            [*moqa, "serve", str(tmp_path / "out"), "--port", "0", "--slots", str(self.BATCH)], environment
        )
        assert 0.8 * limit * 2**20 < peak <= limit * 2**20

    def peak(self, command: list[str], environment: dict[str, str]) -> int:
        """Most resident bytes of a server whose slots have all been full at once."""
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as server:
            try:
                url = next(found[0] for line in server.stderr if (found := re.search(r"http://[\d.]+:\d+/v1", line)))
                with ThreadPoolExecutor(self.BATCH) as clients:
                    usages = list(clients.map(lambda seed: self.ask(url, seed), range(self.BATCH)))
                assert {usage["prompt_tokens"] for usage in usages} == {self.CONTEXT - self.WRITTEN}
                status = Path(f"/proc/{server.pid}/status").read_text()
                return int(status.split("VmHWM:")[1].split()[0]) * 1024
            finally:
                server.terminate()

    def ask(self, url: str, seed: int) -> dict:
        ids = torch.randint(2, 8192, (self.CONTEXT - self.WRITTEN,), generator=torch.Generator().manual_seed(seed))
        body = {"prompt": ids.tolist(), "max_tokens": self.WRITTEN, "seed": seed}
        return httpx.post(f"{url}/completions", json=body, timeout=600).raise_for_status().json()["usage"]
