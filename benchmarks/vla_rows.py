"""Rows of the study of policies: what was quantized how, and what came of it; controls of the policy itself."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

import moqa
from moqa.data import read_demonstrations
from moqa.format.reader import open_checkpoint
from moqa.models.view import open_model
from moqa.planning import Plan
from moqa.policies.small import SmallPolicy
from moqa.profiling import Profile
from moqa.storage.artifact import write_json
from moqa.tasks import find_task
from moqa.vla import plan_policy, profile_policy, quantize_policy, rollout
from moqa.vla.shifts import ShiftComparison

RUNS = Path("runs/vla")
POLICY, DEMONSTRATIONS, ROWS = Path("reference/policy"), RUNS / "demonstrations", RUNS / "rows"
PARTS = ("vision", "projector", "language", "action")
HELD_OUT = 200  # observations
# label -> width and group size of the uniform plan whose bytes all plans of the label have
SIZES = {1.5: (1, 64), 2.5: (2, 64), 3.0: (3, 256), 4.0: (4, 256), 6.0: (6, 256)}
OTHERS = ("aligned", "output-error", "random")
CLOSED_LOOP = ("uniform", "output-error", "aligned")
WANTED_SIZES = (2.5, 3.0)
CLOSED_SIZES = (*WANTED_SIZES, 1.5)  # and one at which the robot fails more often
CONTROLS = ("original", 16.0), ("hypothesis-blind", 16.0)
KEEP = 16


@dataclass(frozen=True)
class Made:
    """A quantized policy of the study."""

    name: str  # e.g. aligned-3
    plan: str  # as the summary calls it
    size: float  # of the label
    scheme: Plan
    method: str = "gptq"
    seed: int = 0
    blank: bool = False  # whether the pictures of the calibration are blank


class Study:
    def __init__(self, samples: int) -> None:
        source = f"demos={DEMONSTRATIONS}"
        self.profile: Profile = _profile(source, samples)
        task = find_task("policy")
        held_out = task.split(read_demonstrations(source))[1]
        seen = task.cut(held_out, task.reader(POLICY), 1, HELD_OUT)
        self.rows, self.expert = seen.inputs, seen.actions
        self.view = open_model(POLICY)
        self.comparison = ShiftComparison(self.view, self.rows)

    @cached_property
    def blank_profile(self) -> Profile:
        """The same, with pictures that show nothing: what a calibration on text alone would give the projector."""
        return self.profile_with(self._blank(self.profile.samples("demos")))

    def profile_with(self, samples: torch.Tensor) -> Profile:
        return replace(self.profile, statistics={"demos": self.profile.statistics["demos"] | {"samples": samples}})

    def _blank(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.clone()
        config = self.view.model.config
        rows[:, : 3 * config.image_size**2] = 0.5
        return rows

    def uniform(self, size: float, fixed: Mapping[str, int] | None = None) -> Plan:
        width, group = SIZES[size]
        return plan_policy(self.profile, None, by="uniform", widths=[width], groups=[group], fixed=fixed)

    def plan(self, by: str, size: float, seed: int = 0, floors: Mapping[str, int] | None = None) -> Plan:
        if by == "uniform":
            return self.uniform(size)
        limit = f"{self.uniform(size).account.checkpoint}B"
        return plan_policy(self.profile, limit, by=by, seed=seed, floors=floors)

    def only(self, part: str, width: int, blank: bool = False) -> Plan:
        """A plan in which one part alone loses precision."""
        fixed = {unit.name: KEEP for unit in self.profile.record.units if unit.role != part}
        profile = self.blank_profile if blank else self.profile
        return plan_policy(profile, None, by="uniform", widths=[width], groups=[64], fixed=fixed)

    def row(self, made: Made) -> dict:
        """Make a checkpoint and compare it with the original on held-out observations; done once."""
        path = ROWS / f"{made.name}.json"
        if path.exists():
            return json.loads(path.read_text())
        out = RUNS / "checkpoints" / made.name
        profile = self.blank_profile if made.blank else self.profile
        quantize_policy(POLICY, made.scheme, out, method=made.method, profile=profile, overwrite=True)
        model, _ = moqa.load(out, verify=False)
        shifts = self.comparison.against(model)
        found = open_checkpoint(out, verify=False)
        row = {
            "policy": str(POLICY), "plan": made.plan, "size": made.size, "method": made.method, "seed": made.seed,
            "bits": found.bits_per_weight, "bytes": found.bytes, "module_bits": self._bits(made.scheme),
            "action_error": shifts["action"] ** 0.5,
            "alignment": {level: shifts[level] for level in ("module", "layer", "token")},
            "success": {}, "milliseconds_per_action": None, "folder": str(out),
        }  # fmt: skip
        write_json(row, path)
        print(f"{made.name}: {row['bits']:.2f} bits, action error {row['action_error']:.4f}", flush=True)
        return row

    def original(self) -> dict:
        account = self.uniform(2.5).account
        values = sum(unit.weights for unit in self.profile.record.units)
        shifts = dict.fromkeys(("module", "layer", "token", "action"), 0.0)
        return self._unquantized("original", POLICY, shifts) | {
            "looks": self.looks(), "expert_error": self.expert_error(self.view.model),
            "weights": values + account.kept_weights,
        }  # fmt: skip

    def blind(self) -> dict:
        """The control of the original: the same policy, to which every picture is the average picture."""
        out, policy = RUNS / "blind", SmallPolicy.from_pretrained(POLICY, dtype=torch.float32)
        policy.config.picture_gain = policy.vision_encoder.gain = 0.0
        shifts, error = self.comparison.against(policy), self.expert_error(policy)
        policy.to(torch.bfloat16).save_pretrained(out)
        return self._unquantized("hypothesis-blind", out, shifts) | {"expert_error": error}

    def _unquantized(self, plan: str, folder: Path, shifts: Mapping[str, float]) -> dict:
        return {
            "policy": str(POLICY), "plan": plan, "size": 16.0, "method": "none", "seed": 0, "bits": 16.0,
            "bytes": (folder / "model.safetensors").stat().st_size, "module_bits": dict.fromkeys(PARTS, 16.0),
            "action_error": shifts["action"] ** 0.5,
            "alignment": {level: shifts[level] for level in ("module", "layer", "token")}, "success": {},
            "milliseconds_per_action": None, "folder": str(folder),
        }  # fmt: skip

    @torch.no_grad()
    def expert_error(self, model: torch.nn.Module) -> float:
        """Root mean square length of the difference between a policy's actions and the expert's, held out."""
        actions = self.view.task.call(model, self.rows).clamp(-1, 1)
        return float((actions - self.expert).square().sum(-1).mean().sqrt())

    @torch.no_grad()
    def looks(self) -> dict[str, float]:
        """What the original's actions depend on: their change if one kind of input is that of another observation."""
        pixels, words = 3 * self.view.model.config.image_size**2, self.view.model.config.most_words
        kinds = {"pictures": slice(0, pixels), "state": slice(pixels, -words), "words": slice(-words, None)}
        actions, found = self.view.task.call(self.view.model, self.rows), {}
        for kind, place in kinds.items():
            other = self.rows.clone()
            other[:, place] = self.rows.roll(len(self.rows) // 2, 0)[:, place]
            moved = self.view.task.call(self.view.model, other)
            found[kind] = float((moved - actions).square().sum(-1).mean().sqrt())
        return found

    def _bits(self, plan: Plan) -> dict[str, float]:
        """Stored bits per weight of each part."""
        found = {}
        for part in PARTS:
            units = [unit for unit in self.profile.record.units if unit.role == part]
            stored = sum(plan.units[unit.name].stored_bytes(unit.shape) for unit in units)
            found[part] = stored * 8 / sum(unit.weights for unit in units)
        return found


def closed_loop(row: dict, seed: int, episodes: int, processes: int) -> dict:
    """The row with what the policy does to the robot, for one seed."""
    name = row["plan"] if (row["plan"], row["size"]) in CONTROLS else f"{row['plan']}-{row['size']:g}"
    out = RUNS / "rollouts" / f"{name}-{seed}"
    if not (out / "rollout.json").exists():
        rollout(row["folder"], out, episodes=episodes, seed=seed, videos=seed == 0, processes=processes)
    record = json.loads((out / "rollout.json").read_text())
    success = {task: [one["successes"], one["episodes"]] for task, one in record["tasks"].items()}
    total = [sum(one[n] for one in success.values()) for n in range(2)]
    print(f"{name} seed {seed}: {total[0]}/{total[1]}", flush=True)
    return row | {
        "seed": seed, "success": success, "milliseconds_per_action": record["milliseconds_per_action"],
        "crashed": sum(one["crashed"] for one in record["tasks"].values()),
    }  # fmt: skip


def speed(row: dict, threads: int) -> dict:
    """Milliseconds of a call and peak memory, in a process of its own."""
    command = [sys.executable, "benchmarks/vla_speed.py", row["folder"], str(threads)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def _profile(source: str, samples: int) -> Profile:
    folder = RUNS / "profile"
    if (folder / "profile.json").exists():
        return moqa.read_profile(folder)
    return profile_policy(POLICY, source, folder, samples=samples)
