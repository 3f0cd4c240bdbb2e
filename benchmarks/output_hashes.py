"""Hashes of everything the commands write for the reference model and five tiny families, to compare two versions.

A change that should change nothing for users is checked on one machine in two folders:

    .venv/bin/python benchmarks/output_hashes.py --moqa ../before/.venv/bin/moqa before.json
    .venv/bin/python benchmarks/output_hashes.py after.json --against before.json

The second call exits with 1 and names every file whose bytes differ. Only the `moqa` command is used, so both versions
run the same script. Processors and thread counts round differently: hashes of two machines are not compared.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAMILIES = ("gpt_oss", "deepseek_v4", "llama", "qwen3_moe", "jamba")
# pages carry times; a proof names the temporary folder in which its checkpoint was made
NOT_COMPARED = {"report.html", "proof.json"}


def commands(model: str, windows: int, context: int, routed: bool) -> list[str]:
    """The commands of the README on one model, with the options that change bytes."""
    size = f"--samples {windows} --context {context}"
    known = "--data wiki=wiki.calib.txt --data novels=novels.calib.txt"
    held_out = f"--data wiki=wiki.test.txt --data python=python.test.txt --against {model} --context {context}"
    steps = [
        f"profile {model} {known} {size} -o profile --json profile-printed.json",
        "plan profile --bpw 3 -o budget.json",
        "plan profile --bpw 3 --ties layer --objective minimax --hedge 0.5 -o layer.json",
        "plan profile --widths 4 --strategy uniform -o uniform.json",
        f"quantize {model} --plan budget.json --cache full -o gptq",
        f"quantize {model} --plan uniform.json --method rtn -o rtn",
        f"quantize {model} --bpw 3.5 {known} {size} -o oneshot",
        f"evaluate gptq {held_out} --windows {windows} --json gptq-evaluated.json",
        f"evaluate rtn {held_out} --windows {windows} --json rtn-evaluated.json",
        f"evaluate {model} {held_out} --windows {windows} --json original-evaluated.json",
    ]
    if routed:
        steps += [
            *(f"plan profile --bpw 3 --strategy {s} -o {s}.json" for s in ("paper", "paper-v1", "frequency", "random")),
            f"quantize {model} --plan frequency.json --cache 1% -o frequency",
        ]
        steps += [
            f"adjust gptq --data german=german.calib.txt --samples 8 --mode {mode} -o adjusted-{mode}"
            for mode in ("residual", "fp16", "requant", "swap")
        ]
        steps += [
            f"evaluate gptq --adjustment adjusted-residual {held_out} --windows 8 --json adjusted-evaluated.json",
        ]
    return steps


def hashes(folder: Path, inputs: set[str]) -> dict[str, str]:
    """File below a folder -> sha256 of its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path: path.relative_to(folder).as_posix() for path in files}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path, name in names.items()
        if path.name not in NOT_COMPARED and name.split("/")[0] not in inputs
    }


def run(moqa: list[str], folder: Path, model: Path, steps: list[str]) -> dict[str, str]:
    """Hashes of what the commands write in an empty folder, which only holds the model and the texts."""
    for text in (ROOT / "reference" / "text").glob("*.txt"):
        (folder / text.name).symlink_to(text)
    (folder / "model").symlink_to(model)
    inputs = {path.name for path in folder.iterdir()}
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for step in steps:
        done = subprocess.run([*moqa, *step.split()], cwd=folder, env=environment, capture_output=True, text=True)
        # a command that a model does not allow is refused in both versions alike
        (folder / "refused.txt").open("a").write(f"{step}: {done.returncode}\n")
        if done.returncode not in (0, 2):
            sys.exit(f"moqa {step}: exit code {done.returncode}\n{done.stderr}")
    return hashes(folder, inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--moqa", default=str(Path(sys.executable).with_name("moqa")), help="the command to run")
    parser.add_argument("--against", type=Path, help="hashes of another version, made on this machine")
    parser.add_argument("--models", default=f"reference,{','.join(FAMILIES)}", help="some of them")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from families import FAMILIES as ALL
    from families import random_model, save, train_tokenizer

    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = train_tokenizer([ROOT / "reference" / "text" / "wiki.calib.txt"])
        for name in options.models.split(","):
            folder = Path(temporary) / name
            (folder / "run").mkdir(parents=True)
            reference = name == "reference"
            model = ROOT / "reference" / "model" if reference else save(random_model(name), tokenizer, folder / "made")
            routed = reference or ALL[name].moe_layers > 0
            steps = commands("model", *((32, 128) if reference else (8, 32)), routed)
            found |= {f"{name}/{k}": v for k, v in run([options.moqa], folder / "run", model, steps).items()}
            print(f"{name}: {sum(key.startswith(f'{name}/') for key in found)} files", flush=True)
    options.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    if options.against:
        before = json.loads(options.against.read_text())
        before = {key: value for key, value in before.items() if key.split("/")[0] in options.models.split(",")}
        before = {key: value for key, value in before.items() if key.rsplit("/")[-1] not in NOT_COMPARED}
        different = sorted(key for key in before.keys() | found.keys() if before.get(key) != found.get(key))
        for key in different:
            print(f"differs: {key}")
        print(f"{len(before) - len(different)} of {len(before)} files are the same")
        sys.exit(bool(different))


if __name__ == "__main__":
    main()
