"""Policies: what is measured, what is refused, and episodes that die."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policies import demonstrations, small

from moqa.errors import MoqaError
from moqa.policies.observation import Fields, PolicyInputs
from moqa.policies.small import SmallPolicy, SmallPolicyConfig
from moqa.vla import plan_policy, profile_policy, quantize_policy
from moqa.vla import run as rollouts
from moqa.vla.actor import Actor
from moqa.vla.alignment import action_shift, layer_shift, module_shift, token_shift
from moqa.vla.episodes import Episode, Job, RolloutSettings, play, played
from moqa.vla.measure import combined
from moqa.vla.records import EpisodeRecord, wilson


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return small(tmp_path_factory.mktemp("small") / "policy")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return demonstrations(tmp_path_factory.mktemp("data") / "demonstrations")


@pytest.fixture(scope="module")
def profile(policy, source, tmp_path_factory):
    return profile_policy(policy, f"demos={source}", tmp_path_factory.mktemp("profile") / "p", samples=4)


class TestAlignment:
    def test_nothing_moved_is_zero(self):
        x, words = torch.randn(50, 8), torch.randn(5, 8)
        assert module_shift(x, x) == pytest.approx(0, abs=1e-9)
        assert layer_shift(x, x) == 0
        assert token_shift(x, x, words) == pytest.approx(0, abs=1e-6)
        assert action_shift(x[None], x[None]) == 0

    def test_a_rotation_moves_tokens_but_not_their_relations(self):
        x = torch.randn(200, 8)
        turned = x @ torch.linalg.qr(torch.randn(8, 8)).Q
        assert module_shift(x, turned) == pytest.approx(0, abs=1e-6)
        assert token_shift(x, turned, torch.empty(0, 8)) > 0.3

    @given(st.integers(0, 10**6))
    def test_each_grows_with_the_square_of_a_small_change(self, seed):
        generator = torch.Generator().manual_seed(seed)
        x, change, words = (torch.randn(count, 16, generator=generator) for count in (300, 300, 6))
        for shift in (module_shift, layer_shift, lambda a, b: token_shift(a, b, words)):
            small, large = shift(x, x + 0.01 * change), shift(x, x + 0.02 * change)
            assert large / small == pytest.approx(4, rel=0.35)

    def test_attention_over_words_counts_beside_the_angle(self):
        x, words = torch.randn(100, 8), torch.randn(5, 8)
        moved = x + 0.3 * torch.randn(100, 8)
        assert token_shift(x, moved, words) > token_shift(x, moved, words[:0])


@given(st.integers(1, 400), st.data())
def test_the_interval_holds_the_rate(episodes, data):
    successes = data.draw(st.integers(0, episodes))
    low, high = wilson(successes, episodes)
    assert 0 <= low <= successes / episodes <= high <= 1
    assert wilson(successes * 4, episodes * 4)[1] - wilson(successes * 4, episodes * 4)[0] < high - low


@given(st.integers(1, 3), st.integers(0, 5), st.integers(0, 9))
def test_a_row_holds_an_observation(count, state, words):
    fields = Fields((3, 4, 4), state, words)
    seen = PolicyInputs(torch.rand(count, 3, 4, 4), torch.rand(count, state), torch.randint(0, 50_000, (count, words)))
    again = fields.parted(fields.row(seen))
    assert all(torch.equal(getattr(seen, name), getattr(again, name)) for name in ("images", "state", "words"))


class TestPlans:
    def test_the_share_of_alignment_moves_bits(self, profile):
        plans = [plan_policy(profile, "3bpw", by="aligned", alignment=share) for share in (0.0, 1.0)]
        assert plans[0].units != plans[1].units
        assert plans[0].units == plan_policy(profile, "3bpw", by="output-error").units

    def test_a_floor_holds_for_its_part(self, profile):
        plan = plan_policy(profile, "4bpw", floors={"projector": 8})
        parts = {unit.name: unit.role for unit in profile.record.units}
        assert min(scheme.width for name, scheme in plan.units.items() if parts[name] == "projector") >= 8

    def test_the_cost_of_alignment_alone_ignores_actions(self, profile):
        tables = dict(profile.statistics["demos"])
        before = combined(tables, 1.0)
        tables["shift.action"] = tables["shift.action"] * torch.rand_like(tables["shift.action"])
        assert torch.equal(combined(tables, 1.0), before)


class TestRefused:
    def refused(self, moqa_command, *words):
        code, _, err = moqa_command("vla", *map(str, words))
        assert code == 2
        assert len(err.strip().splitlines()) == 1
        return err

    def test_demonstrations_of_another_robot(self, moqa_command, policy, tmp_path):
        other = demonstrations(tmp_path / "d", robot="ur3")
        err = self.refused(moqa_command, "profile", policy, "--data", f"demos={other}", "-o", tmp_path / "p")
        assert f"demos={other} holds demonstrations of ur3" in err
        assert "is a policy for metaworld-sawyer" in err
        assert not (tmp_path / "p").exists()

    @pytest.mark.parametrize(("change", "said"), [({"action": 7}, "actions have 7 numbers"), ({"size": 32}, "images")])
    def test_demonstrations_of_another_size(self, moqa_command, policy, tmp_path, change, said):
        other = demonstrations(tmp_path / "d", **change)
        assert said in self.refused(moqa_command, "profile", policy, "--data", f"x={other}", "-o", tmp_path / "p")

    def test_a_folder_without_demonstrations(self, moqa_command, policy, tmp_path):
        (tmp_path / "d").mkdir()
        err = self.refused(moqa_command, "profile", policy, "--data", f"x={tmp_path / 'd'}", "-o", tmp_path / "p")
        assert "holds no demonstrations" in err

    def test_a_policy_whose_parts_cannot_be_found(self, policy, tmp_path):
        from moqa.models.view import open_model
        from moqa.policies.adapter import parts_of
        from moqa.policies.members import adapter_of

        view = open_model(policy)
        del view.model.action_head
        with pytest.raises(MoqaError, match=r"no action part: looked for vision_encoder, .*; it has vision_encoder"):
            parts_of(adapter_of(view.model.config), view.model)

    def test_a_language_model(self, moqa_command, source, tmp_path):
        from policies import REFERENCE

        words = ("profile", REFERENCE / "model", "--data", f"x={source}", "-o", tmp_path / "p")
        assert "moqa profile" in self.refused(moqa_command, *words)

    def test_a_budget_below_the_floors(self, moqa_command, profile, tmp_path):
        words = ("plan", profile.folder, "--bpw", "1.5", "--floor", "vision=4", "--floor", "language=4")
        err = self.refused(moqa_command, *words, "-o", tmp_path / "plan.json")
        assert "--bpw 1.5 is below the smallest plan" in err
        assert "--floor vision=4 --floor language=4" in err

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (("--by", "luck"), "output-error, "), (("--floor", "wheels=4"), "names no role"),
            (("--by", "uniform", "--alignment", "0.5"), "does not apply"),
            (("--by", "aligned", "--alignment", "2"), "not a share"),
        ],
    )  # fmt: skip
    def test_a_wrong_option(self, moqa_command, profile, tmp_path, words, said):
        out = tmp_path / "plan.json"
        assert said in self.refused(moqa_command, "plan", profile.folder, "--bpw", "4", *words, "-o", out)
        assert not out.exists()

    def test_an_instruction_that_it_does_not_know(self, policy):
        actor = Actor(policy)
        with pytest.raises(MoqaError, match="does not know 'fly' of 'fly away'"):
            actor.act(np.zeros((24, 24, 3), np.uint8), np.zeros(4, np.float32), "fly away")

    def test_a_missing_renderer(self, moqa_command, policy, tmp_path, monkeypatch):
        def missing():
            raise MoqaError("MuJoCo cannot render here (no library)", "apt-get install libosmesa6 libgl1")

        monkeypatch.setattr(rollouts, "check_renderer", missing)
        err = self.refused(moqa_command, "rollout", policy, "-o", tmp_path / "r")
        assert "apt-get install libosmesa6" in err
        assert not (tmp_path / "r").exists()

    def test_an_unknown_task(self, moqa_command, policy, tmp_path):
        err = self.refused(moqa_command, "rollout", policy, "--task", "fly", "-o", tmp_path / "r")
        assert "--task fly" in err


class Robot:
    """Moves nothing, succeeds after some steps, and may die."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.steps, self.dies_at = 0, dies_at

    def reset(self, seed: int) -> None:
        self.steps = 0

    def image(self):
        return np.zeros((24, 24, 3), np.uint8)

    def state(self):
        return np.zeros(4, np.float32)

    def step(self, action) -> bool:
        self.steps += 1
        if self.steps == self.dies_at:
            raise ValueError("the simulation is unstable")
        return self.steps == 10

    def close(self) -> None:
        pass


