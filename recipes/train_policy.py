"""Train the small policy by behaviour cloning, on demonstrations of recipes/metaworld_demos.py.

    python recipes/train_policy.py --demonstrations runs/vla/demonstrations -o runs/vla/policy --minutes 40

Writes a folder that moqa's commands for policies read. The learning rate follows the processor's clock.
An interrupted run goes on after its last checkpoint when the same command is given again.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from moqa.data.demonstrations import is_held_out, read_demonstrations, read_episodes
from moqa.policies.small import PAD, SmallPolicy, SmallPolicyConfig

BATCH, PEAK_RATE, WEIGHT_DECAY, AVERAGE = 32, 1.2e-3, 0.02, 0.998
SHIFT = 1  # pixels at most
UNTOLD = 0.25  # share of observations without the hand's place, which has to be seen then
CHECKPOINT_SECONDS = 30


def read(folders: Sequence[Path]) -> tuple[dict[str, Tensor], list[str], str, list[str]]:
    """All observations, the words, the robot and the instructions."""
    sources = [read_demonstrations(f"demonstrations={folder}") for folder in folders]
    tasks = [read_episodes(source, task) for source in sources for task in source.files]
    instructions = [task.instruction for task in tasks]
    words = [PAD, *sorted({word for text in instructions for word in text.split()})]
    data = {
        "images": torch.cat([task.images for task in tasks]).movedim(-1, 1).contiguous(),
        "state": torch.cat([task.state for task in tasks]),
        "actions": torch.cat([task.actions for task in tasks]),
        "held_out": torch.cat([is_held_out(task.episodes) for task in tasks]),
        "task": torch.arange(len(tasks)).repeat_interleave(torch.tensor([len(task.state) for task in tasks])),
    }
    return data, words, sources[0].robot, instructions


def average_picture(data: dict[str, Tensor]) -> tuple[Tensor, float]:
    """[3, height, width] mean of all pictures to learn from, and the standard deviation of pixels around it."""
    pictures = data["images"][~data["held_out"]][::4].float() / 255
    return pictures.mean(0), float((pictures - pictures.mean(0)).std())


def shifted(images: Tensor, random: np.random.Generator) -> Tensor:
    """[batch, 3, height, width] uint8 -> 0..1, each moved by up to SHIFT pixels and made brighter or darker."""
    side = images.shape[-1]
    padded = functional.pad(images.float() / 255, [SHIFT] * 4, mode="replicate")
    places = random.integers(0, 2 * SHIFT + 1, (len(images), 2))
    moved = torch.stack([one[:, y : y + side, x : x + side] for one, (y, x) in zip(padded, places, strict=True)])
    light = torch.from_numpy(random.uniform(0.9, 1.1, (len(images), 1, 1, 1)).astype(np.float32))
    return (moved * light).clamp(0, 1)


@torch.no_grad()
def held_out_errors(policy: SmallPolicy, data: dict[str, Tensor], ids: Tensor) -> tuple[float, float]:
    """With the observations' own pictures, and with those of other episodes of the same task: what seeing gains."""
    chosen = data["held_out"].nonzero()[:, 0][::8]
    tasks = data["task"][chosen]
    pictures = torch.cat([some.roll(len(some) // 2) for some in (chosen[tasks == task] for task in tasks.unique())])
    chosen = chosen[tasks.argsort(stable=True)]
    errors = []
    for some, others in zip(chosen.split(128), pictures.split(128), strict=True):
        for seen in (some, others):
            actions = policy(data["images"][seen].float() / 255, data["state"][some], ids[data["task"][some]])
            errors.append((actions.clamp(-1, 1) - data["actions"][some]).abs().mean((1, 2)))
    return float(torch.cat(errors[::2]).mean()), float(torch.cat(errors[1::2]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--demonstrations", type=Path, required=True, action="append", help="may be repeated")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--minutes", type=float, default=40, help="of one processor")
    parser.add_argument("--peak-rate", type=float, default=PEAK_RATE)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    data, words, robot, instructions = read(options.demonstrations)
    known = data["state"][~data["held_out"]]
    mean, scale = known.mean(0).tolist(), known.std(0).clamp_min(0.01).tolist()
    picture, spread = average_picture(data)
    config = SmallPolicyConfig(
        image_size=data["images"].shape[-1], words=words, robot=robot, chunk=data["actions"].shape[1],
        action_size=data["actions"].shape[2], picture_gain=1 / spread, state_mean=mean, state_scale=scale,
    )  # fmt: skip
    ids = torch.stack([config.ids(text) for text in instructions])
    policy, average = SmallPolicy(config), SmallPolicy(config).eval()
    policy.vision_encoder.get_buffer("average").copy_(picture)
    average.load_state_dict(policy.state_dict())
    optimizer = torch.optim.AdamW(policy.parameters(), options.peak_rate, weight_decay=WEIGHT_DECAY)
    train, step, used = (~data["held_out"]).nonzero()[:, 0], 0, 0.0
    options.out.mkdir(parents=True, exist_ok=True)
    unfinished = options.out / "unfinished.pt"
    if unfinished.exists():
        state = torch.load(unfinished, weights_only=True)
        policy.load_state_dict(state["policy"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, used = state["step"], state["seconds"]
    begin, saved, losses = time.process_time() - used, time.process_time(), []
    while (seconds := time.process_time() - begin) < options.minutes * 60:
        random = np.random.default_rng([options.seed, step])
        share = seconds / (options.minutes * 60)
        rate = options.peak_rate * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = rate
        some = train[random.integers(0, len(train), BATCH)]
        images, state = shifted(data["images"][some], random), data["state"][some]
        untold = torch.from_numpy(random.random((BATCH, 1)) < UNTOLD)
        state = torch.where(untold, state.new_tensor(mean), state)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actions = policy(images, state, ids[data["task"][some]])
        loss = functional.smooth_l1_loss(actions.float(), data["actions"][some], beta=0.1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        step += 1
        losses.append(loss.item())
        keep = min(AVERAGE, step / (step + 10))
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), policy.parameters(), strict=True):
                slow.lerp_(fast, 1 - keep)
        if time.process_time() - saved > CHECKPOINT_SECONDS:
            saved = time.process_time()
            own, others = held_out_errors(average, data, ids)
            errors = f"held out {own:.4f}, with other pictures {others:.4f}"
            print(f"{seconds / 60:.1f} min, step {step}: {np.mean(losses):.4f}, {errors}", flush=True)
            losses.clear()
            torch.save(
                {
                    "policy": policy.state_dict(), "average": average.state_dict(), "step": step,
                    "optimizer": optimizer.state_dict(), "seconds": time.process_time() - begin,
                }, unfinished.with_suffix(".new"),
            )  # fmt: skip
            unfinished.with_suffix(".new").rename(unfinished)
    average.to(torch.bfloat16).save_pretrained(options.out)
    own, others = held_out_errors(average.float(), data, ids)
    about = {
        "minutes": options.minutes, "steps": step, "seed": options.seed, "observations": len(train),
        "held_out_error": own, "held_out_error_with_other_pictures": others,
    }  # fmt: skip
    (options.out / "training.json").write_text(json.dumps(about, indent=1) + "\n")
    unfinished.unlink(missing_ok=True)
    print(json.dumps(about))


if __name__ == "__main__":
    main()
