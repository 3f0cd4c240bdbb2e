"""Shared fixtures: synthetic profiles and checkpoints in memory, a tiny random model, and the reference model."""

import io
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from long_work import SMALL

from moqa.adjustment import adjust
from moqa.cli.main import main
from moqa.format.layout import shards
from moqa.format.manifest import MANIFEST, Fitted, Manifest, StoredTensor, StoredUnit
from moqa.format.planes import pack
from moqa.format.scheme import Scheme
from moqa.format.tiles import WIDTHS
from moqa.format.writer import write_manifest, write_shard
from moqa.kernels import KERNELS, native
from moqa.methods import METHODS
from moqa.methods.grid import fit_grid
from moqa.mixture import build_mixture
from moqa.planning import plan
from moqa.profiling import SELF, Profile, ProfileRecord, UnitRecord, profile
from moqa.profiling.record import DistributionRecord, Settings
from moqa.progress import quiet
from moqa.quantization import quantize

REFERENCE = Path(__file__).parents[1] / "reference"

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# a shared machine may stall any single example, and what makes them
settings.register_profile("moqa", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("moqa")


@pytest.fixture(autouse=True)
def threads_as_before():
    """Threads are the whole process's: a command that a test runs here (`--threads`) sets them for all that follow."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread():
    """For products so small that they are slower on several; the kernels' path is as before at the end, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if KERNELS["native"].unusable(torch.device("cpu")) is None:
        native.use_path(native.paths()[0])


def make_profile(folder: Path, moe: bool = True) -> Profile:
    """A profile of 3 layers x 8 experts (or of a dense model) with plausible random statistics."""
    generator = torch.Generator().manual_seed(7)
    units, experts, hidden, inner = [], 8, 100, 48
    for layer in range(3):
        path = f"model.layers.{layer}"

        def add(name, role, shape, expert=None, layer=layer, path=path):
            projection = name.split(".")[-1]
            full = f"{path}.{name}"
            units.append(
                UnitRecord(name=full, layer=layer, role=role, projection=projection, expert=expert, shape=shape)
            )

        for name, shape in {"q_proj": (64, hidden), "k_proj": (32, hidden), "o_proj": (hidden, 64)}.items():
            add(f"self_attn.{name}", "attention", shape)
        for expert in range(experts if moe else 0):
            for name, shape in {"gate_proj": (inner, hidden), "up_proj": (inner, hidden)}.items():
                add(f"mlp.experts.{expert}.{name}", "expert", shape, expert)
            add(f"mlp.experts.{expert}.down_proj", "expert", (hidden, inner), expert)
        path = "shared_expert." if moe else ""
        for name, shape in {"gate_proj": (48, hidden), "up_proj": (48, hidden), "down_proj": (hidden, 48)}.items():
            add(f"mlp.{path}{name}", "shared" if moe else "mlp", shape)
    decay = 4.0 ** -torch.tensor(WIDTHS, dtype=torch.float32)
    jitter = 0.8 + 0.4 * torch.rand(len(units), len(WIDTHS), generator=generator)
    statistics = {}
    for name in ("wiki", "novels", SELF):
        tensors = {"samples": torch.randint(50, (4, 16), generator=generator, dtype=torch.int32)}
        load = torch.rand(3, experts, generator=generator).pow(3) + 0.01
        for layer in range(3 if moe else 0):
            share = load[layer] / load[layer].sum()
            tensors[f"layer.{layer}.tokens"] = (share * 128).round().long()
            tensors[f"layer.{layer}.gate_mass"] = share * 64
            tensors[f"layer.{layer}.channel"] = share[:, None] * torch.rand(experts, inner, generator=generator)
            tensors[f"layer.{layer}.coactivation"] = torch.diag((share * 128).round())
        heat = torch.tensor([1.0 if u.expert is None else float(load[u.layer, u.expert]) for u in units])
        tensors["sensitivity"] = (heat * torch.rand(len(units), generator=generator))[:, None] * decay * jitter
        # what strategies measure on the original, which this profile does not have
        tensors["divergence"] = torch.rand(len(units), generator=generator)[:, None] * decay
        tensors["similarity"] = torch.rand(3, 2, generator=generator)
        statistics[name] = tensors
    weights = {"rounding": decay * jitter, "outliers": 1 + torch.rand(len(units), generator=generator)}
    weights["spectrum"] = 2 + torch.rand(len(units), 2, generator=generator)
    for layer in range(3 if moe else 0):
        mixed = torch.nn.functional.normalize(torch.randn(experts, 6, generator=generator))
        weights[f"layer.{layer}.similarity"] = mixed @ mixed.T
    kept = {"model.embed_tokens.weight": ("bfloat16", (50, hidden)), "model.norm.weight": ("float32", (hidden,))}
    record = ProfileRecord(
        moqa="0", model="tiny", model_type="tiny_moe" if moe else "tiny_dense", fingerprint="f" * 64, kept=kept,
        layers=3, top_k=2 if moe else 0, settings=Settings(context=16, samples=4), widths=WIDTHS, units=tuple(units),
        distributions={
            name: DistributionRecord(
                origin=name, samples=4, tokens=64, fitted=None if name == SELF else Fitted(digest=name, shingles="")
            )
            for name in statistics
        },
    )  # fmt: skip
    return Profile(record, folder, statistics, weights)


@pytest.fixture(scope="session")
def tiny_profile(tmp_path_factory) -> Profile:
    return make_profile(tmp_path_factory.mktemp("profiles") / "moe")


@pytest.fixture(scope="session")
def dense_profile(tmp_path_factory) -> Profile:
    return make_profile(tmp_path_factory.mktemp("profiles") / "dense", moe=False)


# every width class, a row shorter than a block and one that ends in the middle of a group
CHECKPOINT_UNITS = {
    "model.layers.0.q_proj": (0, (24, 40), Scheme(width=3)),
    "model.layers.0.down_proj": (0, (16, 100), Scheme(width=2, group_size=32)),
    "model.layers.1.q_proj": (1, (16, 64), Scheme(width=8, symmetric=True, scale_dtype="float16")),
    "model.layers.1.down_proj": (1, (16, 48), Scheme(width=16)),
}


# rows that end within a tile, groups of both sizes, and integers beside codes
CODED_UNITS = {
    "model.layers.0.q_proj": (0, (40, 40), Scheme(width=2, encoding="trellis")),
    "model.layers.0.down_proj": (0, (24, 100), Scheme(width=4, encoding="table", scale_dtype="float16")),
    "model.layers.1.q_proj": (1, (16, 64), Scheme(width=3, encoding="trellis", group_size=32)),
    "model.layers.1.down_proj": (1, (16, 48), Scheme(width=3)),
}


def stored_tensors(name: str, weight: torch.Tensor, scheme: Scheme) -> dict[str, torch.Tensor]:
    """What a unit rounded to nearest is stored as."""
    if scheme.is_unquantized:
        return {f"{name}.weight": weight.bfloat16()}
    if scheme.is_coded:
        found = METHODS["rtn"].store(weight, scheme)
    else:
        grid = fit_grid(weight, scheme).grid
        found = grid.stored(pack(grid.encode(weight), scheme.width))
    return {f"{name}.{suffix}": tensor for suffix, tensor in found.items()}


def make_checkpoint(folder: Path, units: dict[str, tuple] = CHECKPOINT_UNITS) -> Path:
    """A small sound checkpoint, without any model around it."""
    folder.mkdir(parents=True)
    torch.manual_seed(3)
    # some routers own a parameter called scale, which is no quantization scale and may be negative
    tensors = {
        "model.embed.weight": torch.randn(10, 40).bfloat16(),
        "model.norm.weight": torch.randn(40),
        "model.router.scale": torch.tensor([-1.0, 2.0]),
    }
    kept = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    for name, (_, shape, scheme) in units.items():
        tensors |= stored_tensors(name, torch.randn(shape), scheme)
    files = {
        shard.file: write_shard(folder, shard, {name: tensors[name] for name in shard.entries})
        for shard in shards(kept, 2, units)
    }
    manifest = Manifest(
        format=1 + any(scheme.is_coded for _, _, scheme in units.values()),
        moqa="0", model="tiny", model_type="tiny", fingerprint="f" * 64, layers=2, strategy="uniform",
        options={"seed": 0}, ties="unit", budget="--bpw 3", method="rtn", seed=0, mixture={"wiki": 1.0}, fitted={},
        units={
            name: StoredUnit(layer=layer, role="attention", shape=shape, scheme=scheme, method="rtn", error=None)
            for name, (layer, shape, scheme) in units.items()
        },
        kept={
            name: StoredTensor(dtype=str(dtype).removeprefix("torch."), shape=shape)
            for name, (dtype, shape) in kept.items()
        },
        files=files,
    )  # fmt: skip
    write_manifest(manifest, folder / MANIFEST)
    return folder


@pytest.fixture(scope="session")
def sound_checkpoint(tmp_path_factory) -> Path:
    """Do not change it; `checkpoint` is a copy that may be."""
    return make_checkpoint(tmp_path_factory.mktemp("sound") / "checkpoint")


@pytest.fixture(scope="session")
def coded_checkpoint(tmp_path_factory) -> Path:
    """One of format 2; do not change it."""
    return make_checkpoint(tmp_path_factory.mktemp("coded") / "checkpoint", CODED_UNITS)


@pytest.fixture
def checkpoint(sound_checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(sound_checkpoint, tmp_path / "checkpoint"))


def make_tiny_model(folder: Path, inner: int = 40) -> Path:
    """Folder of a random two-layer MoE with odd shapes and the reference model's tokenizer."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=8192, hidden_size=72, intermediate_size=96, moe_intermediate_size=inner, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=6, num_experts_per_tok=2,
        norm_topk_prob=True, tie_word_embeddings=True, initializer_range=0.1, bos_token_id=None, eos_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(REFERENCE / "model" / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def texts():
    return read_texts()


def read_texts():
    """Calibration texts of the reference model by name, cut short."""
    from moqa.data import Distribution

    def read(name: str) -> Distribution:
        text = (REFERENCE / "text" / f"{name}.calib.txt").read_text(encoding="utf-8")[:20_000]
        return Distribution(name, (text,), f"{name}.calib.txt")

    return {name: read(name) for name in ("wiki", "novels", "python")}


@pytest.fixture(scope="session")
def sharded(tiny_model, tmp_path_factory):
    """The tiny model as transformers shards it; do not change it."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("sharded") / "model"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype="auto").save_pretrained(folder, max_shard_size="100KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_model / name, folder / name)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture(scope="session")
