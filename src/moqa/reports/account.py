"""Sections on the byte account and on provenance."""

from collections.abc import Iterable, Sequence

from moqa.profiling.record import SELF
from moqa.profiling.store import Profile
from moqa.reports.allocation import Allocation
from moqa.reports.blocks import BarPart, Bars, Key, KeyEntry, Note, PageElement, Section, Table, number
from moqa.reports.gather import Artifacts
from moqa.reports.palette import LINES, NOVEL, STRATEGIES
from moqa.reports.rows import Row
from moqa.storage.paths import label

_SELF_SENTENCE = (
    f"The distribution {SELF} is text that the model wrote itself: it needs no data from outside, and a share of it "
    "in the fit (the hedge) keeps a plan from serving only the texts it was given."
)


def account_section(made: Sequence[Allocation]) -> Section | None:
    """Section on the bytes of every plan, by what they are used for."""
    if not made:
        return None
    rows = tuple(
        (one.label, _bytes(one.account.units), _bytes(one.account.kept), _bytes(one.account.headers),
         _bytes(one.account.checkpoint), f"{one.account.checkpoint / 2**20:.2f}", number(one.account.bits_per_weight),
         number(one.account.model_bits_per_weight), one.ties)
        for one in made
    )  # fmt: skip
    heads = ("Plan", "Units", "Kept", "Headers", "Total bytes", "MiB", "Bits per weight", "of the whole model", "Ties")
    reading = (
        "Units are the planned matrices with their scales and zero-points; kept is what stays in high precision "
        "(embeddings, norms, routers); headers are the tables of contents of the weight files. Bits per weight counts "
        "all bytes of the units."
    )
    return Section("Bytes", "Byte account", reading, [*_bars(made), Table("", heads, rows, words=(0, 8))])


def _bars(made: Sequence[Allocation]) -> list[PageElement]:
    longest = max(one.account.checkpoint for one in made)
    colours = {"units": LINES[0], "kept": STRATEGIES["uniform"], "headers": NOVEL}
    bars = tuple(
        (one.label, tuple(BarPart(f"{_bytes(size)} bytes of {name}", size / longest, colour)
                          for name, colour in colours.items() if (size := getattr(one.account, name))))
        for one in made
    )  # fmt: skip
    key = tuple(KeyEntry(name, colour, shape="square") for name, colour in colours.items())
    return [Bars("", bars), Key(key)]


def provenance_section(found: Artifacts, made: Sequence[Allocation], rows: Sequence[Row]) -> Section:
    """Section on the model, versions, settings, and the texts that were fitted on."""
    blocks: list[PageElement] = []
    if len(found.fingerprints) > 1:
        short = ", ".join(f[:12] for f in found.fingerprints)
        text = f"They belong to {len(found.fingerprints)} different models ({short})."
        blocks.append(Note(text, "These artifacts do not fit together"))
    blocks.append(_facts(found, rows))
    if found.profile:
        blocks.append(_distributions(found.profile, found, rows))
    mixtures = [one for one in made if one.mixture]
    if mixtures:
        blocks.append(_mixtures(mixtures))
    if any(SELF in one.mixture for one in mixtures) or (found.profile and SELF in found.profile.statistics):
        blocks.append(Note(_SELF_SENTENCE))
    reading = "What the numbers on this page were measured on, and with what; enough to make them again."
    return Section("Provenance", "Provenance", reading, blocks)


def _bytes(count: int) -> str:
    return f"{count:,}".replace(",", "\u202f")


def _facts(found: Artifacts, rows: Sequence[Row]) -> Table:
    models = [record.model for record in found.records]
    facts = [
        ("Model", _joined(models or (label(row.evaluation.model) for row in rows if row.original))),
        ("Architecture", _joined(record.model_type for record in found.records)),
        ("Fingerprint", _joined(f[:12] for f in found.fingerprints)),
        ("moqa", _joined(record.moqa for record in found.records)),
    ]
    if found.profile:
        r, s = found.profile.record, found.profile.record.settings
        experts = len({(u.layer, u.expert) for u in r.units if u.role == "expert"})
        shape = f"{r.layers} layers, {len(r.units)} units"
        shape += f", {experts} routed experts, {r.top_k} per token" if experts else ", dense"
        grid = "symmetric" if s.symmetric else "with zero-points"
        facts += [
            ("Shape", shape),
            ("Profile", f"{s.samples} windows of {s.context} tokens per distribution, seed {s.seed}, "
             f"groups of {s.group_size}, {grid}"),
        ]  # fmt: skip
    if len(found.profiles) > 1 and found.profile:
        others = [label(p.folder) for p in found.profiles if p is not found.profile]
        facts.append(("Profiles", f"shown: {label(found.profile.folder)}; also found: {', '.join(others)}"))
    left = {part for p in found.profiles for part in p.record.left_out}
    left |= {part for c in found.checkpoints for part in c.manifest.left_out}
    facts.append(("Left out", _joined(sorted(left))))
    facts.append(("Methods", _joined(c.manifest.method for c in found.checkpoints)))
    contexts = _joined(str(row.evaluation.context) for row in rows)
    if rows:
        tokens = _joined(f"{q.tokens}" for row in rows for q in row.evaluation.distributions.values())
        against = _joined(label(row.evaluation.against or "") for row in rows)
        facts.append(("Evaluation", f"windows of {contexts} tokens, {tokens} predicted tokens per distribution"
                      + (f", against {against}" if against else "")))  # fmt: skip
    return Table("", ("", ""), tuple((name, value) for name, value in facts if value), words=(0, 1))


def _distributions(profile: Profile, found: Artifacts, rows: Sequence[Row]) -> Table:
    planned = {name for plan in found.plans.values() for name in plan.known}
    fitted = planned | {name for c in found.checkpoints for name in c.manifest.fitted}
    fitted |= {name for row in rows for name in row.evaluation.fitted_on}
    lines = []
    for name, record in profile.record.distributions.items():
        role = "the model's own text" if name == SELF else "yes" if name in fitted else "no"
        lines.append((name, record.origin, str(record.samples), _bytes(record.tokens), role))
    heads = ("Distribution", "Calibration text", "Windows", "Tokens", "Fitted on")
    return Table("Distributions of the profile", heads, tuple(lines), words=(0, 1, 4))


def _mixtures(made: Sequence[Allocation]) -> Table:
    lines = []
    for one in made:
        parts = sorted(one.mixture.items(), key=lambda item: (item[0] == SELF, item[0]))
        lines.append((one.label, ", ".join(f"{name} {share * 100:.0f} %" for name, share in parts)))
    return Table("Calibration mixture", ("Plan", "Share of each distribution"), tuple(lines), words=(0, 1))


def _joined(values: Iterable[str]) -> str:
    """Distinct values in order of appearance, joined with commas."""
    return ", ".join(dict.fromkeys(value for value in values if value))
