"""Demonstrations from a dataset of lerobot: `make test-lerobot` runs these in lerobot's environment."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from moqa.data.demonstrations import read_demonstrations, read_episodes
from moqa.vla import profile_policy

pytestmark = pytest.mark.skipif(find_spec("lerobot") is None, reason="lerobot is not installed here: make test-lerobot")
RECIPE = Path(__file__).parents[1] / "recipes" / "lerobot_demos.py"
CAMERAS = ("observation.images.wrist", "observation.images.top")
TASKS, EPISODES, LENGTH, SIZE = ("Open the drawer.", "Push it"), 10, 6, 48


def _picture(random):
    return torch.randint(0, 256, (SIZE, SIZE, 3), generator=random).byte().numpy()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    folder = tmp_path_factory.mktemp("lerobot") / "dataset"
    picture = {"dtype": "image", "shape": (SIZE, SIZE, 3), "names": ["height", "width", "channels"]}
    features = {
        **dict.fromkeys(CAMERAS, picture),
        "observation.state": {"dtype": "float32", "shape": (4,), "names": list("abcd")},
        "action": {"dtype": "float32", "shape": (4,), "names": list("abcd")},
    }  # fmt: skip
    made = LeRobotDataset.create("robots/dataset", 10, features, root=folder, robot_type="arm", use_videos=False)
    random = torch.Generator().manual_seed(0)
    for episode in range(EPISODES):
        for step in range(LENGTH):
            made.add_frame({
                **{camera: _picture(random) for camera in CAMERAS},
                "observation.state": torch.full((4,), step / 10).numpy(),
                "action": torch.full((4,), episode + step / 100).numpy(),
                "task": TASKS[episode % 2],
            })  # fmt: skip
        made.save_episode()
    made.finalize()
    return folder


def run(*words):
    return subprocess.run([sys.executable, RECIPE, *map(str, words)], capture_output=True, text=True)


def test_frames_become_observations(dataset, tmp_path):
    done = run(dataset, "-o", tmp_path / "demos", "--frames", 12)
    assert done.returncode == 0, done.stderr
    found = read_demonstrations(f"mine={tmp_path / 'demos'}")
    assert found.robot == "arm"
    assert list(found.files) == ["open-the-drawer", "push-it"]
    episodes = read_episodes(found, "open-the-drawer")
    assert episodes.instruction == TASKS[0]
    assert episodes.images.shape == (12, SIZE, SIZE, 6)
    steps = (episodes.state[:, 0] * 10).round().int().tolist()
    for actions, episode, step in zip(episodes.actions, episodes.episodes.tolist(), steps, strict=True):
        wanted = [episode + min(step + later, LENGTH - 1) / 100 for later in range(16)]
        torch.testing.assert_close(actions[:, 0], torch.tensor(wanted))


def test_a_policy_is_profiled_on_them(dataset, tmp_path):
    from lerobot_policies import act

    assert run(dataset, "-o", tmp_path / "demos").returncode == 0
    policy = act(tmp_path / "policy")
    profile = profile_policy(policy, f"mine={tmp_path / 'demos'}", tmp_path / "profile", samples=4)
    assert profile.names == ("mine",)


def test_one_camera(dataset, tmp_path):
    assert run(dataset, "-o", tmp_path / "both").returncode == 0
    assert run(dataset, "-o", tmp_path / "top", "--camera", "observation.images.top").returncode == 0
    both, top = (
        read_episodes(read_demonstrations(f"mine={tmp_path / name}"), "push-it").images for name in ("both", "top")
    )
    assert torch.equal(both[..., :3], top)


def test_what_is_no_dataset(tmp_path):
    done = run(tmp_path, "-o", tmp_path / "demos")
    assert done.returncode
    assert "is no dataset of lerobot: it has no meta/info.json" in done.stderr


def test_a_camera_that_is_not_there(dataset, tmp_path):
    done = run(dataset, "-o", tmp_path / "demos", "--camera", "left")
    assert "--camera left is not in the dataset: it has observation.images.wrist, observation.images.top" in done.stderr