class TestSight:
    def test_a_small_thing_that_moves_is_not_lost_beside_the_positions(self):
        torch.manual_seed(0)
        encoder = SmallPolicy(SmallPolicyConfig()).vision_encoder
        pictures = torch.rand(3, 72, 72).repeat(12, 1, 1, 1)
        encoder.average.copy_(pictures[0])
        for number, picture in enumerate(pictures):
            picture[0, 6 * number : 6 * number + 6, 20:26] = 1
        with torch.no_grad():
            seen = encoder(pictures)
        assert (seen - seen.mean(0)).norm() > 0.1 * seen.norm()

    def test_without_a_gain_it_is_blind(self):
        encoder = SmallPolicy(SmallPolicyConfig(picture_gain=0)).vision_encoder
        with torch.no_grad():
            assert torch.equal(*encoder(torch.rand(2, 3, 72, 72)))

    def test_the_reference_acts_by_its_pictures(self):
        from policies import REFERENCE

        actor, random = Actor(REFERENCE / "policy"), np.random.default_rng(0)
        pictures = [np.full((72, 72, 3), grey, np.uint8) for grey in (60, 180)]
        pictures += [random.integers(0, 256, (72, 72, 3), np.uint8) for _ in range(2)]
        place = np.array([0, 0.6, 0.2, 0.5], np.float32)
        actions = np.stack([actor.act(picture, place, "open the drawer") for picture in pictures])
        assert np.abs(actions - actions.mean(0)).max() > 0.05


