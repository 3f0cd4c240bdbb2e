"""The report: numbers of drift, the verdict, and a page that stands alone."""

import html
import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import pad

from moqa.errors import MoqaError
from moqa.evaluation import Evaluation, Quality
from moqa.evaluation.proof import Proof, interpolated
from moqa.format.manifest import Fitted, Manifest, StoredFile, StoredTensor, StoredUnit
from moqa.planning import Budget, Plan, for_file, plan
from moqa.planning.strategies.budget import default_hedge
from moqa.profiling.record import DistributionRecord, ProfileRecord, Settings, UnitRecord
from moqa.profiling.store import Profile, write_profile
from moqa.reports import drift, report
from moqa.reports.gather import Artifacts, gather
from moqa.reports.page import render
from moqa.reports.rows import best, make_rows, size_groups
from moqa.reports.verdict import Verdict, comparisons, verdict
from moqa.storage.artifact import write_json

FINGERPRINT = "f" * 64
USUAL = default_hedge(3.43)
SECTIONS = ("quality", "size", "significance", "bits", "activation", "bytes", "provenance")


def make_profile(
    folder: Path, channels: dict[str, list[list[list[float]]]], tokens: dict[str, list[list[int]]] | None = None
) -> Profile:
    """A profile of layers x experts x channels of significance per distribution."""
    layers, experts, _ = torch.tensor(next(iter(channels.values()))).shape
    units = [
        UnitRecord(name=f"model.layers.{n}.self_attn.{p}", layer=n, role="attention", projection=p, expert=None,
                   shape=(64, 64))
        for n in range(layers) for p in ("q_proj", "o_proj")
    ] + [
        UnitRecord(name=f"model.layers.{n}.mlp.experts.{e}.{p}", layer=n, role="expert", projection=p, expert=e,
                   shape=(64, 64))
        for n in range(layers) for e in range(experts) for p in ("gate_proj", "up_proj", "down_proj")
    ]  # fmt: skip
    widths = (1, 2, 3, 4, 5, 6, 7, 8)
    statistics = {}
    for name, values in channels.items():
        table = torch.tensor([2.0**-w for w in widths]).repeat(len(units), 1)
        statistics[name] = {"sensitivity": table, "samples": torch.zeros(1, 8, dtype=torch.int32)}
        for n in range(layers):
            counts = torch.tensor(tokens[name][n]) if tokens else torch.full((experts,), 4)
            statistics[name] |= {
                f"layer.{n}.channel": torch.tensor(values[n]),
                f"layer.{n}.tokens": counts,
                f"layer.{n}.gate_mass": counts.float(),
                f"layer.{n}.coactivation": torch.diag(counts.float()) + 1,
            }
    weights = {"rounding": torch.ones(len(units), len(widths))}
    weights |= {f"layer.{n}.similarity": torch.eye(experts) for n in range(layers)}
    record = ProfileRecord(
        moqa="0.1.0", model="models/tiny", model_type="qwen3_moe", fingerprint=FINGERPRINT,
        kept={"model.embed_tokens.weight": ("bfloat16", (32, 64))}, layers=layers, top_k=2,
        settings=Settings(context=8, samples=1), widths=widths, units=tuple(units),
        distributions={
            name: DistributionRecord(origin=f"{name}.txt", samples=1, tokens=8, fitted=None) for name in channels
        },
    )  # fmt: skip
    return Profile(record, folder, statistics, weights)


def store(profile: Profile) -> None:
    """Write a profile, with as many channels as its units have: those that are not given carry nothing."""
    filled = {
        name: {key: pad(one, (0, 64 - one.shape[1])) if key.endswith(".channel") else one for key, one in each.items()}
        for name, each in profile.statistics.items()
    }
    write_profile(Profile(profile.record, profile.folder, filled, profile.weights))


def evaluation(
    strategy: str | None, size: int, known: float, novel: float, method: str = "gptq", hedge: float | None = None
) -> Evaluation:
    scores = {"wiki": known, "python": novel}
    return Evaluation(
        model=f"runs/{strategy}", against="models/tiny", strategy=strategy, method=method if strategy else None,
        hedge=hedge, fitted_on=("wiki",) if strategy else (), bytes=size, bits_per_weight=3.43,
        model_bits_per_weight=4.7, context=256,
        distributions={
            name: Quality(perplexity=20 + kl, bits_per_byte=1, kl_divergence=kl, top1_agreement=0.9, tokens=100)
            for name, kl in scores.items()
        },
    )  # fmt: skip