def sharded_profile(sharded, texts, tmp_path_factory):
    return profile(sharded, [texts["wiki"]], tmp_path_factory.mktemp("profile") / "tiny", **SMALL)


@pytest.fixture(scope="session")
def sharded_plan(sharded_profile):
    return plan(sharded_profile, strategy="uniform", widths=(3,))


@pytest.fixture(scope="session")
def made(tiny_model, texts, tmp_path_factory):
    """A checkpoint with a cache, known on wiki, and two adjustments; less of a random model would change too little."""
    folder = tmp_path_factory.mktemp("adjusted")
    measured = profile(tiny_model, [texts["wiki"]], folder / "profile", samples=4, context=32, self_samples=1)
    out = quantize(
        tiny_model, plan(measured, None, strategy="uniform", widths=(2,)), folder / "out", method="rtn",
        profile=measured, cache="full",
    )  # fmt: skip
    for name in ("python", "novels"):
        adjust(out, [texts[name]], folder / name, samples=8, budget="30%")
    return out, [folder / "python", folder / "novels"]


VARIANTS = """
base: {known: [wiki], widths: [2], strategy: uniform, method: rtn}
python: {adjustment: python, bytes: 30%, samples: 8}
novels: {adjustment: novels, bytes: 30%, samples: 8}
wide: {widths: [4], strategy: uniform, method: rtn}
"""