class TestCard:
    def test_it_names_what_reads_and_makes_a_policy(self, policy, profile, tmp_path):
        plan = plan_policy(profile, "5bpw")
        card = (quantize_policy(policy, plan, tmp_path / "q", method="rtn", profile=profile) / "README.md").read_text()
        assert 'Actor("FOLDER_OR_ID")' in card
        assert "moqa vla plan PROFILE --bpw 5 --by output-error -o PLAN" in card
        assert "AutoModel" not in card
        assert "moqa serve" not in card


class TestEpisodes:
    def test_one_ends_with_the_task(self, policy):
        actor = Actor(policy)
        found = play(actor, Robot(), Job("drawer-open", 1, filmed=True), replan=4)
        assert (found.record.success, found.record.steps) == (True, 10)
        assert len(found.record.milliseconds) == 3
        assert found.film.shape == (2, 24, 24, 3)

    def test_an_environment_that_fails_is_counted(self, policy):
        found = play(Actor(policy), Robot(dies_at=5), Job("drawer-open", 1), replan=4).record
        assert (found.success, found.crashed) == (False, "the simulation is unstable")

    def test_a_process_that_dies_is_counted_and_the_others_go_on(self, policy, monkeypatch):
        monkeypatch.setenv(
            "PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        )
        monkeypatch.setattr("moqa.vla.episodes._work", dying_work)
        jobs = [Job("drawer-open", seed) for seed in (1, 2, 3)]
        found = {one.record.seed: one.record for one in played(RolloutSettings(str(policy), 4, 1), jobs, processes=1)}
        assert {seed for seed, one in found.items() if one.crashed} == {2}
        assert "ended with 7" in found[2].crashed
        assert all(found[seed].success for seed in (1, 3))

    def test_a_rollout_goes_on_after_a_kill(self, policy, tmp_path, monkeypatch):
        monkeypatch.setattr(rollouts, "check_renderer", lambda: None)
        begun = []

        def some(settings, jobs, processes):
            for job in jobs:
                begun.append(job)
                if len(begun) == 3:
                    raise KeyboardInterrupt
                yield Episode(
                    EpisodeRecord(task=job.task, seed=job.seed, success=True, steps=3, milliseconds=(1.0, 3.0))
                )

        monkeypatch.setattr(rollouts, "played", some)
        options = {"tasks": ["drawer-open", "drawer-close"], "episodes": 2, "videos": False}
        with pytest.raises(KeyboardInterrupt):
            rollouts.rollout(policy, tmp_path / "r", **options)
        record = rollouts.rollout(policy, tmp_path / "r", **options)
        assert len(begun) == 5  # the third one again
        assert (record.successes, record.episodes) == (4, 4)
        assert record.milliseconds_per_call == 2.0
        assert record.milliseconds_per_action == 1.0
        stored = json.loads((tmp_path / "r" / "rollout.json").read_text())
        assert stored["tasks"]["drawer-open"]["interval"] == list(wilson(2, 2))


def dying_work(pipe, settings):
    """In place of the work of a process: one of the jobs kills it."""
    while (job := pipe.recv()) is not None:
        if job.seed == 2:
            os._exit(7)
        pipe.send(Episode(EpisodeRecord(task=job.task, seed=job.seed, success=True, steps=1, milliseconds=())))


@pytest.mark.slow
def test_a_policy_moves_the_robot(tmp_path):
    """Needs MetaWorld and a renderer."""
    from policies import REFERENCE

    record = rollouts.rollout(REFERENCE / "policy", tmp_path / "r", tasks=["drawer-close"], episodes=3)
    assert record.successes >= 2
    assert (tmp_path / "r" / "drawer-close.gif").stat().st_size < 300_000
