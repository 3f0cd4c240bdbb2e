"""What wider steps of codes gain where gptq rounds, in default plans. Writes docs/results/steps.md."""

import sys
from pathlib import Path
from statistics import mean
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from claims import claim, table_of
from demo import KNOWN, MODEL, NOVEL, ROOT, texts

import moqa
import moqa.methods.gptq as solver
from moqa.storage.temporary import temporary_folder

# of llama.cpp's types, in docs/results/low-bits.md
SIZES = (1.78, 1.97, 2.09, 2.26, 2.5, 2.6, 3.06, 3.21, 3.44, 4.25)
WINDOWS = 32
LOW_BITS = ROOT / "docs" / "results" / "low-bits.md"
PAGE = ROOT / "docs" / "results" / "steps.md"
# known and novel KL over llama.cpp's best, by whether a plan has 3 bits
WANTED = {False: (0.35, 0.6), True: (0.25, 0.45)}


class Divergences(NamedTuple):
    """Means of known and of novel texts, in nats."""

    known: float
    novel: float

    def __str__(self) -> str:
        return f"{self.known:.4f} / {self.novel:.4f}"


def main() -> None:
    """Measure both, and write the page."""
    wider = solver._ROOM
    before = measured((1.0,) * len(wider))
    after = measured(wider)
    PAGE.write_text(
        _PAGE.format(room=", ".join(f"{one:g}" for one in wider[1:]), windows=WINDOWS, **told(before, after))
    )


def measured(room: tuple[float, ...]) -> list[Divergences]:
    """Of the default plan at all sizes, from a profile that was made alike."""
    solver._ROOM = room
    found = []
    with temporary_folder() as folder:
        profile = moqa.profile(MODEL, texts("calib", KNOWN), folder / "profile")
        for bits in SIZES:
            out = folder / f"{bits}"
            moqa.quantize(MODEL, moqa.plan(profile, f"{bits}bpw"), out, profile=profile)
            scores = moqa.evaluate(out, texts("test", (*KNOWN, *NOVEL)), against=MODEL, windows=WINDOWS).distributions
            kl = {name: one.kl_divergence for name, one in scores.items()}
            found.append(Divergences(mean(kl[name] for name in KNOWN), mean(kl[name] for name in NOVEL)))
            print(bits, found[-1], flush=True)
    return found


def told(before: list[Divergences], after: list[Divergences]) -> dict[str, str]:
    """The rows and claims of the page."""
    rows, claims = [], []
    rivals = table_of(LOW_BITS, "bits")
    for bits, old, new in zip(SIZES, before, after, strict=True):
        fitting = [row["its known / novel KL"].split(" / ") for row in rivals if float(row["bits"]) <= bits + 0.005]
        best = [min(float(pair[at]) for pair in fitting) for at in range(2)]
        ratios = [kl / least for kl, least in zip(new, best, strict=True)]
        change = [fresh / earlier - 1 for fresh, earlier in zip(new, old, strict=True)]
        rows.append(
            f"| {bits} | {old} | {new} | {change[0]:+.0%} / {change[1]:+.0%} | "
            f"{best[0]:.4f} / {best[1]:.4f} | {ratios[0]:.2f} / {ratios[1]:.2f} |"
        )
        claims += [
            claim(
                ratio <= most, f"{bits} bits, wider steps: {kind} KL over llama.cpp's best: {ratio:.2f}; wanted {most}"
            )
            for kind, ratio, most in zip(("known", "novel"), ratios, WANTED[bits >= 3], strict=True)
        ]
    return {"rows": "\n".join(rows), "claims": "\n".join(claims)}


_PAGE = """# Wider steps where gptq rounds codes

Command: `python benchmarks/step_sizes.py` (reference model, default plans, 64 windows of wiki and of novels, seed 0;
{windows} held-out windows per text). KL divergence from the original in nats, known (wiki, novels) / novel (python,
math, german, french).

gptq rounds a weight together with the errors that were passed on to it. Both spread further than the weights alone, so
a step that fits the weights clips them. Steps of codes of 1, 2, 3 and 4 bits are now {room} times
those that fit; plain rounding keeps the ones that fit. Profile, plan and checkpoint are made once without and once
with wider steps, at the same bytes. The factors were chosen on held-out windows of this model, by known texts, at 1.78,
2.1, 3.06 and 4.25 bits: three numbers, not fits. Novel texts gain as much.

| bits | steps that fit | wider steps | change | llama.cpp's best of that size or less | ratios |
|---:|---|---|---|---|---|
{rows}

llama.cpp's numbers are those of [low bits](low-bits.md), which has more windows, and whose plans were made before.

{claims}
"""


if __name__ == "__main__":
    main()
