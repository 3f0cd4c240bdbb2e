"""Everything that moqa writes, as jobs on a tiny model: what lies there before, and what is run."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

REFERENCE = Path(__file__).parents[2] / "reference"
FEW = {"samples": 4, "context": 32, "self_samples": 2}


@dataclasses.dataclass(frozen=True)
class Job:
    """A job that leaves its output in a folder.

    Attributes:
        name: of the job.
        run: called with the folder.
        before: puts there what the job replaces.
        later: name of a file that is added once a folder is in place.
    """

    name: str
    run: Callable[[Path], object]
    before: Callable[[Path], object] = lambda place: None
    later: str = ""


def texts() -> dict:
    """Two short texts by name."""
    from moqa.data import Distribution

    found = {}
    for name in ("wiki", "novels"):
        text = (REFERENCE / "text" / f"{name}.calib.txt").read_text(encoding="utf-8")[:20_000]
        found[name] = Distribution(name, (text,), name)
    return found


def prepare(inputs: Path) -> None:
    """Make a random model, its profile and plans, a checkpoint, and an adjustment."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    import moqa
    from moqa.planning import for_file
    from moqa.storage.artifact import write_json

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=8192, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2,
        tie_word_embeddings=True, initializer_range=0.1, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = inputs / "model"
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(REFERENCE / "model" / name, model / name)
    profile = moqa.profile(model, [texts()["wiki"]], inputs / "profile", **FEW)
    for width in (2, 3):
        plan = moqa.plan(profile, strategy="uniform", widths=(width,))
        write_json(for_file(plan, inputs / f"plan{width}.json"), inputs / f"plan{width}.json")
        moqa.quantize(model, plan, inputs / f"checkpoint{width}", method="rtn", profile=profile, cache="full")
    moqa.adjust(inputs / "checkpoint3", [texts()["novels"]], inputs / "adjustment", samples=8, budget="20%")


def JOBS(inputs: Path) -> dict[str, Job]:  # noqa: N802
    """All jobs by name, with what `prepare` has made."""

    def quantize(place: Path, width: int = 3, **options) -> None:
        import moqa

        plan, profile = moqa.read_plan(inputs / f"plan{width}.json"), moqa.read_profile(inputs / "profile")
        moqa.quantize(inputs / "model", plan, place / "out", profile=profile, **options)

    def profile(place: Path, *names: str) -> None:
        import moqa

        moqa.profile(inputs / "model", [texts()[name] for name in names], place / "out", **FEW)

    def adjust(place: Path, **options) -> None:
        import moqa

        data = [texts()["novels"]]
        moqa.adjust(inputs / "checkpoint3", data, place / "out", samples=8, budget="20%", **options)

    def compress(place: Path) -> None:
        import moqa

        options = moqa.CompressOptions(strategy="uniform", widths=(3,), profile=inputs / "profile", proof=False, **FEW)
        moqa.compress(inputs / "model", [texts()["wiki"]], None, place / "out", options=options)

    def plan(place: Path) -> None:
        import moqa
        from moqa.storage.artifact import write_json

        write_json(moqa.read_plan(inputs / "plan3.json"), place / "plan.json")

    def report(place: Path) -> None:
        import moqa

        moqa.report([inputs / "plan3.json", inputs / "profile"], place / "report.html")

    def copied(name: str, target: str = "out") -> Callable[[Path], object]:
        source = inputs / name
        return lambda place: (shutil.copytree if source.is_dir() else shutil.copyfile)(source, place / target)

    made = [
        Job("quantize-gptq", lambda place: quantize(place, method="gptq", cache="20%")),
        Job("quantize-rtn", lambda place: quantize(place, method="rtn", cache="full")),
        Job("quantize-again", lambda place: quantize(place, method="rtn", overwrite=True), copied("checkpoint2")),
        Job("profile", lambda place: profile(place, "wiki")),
        Job("profile-more", lambda place: profile(place, "wiki", "novels"), copied("profile")),
        Job("compress", compress, later="plan.json"),
        Job("adjust", adjust),
        Job("adjust-again", lambda place: adjust(place, mode="fp16", overwrite=True), copied("adjustment")),
        Job("plan", plan, copied("plan2.json", "plan.json")),
        Job("report", report, lambda place: (place / "report.html").write_text(json.dumps("an earlier page"))),
    ]
    return {job.name: job for job in made}
