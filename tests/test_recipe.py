import json
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "recipes"))

import corpus as collecting  # noqa: E402 - the recipes are scripts, not a package
import reference_model as reference  # noqa: E402
import train_reference as training  # noqa: E402

TINY = reference.Recipe(
    steps=8,
    batch_tokens=512,
    contexts=(64, 128),
    vocab_size=512,
    peak_rate=5e-3,
    warmup_steps=2,
    hidden_size=64,
    layers=2,
    experts=4,
    expert_size=32,
)


class StopTrainingError(Exception):
    pass


@pytest.fixture(scope="module")
def tiny_corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for name in training.MIX:
        text = (ROOT / "reference" / "text" / f"{name}.calib.txt").read_text()
        (folder / f"{name}.train.txt").write_text(text[:20_000])
        (folder / f"{name}.test.txt").write_text(text[20_000:22_000])
    return folder


@pytest.fixture(scope="module")
def trained(tiny_corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "model"
    losses = []
    scores = training.train(tiny_corpus, out, TINY, on_step=lambda step, loss, progress: losses.append(loss))
    return out, losses, scores


class TestTraining:
    def test_lowers_the_loss(self, trained):
        _, losses, _ = trained
        assert len(losses) == TINY.steps
        assert losses[-1] < losses[0]

    def test_scores_every_source_below_uniform_bytes(self, trained):
        _, _, scores = trained
        assert scores.keys() == training.MIX.keys()
        assert all(0 < bits < 8 for bits in scores.values())

    def test_writes_a_folder_that_transformers_loads(self, trained):
        out, _, scores = trained
        model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
        assert model.dtype == torch.bfloat16
        assert len(tokenizer) == TINY.vocab_size
        text = "for x in range(10): print('Grüße')\n"
        assert tokenizer.decode(tokenizer(text).input_ids) == text
        assert json.loads((out / "training.json").read_text())["held_out_bits_per_byte"] == scores
        assert not (out / "checkpoint.pt").exists()

    def test_gives_the_same_weights_for_the_same_seed_after_an_interruption(self, trained, tiny_corpus, tmp_path):
        def interrupt(step, loss, progress):
            if step == 5:
                raise StopTrainingError

        steps = []
        with pytest.raises(StopTrainingError):
            training.train(tiny_corpus, tmp_path, TINY, checkpoint_minutes=0, on_step=interrupt)
        training.train(tiny_corpus, tmp_path, TINY, on_step=lambda step, loss, progress: steps.append(step))
        assert steps == [6, 7, 8]
        assert_same_files(tmp_path, trained[0])

    def test_gives_the_same_weights_for_the_same_seed(self, trained, tiny_corpus, tmp_path):
        training.train(tiny_corpus, tmp_path, TINY)
        assert_same_files(tmp_path, trained[0])

    def test_refuses_a_checkpoint_of_another_recipe(self, tiny_corpus, tmp_path):
        def interrupt(step, loss, progress):
            raise StopTrainingError

        with pytest.raises(StopTrainingError):
            training.train(tiny_corpus, tmp_path, TINY, checkpoint_minutes=0, on_step=interrupt)
        other = reference.Recipe(**{**vars(TINY), "seed": 1})
        with pytest.raises(training.RecipeError, match="another recipe"):
            training.train(tiny_corpus, tmp_path, other)

    def test_refuses_to_overwrite_a_model(self, trained, tiny_corpus):
        with pytest.raises(training.RecipeError, match="already holds"):
            training.train(tiny_corpus, trained[0], TINY)

    def test_names_a_missing_split(self, tmp_path):
        with pytest.raises(training.RecipeError, match=r"wiki\.train\.txt is missing"):
            training.train(tmp_path, tmp_path / "out", TINY)


def assert_same_files(one: Path, other: Path) -> None:
    ours, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (one / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()


def test_the_default_config_is_the_reference_models():
    shipped = AutoConfig.from_pretrained(ROOT / "reference" / "model").to_dict()
    ours = reference.model_config(reference.Recipe()).to_dict()
    compared = shipped.keys() - {"architectures", "dtype", "_name_or_path"}  # these are set on saving and loading
    assert {key: ours.get(key) for key in compared} == {key: shipped[key] for key in compared}


def test_the_rate_warms_up_stays_and_falls_to_2_percent():
    recipe = reference.Recipe()
    assert training.learning_rate(recipe, 0, 0.0) == pytest.approx(recipe.peak_rate / 60)
    assert training.learning_rate(recipe, 100, 0.29) == recipe.peak_rate
    assert training.learning_rate(recipe, 100, 1.0) == pytest.approx(0.02 * recipe.peak_rate)


def test_an_even_router_has_a_balance_loss_of_one():
    logits = 10 * torch.eye(4).repeat(8, 1)
    z_loss = logits.logsumexp(dim=-1).square().mean()
    assert reference.router_loss(logits, top_k=1).item() == pytest.approx(0.01 + 1e-4 * z_loss.item(), rel=1e-4)


class TestSortedExperts:
    @pytest.fixture
    def results(self):
        """Implementation -> output and gradients, with one expert that no token reaches."""
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(reference.model_config(TINY))
        experts = model.model.layers[0].mlp.experts
        hidden = torch.randn(40, TINY.hidden_size)
        routed = torch.stack([torch.randperm(TINY.experts - 1)[:2] for _ in range(40)])
        gates = torch.rand(40, 2)
        results = {}
        for implementation in ("eager", "sorted"):
            model.set_experts_implementation(implementation)
            inputs = [hidden.clone().requires_grad_(), gates.clone().requires_grad_()]
            output = experts(inputs[0], routed, inputs[1])
            wanted = [*inputs, experts.gate_up_proj, experts.down_proj]
            results[implementation] = [output, *torch.autograd.grad(output.square().sum(), wanted)]
        return results

    def test_equal_eager_forward_and_in_gradients(self, results):
        for ours, eager in zip(results["sorted"], results["eager"], strict=True):
            torch.testing.assert_close(ours, eager)

    def test_give_an_expert_without_tokens_a_zero_gradient(self, results):
        assert results["sorted"][-1][-1].abs().max() == 0


def test_chunked_loss_equals_the_models_own(monkeypatch):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(reference.model_config(TINY))
    tokens = torch.randint(TINY.vocab_size, (4, 33))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(input_ids=tokens[:, :-1], labels=tokens, shift_labels=tokens[:, 1:].contiguous()).loss
    gradients = []
    for chunk in (1_024, 24):
        monkeypatch.setattr(reference, "CHUNK", chunk)
        model.zero_grad()
        assert reference.backward(model, tokens) == pytest.approx(expected.item(), rel=1e-3)
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for whole, chunked in zip(*gradients, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=0.02, atol=1e-3)


class TestCorpus:
    def test_chunks_are_shared_out_whole_and_once(self, monkeypatch):
        monkeypatch.setattr(collecting, "CHUNK", 10)
        monkeypatch.setattr(collecting, "CALIB", 100)
        monkeypatch.setattr(collecting, "TEST", 50)
        text = "".join(f"{number:09d}." for number in range(40)) + "tail"
        splits = collecting.cut_chunks([text], seed=0)
        parts = {split: part.split("\n\n") for split, part in splits.items()}
        assert sorted(chain(*parts.values())) == sorted(text[start : start + 10] for start in range(0, 404, 10))
        assert sum(map(len, parts["calib"])) >= 100
        assert sum(map(len, parts["test"])) >= 50
        assert collecting.cut_chunks([text], seed=0) == splits != collecting.cut_chunks([text], seed=1)

    def test_translations_share_a_split(self, monkeypatch, tmp_path):
        def npm_files(package, folder):
            pairs = [[[f"{package} {number}", "hash"] for number in range(start, start + 10)] for start in (0, 10)]
            return {f"package/builds/doc-{index}.json": json.dumps(part).encode() for index, part in enumerate(pairs)}

        monkeypatch.setattr(collecting, "npm_files", npm_files)
        monkeypatch.setattr(collecting, "CALIB_SENTENCES", 5)
        monkeypatch.setattr(collecting, "TEST_SENTENCES", 5)
        german, french = collecting.sentences("de", tmp_path, 0), collecting.sentences("fr", tmp_path, 0)
        assert {split: text.replace("de", "fr") for split, text in german.items()} == french

    def test_a_failing_client_is_named_in_one_line(self, tmp_path):
        command = [sys.executable, "-c", "import sys; sys.exit('ERROR: nothing of that name')"]
        with pytest.raises(
            collecting.CorpusError, match=r"package left-pad: `.*` failed: nothing of that name"
        ) as error:
            collecting.run("left-pad", *command, cwd=tmp_path)
        assert "\n" not in str(error.value)
        with pytest.raises(collecting.CorpusError, match="`no-such-client` is not installed"):
            collecting.run("left-pad", "no-such-client", cwd=tmp_path)

    def test_complete_sources_are_kept(self, monkeypatch, tmp_path, capsys):
        def python(folder, seed):
            return {"calib": "c", "test": "t", "train": str(seed)}

        monkeypatch.setattr(collecting, "SOURCES", (python,))
        collecting.collect(tmp_path, ["python"], seed=1)
        collecting.collect(tmp_path, ["python"], seed=2)
        assert (tmp_path / "python.train.txt").read_text() == "1"
        assert "python" in capsys.readouterr().out