@pytest.fixture(scope="session")
def mix(tiny_model, texts, tmp_path_factory):
    """A mixture of two checkpoints and two adjustments; do not change it."""
    folder = tmp_path_factory.mktemp("mixture")
    (folder / "variants.yaml").write_text(VARIANTS)
    return build_mixture(
        tiny_model, list(texts.values()), folder / "mix", variants=folder / "variants.yaml", router="linear", samples=8,
        profile_samples=4,
    ).folder  # fmt: skip


@pytest.fixture
def out(tmp_path):
    """A name in a folder of its own, so that nothing but the run leaves anything there."""
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs" / "out"


@pytest.fixture(params=["profile", "quantize"])
def work(request, sharded_plan, sharded_profile, texts):
    """Either kind of long work: called with a model, an output and a listener."""

    def run(model, out, report=quiet):
        if request.param == "profile":
            profile(model, [texts["wiki"]], out, report=report, **SMALL)
        else:
            quantize(model, sharded_plan, out, profile=sharded_profile, report=report)

    return run


@pytest.fixture
def moqa_command(monkeypatch, capfd):
    """Run a command in this process: exit code, stdout, stderr."""

    def run(*args, stdin=""):
        typed = io.BytesIO(stdin if isinstance(stdin, bytes) else stdin.encode())
        capfd.readouterr()
        code = 0
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["moqa", *map(str, args)])
            patch.setattr(sys, "stdin", io.TextIOWrapper(typed, encoding="utf-8"))
            try:
                main()
            except SystemExit as stop:
                code = stop.code or 0
        return code, *capfd.readouterr()

    return run


@pytest.fixture(scope="module")
def tiny(tiny_model):
    """The tiny model and its tokenizer."""
    from moqa.generation import load_any

    return load_any(tiny_model)


@pytest.fixture(scope="module")
def url(tiny):
    """The address of a server of the tiny model."""
    from serving import running

    with running(tiny) as address:
        yield address


@pytest.fixture(scope="module")
def http(url):
    import httpx
    from serving import PATIENCE

    with httpx.Client(base_url=url, timeout=PATIENCE) as client:
        yield client


@pytest.fixture(scope="module")
def client(url):
    import openai

    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as found:
        yield found
