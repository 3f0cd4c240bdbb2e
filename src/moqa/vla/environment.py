"""MetaWorld as the robot of an experiment: a Sawyer arm that is seen by one camera and told what to do."""

import importlib.util
import os
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moqa.errors import MoqaError, one_line

ROBOT = "metaworld-sawyer"
# name in MetaWorld -> what the policy is told
TASKS = {
    "button-press": "press the button at the side",
    "button-press-topdown": "press the button from above",
    "door-close": "close the door",
    "drawer-open": "open the drawer",
    "drawer-close": "close the drawer",
    "faucet-open": "turn the faucet to the left",
    "faucet-close": "turn the faucet to the right",
    "handle-press": "press the handle",
    "window-open": "open the window",
    "window-close": "close the window",
}
STATE, ACTION = 4, 4  # place of the hand and how far it is open; its movement and the force of the gripper
STEPS = 150
# the camera `corner2` where MetaWorld's benchmarks of images put it
_CAMERA, _PLACE = "corner2", (0.75, 0.075, 0.7)
_FINER = 2  # pixels that are averaged, in each direction: MuJoCo's own smoothing is slow in software


class MetaWorldTask:
    """One task; an episode is a function of its seed and of the actions.

    >>> robot = MetaWorldTask("drawer-open", size=72)  # doctest: +SKIP
    >>> robot.reset(seed=7)  # doctest: +SKIP
    >>> robot.image().shape, robot.state().shape  # doctest: +SKIP
    ((72, 72, 3), (4,))

    Args:
        task: one of `TASKS`.
        size: pixels of a side of an image.

    Raises:
        MoqaError: if the task is unknown, or MetaWorld or a renderer is missing.
    """

    def __init__(self, task: str, size: int) -> None:
        if task not in TASKS:
            raise MoqaError(f"task {task} is unknown", f"there are {', '.join(TASKS)}")
        mujoco = _mujoco()
        from metaworld import env_dict

        self.task, self._size = task, size
        self._env: Any = env_dict.ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-v3-goal-observable"](seed=0)
        self._env._freeze_rand_vec, self._env.seeded_rand_vec = False, True
        model = self._env.model
        model.vis.quality.offsamples = model.vis.quality.shadowsize = 0
        model.camera(_CAMERA).pos[:] = _PLACE
        try:
            self._renderer = mujoco.Renderer(model, size * _FINER, size * _FINER)
        except Exception as error:  # each platform fails in its own way
            raise MoqaError(f"MuJoCo cannot render here ({one_line(error)})", _NO_RENDERER) from None
        for name in ("SHADOW", "REFLECTION", "SKYBOX", "HAZE"):
            self._renderer.scene.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{name}")] = 0
        self._seen: NDArray[np.float64] = np.zeros(0)

    def reset(self, seed: int) -> None:
        """Begin an episode: the seed decides where things are."""
        self._env.seed(seed)
        self._seen, _ = self._env.reset()

    def image(self) -> NDArray[np.uint8]:
        """[size, size, 3] what the camera sees, upright."""
        self._renderer.update_scene(self._env.data, camera=_CAMERA)
        fine = self._renderer.render()[::-1].reshape(self._size, _FINER, self._size, _FINER, 3)
        return np.asarray(fine.mean((1, 3)).round().astype(np.uint8))

    def state(self) -> NDArray[np.float32]:
        """[4] place of the hand, and how far the gripper is open."""
        return self._seen[:STATE].astype(np.float32)

    def expert(self) -> NDArray[np.float32]:
        """[4] what MetaWorld's scripted expert does now, from the true state."""
        action = _expert(self.task).get_action(self._seen)
        return np.clip(action, -1, 1).astype(np.float32)

    def experts(self, count: int) -> NDArray[np.float32]:
        """[count, 4] what the expert would do from here on; the episode stays where it is."""
        mujoco, env = _mujoco(), self._env
        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        kept = np.empty(mujoco.mj_stateSize(env.model, kind))
        mujoco.mj_getState(env.model, env.data, kept, kind)
        seen, before, length, stable = self._seen, env._prev_obs.copy(), env.curr_path_length, env._last_stable_obs
        actions = []
        for _ in range(count):
            actions.append(self.expert())
            self._seen = env.step(actions[-1])[0]
        mujoco.mj_setState(env.model, env.data, kept, kind)
        mujoco.mj_forward(env.model, env.data)
        self._seen, env._prev_obs, env.curr_path_length, env._last_stable_obs = seen, before, length, stable
        return np.stack(actions)

    def step(self, action: NDArray[np.float32]) -> bool:
        """Move; whether the task is done."""
        self._seen, _, _, _, facts = self._env.step(np.clip(action, -1, 1).astype(np.float32))
        return bool(facts["success"])

    def close(self) -> None:
        """Free the renderer."""
        self._renderer.close()


def check_renderer() -> None:
    """Refuse to begin where MetaWorld or a renderer is missing.

    Raises:
        MoqaError: saying what to install.
    """
    _mujoco()


_NO_RENDERER = "apt-get install libosmesa6 libgl1 renders in software"


@cache
def _mujoco() -> Any:
    if importlib.util.find_spec("metaworld") is None:
        raise MoqaError("rollouts need the package metaworld", "pip install 'moqa[vla]'")
    # before the first import: afterwards the choice is made
    os.environ.setdefault("MUJOCO_GL", "osmesa")
    try:
        import mujoco
    except Exception as error:  # PyOpenGL raises AttributeError where the library is missing
        raise MoqaError(f"MuJoCo cannot render here ({one_line(error)})", _NO_RENDERER) from None
    return mujoco


@cache
def _expert(task: str) -> Any:
    from metaworld.policies import ENV_POLICY_MAP

    return ENV_POLICY_MAP[f"{task}-v3"]()