def judge(*evaluations: Evaluation) -> Verdict:
    return verdict(make_rows(Artifacts(evaluations=list(evaluations))))


@pytest.fixture
def two(tmp_path: Path) -> Profile:
    """Two layers, two experts, two channels; in layer 1 the experts swap their significance."""
    channels = {
        "wiki": [[[3.0, 3.0], [1.0, 1.0]], [[3.0, 3.0], [1.0, 1.0]]],
        "novels": [[[3.0, 3.0], [1.0, 1.0]], [[1.0, 1.0], [3.0, 3.0]]],
    }
    tokens = {"wiki": [[8, 8], [8, 8]], "novels": [[8, 8], [16, 0]]}
    return make_profile(tmp_path / "profile", channels, tokens)


class TestDrift:
    def test_pairs_end_with_the_models_own_text(self, tmp_path: Path):
        profile = make_profile(tmp_path, {name: [[[1.0], [2.0]]] for name in ("a", "self", "z")})
        assert drift.pairs(profile) == [("a", "z"), ("a", "self"), ("z", "self")]

    def test_rank_correlation_is_one_with_itself_and_minus_one_when_reversed(self, two: Profile):
        assert drift.rank_correlation(two, "wiki", "wiki") == pytest.approx(1)
        assert drift.layer_rank_correlations(two, "wiki", "novels") == pytest.approx([1, -1])
        assert drift.rank_correlation(two, "wiki", "novels") == pytest.approx(0)

    def test_rank_correlation_does_not_depend_on_the_scale(self, tmp_path: Path):
        channels = {"a": [[[1.0], [2.0], [3.0], [4.0]]], "b": [[[1.0], [20.0], [30.0], [25.0]]]}
        assert drift.rank_correlation(make_profile(tmp_path, channels), "a", "b") == pytest.approx(0.8)

    def test_rank_correlation_of_equal_experts_is_undefined(self, tmp_path: Path):
        profile = make_profile(tmp_path, {"a": [[[1.0], [1.0]]], "b": [[[1.0], [2.0]]]})
        assert math.isnan(drift.rank_correlation(profile, "a", "b"))

    def test_concentration_on_numbers_made_by_hand(self, tmp_path: Path):
        # layer sums are 10, so drift per channel is 0.4, 0.3, 0.1, 0
        channels = {"a": [[[5.0, 4.0], [1.0, 0.0]]], "b": [[[1.0, 7.0], [2.0, 0.0]]]}
        profile = make_profile(tmp_path, channels)
        assert drift.channel_drift(profile, "a", "b") == pytest.approx([0.4, 0.3, 0.1, 0], abs=1e-7)
        held = drift.drift_concentration(profile, "a", "b", shares=(0.25, 0.5, 1.0))
        assert held == pytest.approx({0.25: 0.5, 0.5: 0.875, 1.0: 1})
        own = drift.significance_concentration(profile, "a", "b", shares=(0.25, 0.5))
        assert own == pytest.approx({0.25: 0.55, 0.5: 0.85})
        assert drift.drift_of_significant(profile, "a", "b", shares=(0.25,)) == pytest.approx({0.25: 0.5})
        assert drift.drift_of_significant(profile, "b", "a", shares=(0.25,)) == pytest.approx({0.25: 0.375})

    def test_names_the_experts_and_channels_that_change_most(self, tmp_path: Path):
        channels = {"a": [[[5.0, 4.0], [1.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]],
                    "b": [[[1.0, 7.0], [2.0, 0.0]], [[1.0, 1.0], [1.0, 5.0]]]}  # fmt: skip
        profile = make_profile(tmp_path, channels)
        assert drift.expert_changes(profile, "a", "b")[0] == (1, 0, pytest.approx(-0.25))
        assert len(drift.expert_changes(profile, "a", "b")) == 4
        found = drift.channel_changes(profile, "a", "b", 3)
        assert found[0] == (0, 0, 0, pytest.approx(-0.4))
        assert found[1] == (1, 1, 1, pytest.approx(0.375))
        assert found[2] == (0, 0, 1, pytest.approx(0.3))

    def test_concentration_does_not_depend_on_how_much_was_measured(self, tmp_path: Path):
        few = {"a": [[[5.0, 4.0], [1.0, 0.0]]], "b": [[[1.0, 7.0], [2.0, 0.0]]]}
        many = few | {"b": [[[100.0, 700.0], [200.0, 0.0]]]}
        one, other = (make_profile(tmp_path, channels) for channels in (few, many))
        assert drift.drift_concentration(one, "a", "b") == pytest.approx(drift.drift_concentration(other, "a", "b"))

    def test_at_least_one_channel_is_counted(self, two: Profile):
        assert drift.drift_concentration(two, "wiki", "novels")[0.01] == pytest.approx(0.25)

    def test_no_drift_has_no_concentration(self, two: Profile):
        assert all(math.isnan(share) for share in drift.drift_concentration(two, "wiki", "wiki").values())

    def test_routing_divergence_by_layer(self, two: Profile):
        # layer 1: (1/2, 1/2) against (1, 0), middle (3/4, 1/4)
        expected = (0.5 * math.log2(2 / 3) + 0.5 * math.log2(2) + math.log2(4 / 3)) / 2
        assert drift.routing_divergence(two, "wiki", "novels") == pytest.approx([0, expected])

    def test_routing_divergence_of_nothing_in_common_is_one_bit(self, tmp_path: Path):
        channels = {"a": [[[1.0], [1.0]]], "b": [[[1.0], [1.0]]]}
        profile = make_profile(tmp_path, channels, {"a": [[4, 0]], "b": [[0, 2]]})
        assert drift.routing_divergence(profile, "a", "b") == pytest.approx([1])


class TestRows:
    def test_groups_hold_sizes_within_half_a_percent(self):
        found = [evaluation("uniform", size, 0.1, 0.1) for size in (10000, 10050, 10051, 12000)]
        groups = size_groups(make_rows(Artifacts(evaluations=found)))
        assert [sorted(row.evaluation.bytes for row in group) for group in groups] == [[10000, 10050], [10051], [12000]]

    def test_a_distribution_is_novel_unless_fitted_or_said_to_be_known(self):
        found = Artifacts(evaluations=[evaluation("uniform", 10, 0.1, 0.1)])
        assert make_rows(found)[0].names == {"known": ("wiki",), "novel": ("python",)}
        found.roles["python"] = "known"
        assert make_rows(found)[0].names["novel"] == ()

    def test_a_summary_cannot_make_a_fitted_distribution_novel(self):
        found = Artifacts(evaluations=[evaluation("uniform", 10, 0.1, 0.1)], roles={"wiki": "novel"})
        assert make_rows(found)[0].names["known"] == ("wiki",)

    def test_equal_values_share_the_mark_and_no_contest_has_none(self):
        assert best([0.2, 0.1, None, 0.1]) == {1, 3}
        assert best([0.1, 0.1]) == best([0.1, None]) == set()


class TestVerdict:
    def test_win(self):
        found = judge(evaluation("budget", 13_033_920, 0.57, 0.35), evaluation("uniform", 13_035_584, 1.0, 1.0))
        assert found.outcome == "win"
        assert found.sentence == (
            "budget gptq at 12.43 MiB: KL divergence on known texts 43 % below uniform gptq "
            "(3.43 bits per weight) of the same size, on novel texts 65 % below."
        )

    def test_lose(self):
        found = judge(evaluation("budget", 10_000_000, 1.2, 1.1), evaluation("uniform", 10_000_000, 1.0, 1.0))
        assert found.outcome == "lose"
        assert "budget gptq at 9.54 MiB loses: KL divergence on known texts 20 % above uniform" in found.sentence
        assert found.sentence.endswith("on novel texts 10 % above.")

    def test_mixed_says_where_ours_loses(self):
        found = judge(evaluation("budget", 10_000_000, 0.5, 3.0), evaluation("uniform", 10_000_000, 1.0, 1.0))
        assert found.outcome == "mixed"
        assert found.sentence.endswith("but on novel texts 200 % above: on novel texts ours loses.")

    def test_equal(self):
        found = judge(evaluation("budget", 10_000_000, 1.0, 1.001), evaluation("uniform", 10_000_000, 1.0, 1.0))
        assert found.outcome == "equal"
        assert "known texts the same as uniform" in found.sentence

    @pytest.mark.parametrize("baseline", [
        evaluation("uniform", 10_060_000, 1.0, 1.0), evaluation("uniform", 10_000_000, 1.0, 1.0, method="rtn"),
        evaluation("frequency", 10_000_000, 1.0, 1.0),
    ])  # fmt: skip
    def test_without_a_uniform_plan_of_the_same_size_and_method_there_is_no_comparison(self, baseline: Evaluation):
        found = judge(evaluation("budget", 10_000_000, 0.5, 0.5), baseline)
        assert found.comparison is None
        assert "no uniform gptq checkpoint of the same size was evaluated" in found.sentence

    def test_only_baselines(self):
        assert "Only baselines" in judge(evaluation("uniform", 10_000_000, 1.0, 1.0)).sentence
        assert "No checkpoint" in judge(evaluation(None, 10_000_000, 0.0, 0.0)).sentence

    def test_the_pair_is_chosen_by_what_it_is_and_not_by_its_result(self):
        found = judge(
            evaluation("budget", 10_000_000, 0.9, 0.9, hedge=USUAL),
            evaluation("uniform", 10_000_000, 1.0, 1.0),
            evaluation("budget", 10_000_000, 0.1, 0.1, hedge=0), evaluation("paper", 10_000_000, 0.1, 0.1),
            evaluation("budget", 20_000_000, 0.1, 0.1, hedge=USUAL, method="rtn"),
            evaluation("uniform", 20_000_000, 1.0, 1.0, method="rtn"),
        )  # fmt: skip
        assert "10 % below" in found.sentence
        assert f"All 2 comparisons of budget (hedge {USUAL})" in found.tally

    def test_another_baseline_that_is_better_is_named(self):
        found = judge(
            evaluation("budget", 10_000_000, 0.5, 0.5), evaluation("uniform", 10_000_000, 1.0, 1.0),
            evaluation("frequency", 10_000_000, 0.4, 0.9),
        )  # fmt: skip
        assert found.tally == "At this size frequency is better on known texts."

    def test_ours_is_compared_with_the_uniform_nearest_in_size(self):
        rows = make_rows(Artifacts(evaluations=[
            evaluation("budget", 10_000, 1, 1), evaluation("uniform", 10_040, 2, 2),
            evaluation("uniform", 9_990, 4, 4),
        ]))  # fmt: skip
        assert comparisons(rows)[0].changes["known"] == pytest.approx(-0.75)


def write_checkpoint(folder: Path, made: Plan, profile: Profile) -> None:
    """A checkpoint's manifest; the report reads no weights."""
    units = {
        u.name: StoredUnit(
            layer=u.layer, role=u.role, shape=u.shape, scheme=made.units[u.name], method="rtn", error=None
        )
        for u in profile.record.units
    }  # fmt: skip
    manifest = Manifest(
        moqa="0.1.0", model="models/tiny", model_type="qwen3_moe", fingerprint=FINGERPRINT, layers=2,
        strategy=made.strategy, options={"hedge": None}, ties="unit", budget=None, method="rtn", seed=0,
        mixture=made.mixture, fitted={"wiki": Fitted(digest="0", shingles="")}, units=units,
        kept={name: StoredTensor(dtype=d, shape=s) for name, (d, s) in profile.record.kept.items()},
        files={"model-00001-of-00001.safetensors": StoredFile(bytes=made.account.checkpoint, sha256="0")},
    )  # fmt: skip
    write_json(manifest, folder / "moqa.json")
    write_json({"vocab": "<script>"}, folder / "tokenizer.json")


@pytest.fixture
def run(tmp_path: Path, two: Profile) -> Path:
    """A folder with every kind of artifact."""
    folder = tmp_path / "run"
    store(two)
    for strategy, width in (("uniform", 3.4), ("budget", 3.9), ("uniform", 4.4)):
        made = plan(two, Budget.parse(bpw=width), strategy=strategy, hedge=0 if strategy != "uniform" else None)
        file = folder / "plans" / f"{strategy}-{width:.0f}.json"
        write_json(for_file(made, file), file)
    write_checkpoint(folder / "checkpoint", plan(two, Budget.parse(bpw=5.4), strategy="uniform"), two)
    for index, record in enumerate([
        evaluation(None, 40_000_000, 0.0, 0.0), evaluation("budget", 10_000_000, 0.5, 0.4, hedge=0.0),
        evaluation("uniform", 10_000_000, 1.0, 1.0), evaluation("uniform", 13_000_000, 0.1, 0.1),
    ]):  # fmt: skip
        write_json(record, folder / "evaluations" / f"{index}.json")
    write_json({"roles": {"wiki": "known", "python": "novel"}, "more": 1}, folder / "summary.json")
    write_json({"unrelated": True}, folder / "notes.json")
    return folder


def page(tmp_path: Path, *artifacts: Path) -> str:
    return report(artifacts, tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def body(text: str) -> str:
    """The page without its scripts and styles."""
    return re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.DOTALL)


def sections(text: str) -> tuple[str, ...]:
    found = tuple(re.findall(r'<section id="(\w+)"', text))
    assert found == tuple(re.findall(r'<a href="#(\w+)"', text))
    return found


class TestPage:
    def test_every_section_is_there_in_order(self, tmp_path: Path, run: Path, two: Profile):
        text = page(tmp_path, run, two.folder)
        assert sections(text) == SECTIONS
        visible = html.unescape(body(text)).replace("\xa0", " ")
        assert "known texts 50 % below uniform gptq" in visible
        assert "layer 1 expert 1" not in visible
        for label in ("budget hedge 0,", "uniform, ", "wiki.txt", FINGERPRINT[:12]):
            assert label in visible

    def test_it_stands_alone(self, tmp_path: Path, run: Path, two: Profile):
        text = page(tmp_path, run, two.folder)
        assert not re.search(r"<(?:link|img|iframe|object|embed|base)\b", body(text))
        assert not re.search(r"<script[^>]*\bsrc\b", text)
        assert not re.search(r"""(?:src|href|action)\s*=\s*["']?\s*(?:https?:|//)""", body(text))
        assert not re.search(r"@import|url\(", re.search(r"<style>.*?</style>", text, re.DOTALL)[0])
        assert "default-src 'none'" in text

    def test_figures_are_valid_json(self, tmp_path: Path, run: Path, two: Profile):
        found = re.findall(
            r'<script type="application/json">(.*?)</script>', page(tmp_path, run, two.folder), re.DOTALL
        )
        assert len(found) > 10
        assert {json.loads(text)["kind"] for text in found} == {"heat", "lines"}

    def test_a_hostile_name_is_only_text(self, tmp_path: Path):
        name = "</script><script>alert(1)</script><b>\"'&%{x}"
        channels = {name: [[[1.0], [2.0]]], "wiki": [[[2.0], [1.0]]]}
        profile = make_profile(tmp_path / "profile", channels)
        record = evaluation("uniform", 10_000_000, 1.0, 1.0)
        score = record.distributions["wiki"]
        write_json(record.model_copy(update={"distributions": {name: score}, "model": name}), tmp_path / "e.json")
        # a name with a slash is no file name, so this profile is rendered without its folder
        text = render(Artifacts(profiles=[profile], evaluations=gather([tmp_path / "e.json"]).evaluations))
        assert "<script>alert" not in text
        assert "<b>&#34;" not in text
        assert html.escape(name, quote=False).split('"')[0] in text

    @pytest.mark.parametrize(("given", "expected"), [
        ("evaluations", ("quality", "size", "provenance")), ("plans", ("bits", "bytes", "provenance")),
        ("checkpoint", ("bits", "bytes", "provenance")),
    ])  # fmt: skip
    def test_what_is_missing_is_left_out(self, tmp_path: Path, run: Path, given: str, expected: tuple[str, ...]):
        text = page(tmp_path, run / given)
        assert sections(text) == expected
        assert ("Nothing was evaluated yet" in text) == (given != "evaluations")

    def test_a_profile_alone(self, tmp_path: Path, run: Path, two: Profile):
        assert sections(page(tmp_path, two.folder)) == ("significance", "activation", "provenance")

    def test_a_dense_model_has_no_expert_sections(self, tmp_path: Path, two: Profile):
        units = tuple(u for u in two.record.units if u.role != "expert")
        record = two.record.model_copy(update={"units": units, "top_k": 0})
        statistics = {
            n: {"sensitivity": s["sensitivity"][: len(units)], "samples": s["samples"]}
            for n, s in two.statistics.items()
        }
        store(Profile(record, two.folder, statistics, {"rounding": torch.ones(len(units), 8)}))
        made = plan(Profile(record, two.folder, statistics, {}), Budget.parse(bpw=4.5), strategy="uniform")
        write_json(for_file(made, tmp_path / "plan.json"), tmp_path / "plan.json")
        text = page(tmp_path, two.folder, tmp_path / "plan.json")
        assert sections(text) == ("bits", "bytes", "provenance")
        assert "Bits per matrix" in text

    def test_starved_experts_are_named(self, tmp_path: Path):
        channels = {"wiki": [[[1.0], [2.0], [0.0]]]}
        store(make_profile(tmp_path / "p", channels, {"wiki": [[4, 4, 0]]}))
        assert "1 on none of the given distributions: layer 0 expert 2." in page(tmp_path, tmp_path / "p")

    def test_artifacts_of_two_models_are_not_mixed_in_silence(self, tmp_path: Path, run: Path, two: Profile):
        record = two.record.model_copy(update={"fingerprint": "a" * 64})
        store(Profile(record, tmp_path / "other", two.statistics, two.weights))
        assert "do not fit together" in page(tmp_path, run, tmp_path / "other")
        assert "do not fit together" not in page(tmp_path, run, two.folder)

    def test_many_layers_and_rows(self, tmp_path: Path):
        many = torch.rand(16, 64, 2).tolist()
        profile = make_profile(tmp_path / "p", {"wiki": many, "novels": many, "self": many})
        evaluations = [evaluation("random", 10_000_000 + 100_000 * i, 1.0, 1.0 + i) for i in range(25)]
        text = render(Artifacts(profiles=[profile], evaluations=evaluations))
        assert text.count('class="group"') == 25
        assert text.count("<option>layer ") == 16

    def test_the_same_artifacts_give_the_same_page(self, tmp_path: Path, run: Path, two: Profile):
        assert page(tmp_path, run, two.folder) == page(tmp_path, two.folder, run)

    def test_an_old_page_stays_if_the_new_one_fails(self, tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch):
        out = tmp_path / "report.html"
        out.write_text("old")
        monkeypatch.setattr(Path, "rename", lambda self, target: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            report([run], out)
        assert out.read_text() == "old"
        assert list(tmp_path.glob(".report*")) == []


def proof() -> Proof:
    """A checkpoint between two uniform ones, with a text of its own in no fit."""
    low, high = evaluation("uniform", 9_000_000, 0.4, 0.8), evaluation("uniform", 11_000_000, 0.1, 0.2)
    return Proof(
        original=evaluation(None, 40_000_000, 0.0, 0.0), ours=evaluation("budget", 10_000_000, 0.05, 0.1, hedge=0.3),
        baselines=(low, high, evaluation("frequency", 10_000_000, 0.1, 0.9)), uniform={"wiki": 0.2, "python": 0.4},
    )  # fmt: skip


class TestProof:
    @pytest.fixture
    def folder(self, tmp_path: Path, two: Profile) -> Path:
        write_checkpoint(tmp_path / "out", plan(two, Budget.parse(bpw=5.4), strategy="uniform"), two)
        write_json(proof(), tmp_path / "out" / "proof.json")
        return tmp_path / "out"

    @pytest.mark.parametrize("name", ["", "proof.json"])
    def test_the_page_of_a_checkpoint_judges_it_by_its_proof(self, tmp_path: Path, folder: Path, name: str):
        text = html.unescape(page(tmp_path, folder / name)).replace("\xa0", " ")
        assert (
            "budget gptq at 9.54 MiB: KL divergence on known texts 75 % below uniform gptq (3.43 bits per weight) "
            "interpolated to the same size, on novel texts 75 % below."
        ) in text
        rows = re.findall(r'<tr title="([^"]*)"', text)
        assert [row.partition(":")[0] for row in rows] == [
            "original", "uniform gptq", "budget hedge 0.3 gptq", "uniform gptq", "frequency gptq", "uniform gptq",
        ]  # fmt: skip

    def test_ratios_stand_beside_the_numbers(self, tmp_path: Path, folder: Path):
        text = html.unescape(page(tmp_path, folder / "proof.json")).replace("\xa0", " ")
        assert "<span>0.9000</span><small>9.00 \u00d7 ours</small>" in text
        assert "<span>0.9000</span><small>20.90 +4.5 %</small>" in text
        assert "<span>9.54</span><small>25 % of original</small>" in text

    def test_divergence_comes_before_size(self, tmp_path: Path, folder: Path):
        text = page(tmp_path, folder / "proof.json")
        heads = re.findall(r'<th scope="col"[^>]*>([^<]*)</th>', text)
        assert text.index("<dt>KL divergence against uniform, known texts</dt>") < text.index("<dt>size,")
        assert heads[:6] == ["Model", "mean", "wiki", "mean", "python", "MiB"]

    def test_what_is_interpolated_is_what_the_proof_says(self):
        at_bytes = interpolated(proof().baselines[:2], proof().ours.bytes)
        assert {name: q.kl_divergence for name, q in at_bytes.distributions.items()} == pytest.approx(proof().uniform)

    def test_the_checkpoint_of_a_proof_is_judged_whatever_its_strategy(self):
        ours = evaluation("paper", 10_000_000, 0.3, 0.6)
        found = Artifacts(proofs=[proof().model_copy(update={"ours": ours})])
        found.add(ours, *found.proofs[0].baselines)
        assert "paper gptq at 9.54 MiB loses: KL divergence on known texts 50 %" in verdict(make_rows(found)).sentence

    def test_a_proof_without_its_original(self, tmp_path: Path, folder: Path):
        (folder / "proof.json").write_text(proof().model_dump_json(exclude={"original"}))
        text = page(tmp_path, folder)
        assert "interpolated to the same size" in text
        assert 'title="original' not in text


def test_the_page_of_a_large_model_stays_below_a_megabyte(tmp_path: Path):
    layers = torch.rand(48, 128, 2).tolist()
    profile = make_profile(tmp_path / "p", {"wiki": layers, "novels": layers, "self": layers})
    plans = {str(width): plan(profile, strategy="uniform", widths=[width]) for width in (2, 3, 4)}
    text = render(Artifacts(profiles=[profile], plans=plans))
    assert len(text.encode()) < 1_000_000
    assert "Shown: 4 of 48 layers." in text


class TestGather:
    def test_finds_every_kind_once(self, run: Path, two: Profile):
        found = gather([run, run / "plans" / "uniform-3.json", two.folder, two.folder / "profile.json"])
        counts = (found.profiles, found.plans, found.checkpoints, found.evaluations)
        assert [len(kind) for kind in counts] == [1, 3, 1, 4]
        assert found.roles == {"wiki": "known", "python": "novel"}

    def test_a_named_file_that_is_no_artifact_is_an_error(self, run: Path):
        with pytest.raises(MoqaError, match=r"notes\.json is not an artifact: .*profile folder.*plan.*evaluation"):
            gather([run / "notes.json"])

    def test_a_path_that_is_not_there_is_an_error(self, tmp_path: Path):
        with pytest.raises(MoqaError, match=r"there is nothing at .*absent"):
            gather([tmp_path / "absent"])

    def test_nothing_found_is_an_error(self, tmp_path: Path):
        with pytest.raises(MoqaError, match="no artifact in"):
            gather([tmp_path])
        with pytest.raises(MoqaError, match="no artifact in nothing"):
            gather([])

    def test_a_folder_as_output_is_an_error(self, tmp_path: Path, run: Path):
        with pytest.raises(MoqaError, match="is a folder"):
            report([run], tmp_path)
