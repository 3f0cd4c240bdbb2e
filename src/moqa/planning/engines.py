"""Engines: programs that serve models, with the ties and schemes that each of them can run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moqa.errors import MoqaError
from moqa.registry import Registry, check_known

if TYPE_CHECKING:
    from moqa.format.scheme import Scheme

Ties = Literal["unit", "expert", "layer_projection", "layer"]
OWN = "moqa"
# from the finest to the coarsest
_COARSER: tuple[Ties, ...] = ("unit", "expert", "layer_projection", "layer")


@dataclass(frozen=True)
class Engine:
    """A program that serves models.

    Attributes:
        name: as users type it.
        ties: the finest that it runs.
        schemes: all that it runs but unquantized units, those of a width in the order of preference; None for moqa's
            own runtime, which runs what a profile has.
        export: the format of `moqa export` that it reads; None if it reads checkpoints.
    """

    name: str
    ties: Ties
    schemes: Callable[[], tuple[Scheme, ...]] | None = None
    export: str | None = None

    def checked(self, ties: Ties | None) -> Ties:
        """Ties of a plan for this engine: those that were given, or else the finest that it runs.

        >>> ENGINES["llama.cpp"].checked(None), ENGINES["llama.cpp"].checked("layer")
        ('layer_projection', 'layer')

        Raises:
            MoqaError: if they are unknown, or finer than what it runs.
        """
        if ties is None:
            return self.ties
        check_known("--ties", ties, _COARSER)
        runs = _COARSER[_COARSER.index(self.ties) :]
        if ties not in runs:
            raise MoqaError(f"--engine {self.name} does not run --ties {ties}", f"it runs {' and '.join(runs)}")
        return ties

    def holds(self, scheme: Scheme, shape: tuple[int, int]) -> bool:
        """Whether it can store [out, in] weights in a scheme: rows of other engines are whole blocks and groups.

        >>> from moqa.format.scheme import Scheme
        >>> scheme = Scheme(width=4, group_size=128, symmetric=True)
        >>> ENGINES["vllm"].holds(scheme, (256, 320)), ENGINES["moqa"].holds(scheme, (256, 320))
        (False, True)
        """
        whole = self.schemes is None or scheme.is_unquantized or shape[1] % scheme.group_size == 0
        return whole and scheme.holds(shape)

    def candidates(
        self, widths: Sequence[int], encodings: Sequence[str] | None, groups: Sequence[int] | None, mixed: bool
    ) -> tuple[Scheme, ...]:
        """Schemes of another engine that a plan may choose from, by rising bytes.

        >>> [scheme.encoding for scheme in ENGINES["llama.cpp"].candidates((2, 3), None, None, mixed=False)]
        ['q2_k', 'q3_k']

        Args:
            widths: 1 to 8, and 16 for no quantization; those that it does not have are left out.
            encodings: names; None means all.
            groups: numbers of weights that share a scale; None means all.
            mixed: whether a width may occur in every encoding and group; else only in the first.

        Raises:
            MoqaError: if it has none of them.
        """
        from moqa.format.scheme import Scheme
        from moqa.format.tiles import KEEP_WIDTH

        assert self.schemes is not None
        there = self.schemes()
        for option, typed, known in (
            ("--encodings", encodings, dict.fromkeys(scheme.encoding for scheme in there)),
            ("--groups", groups, dict.fromkeys(scheme.group_size for scheme in there)),
        ):
            for one in typed or ():
                if one not in known:
                    names = ", ".join(map(str, known))
                    raise MoqaError(f"{option} {one} is nothing that --engine {self.name} runs", f"it runs {names}")
        found = [
            scheme
            for scheme in there
            if scheme.width in widths and (not encodings or scheme.encoding in encodings)
            and (not groups or scheme.group_size in groups)
        ]  # fmt: skip
        if not mixed:
            found = list({scheme.width: scheme for scheme in reversed(found)}.values())
        if KEEP_WIDTH in widths:
            found.append(Scheme(width=KEEP_WIDTH))
        if not found:
            known_widths = ", ".join(map(str, sorted({scheme.width for scheme in there})))
            typed_widths = ",".join(map(str, widths))
            raise MoqaError(f"--engine {self.name} runs nothing of --widths {typed_widths}", f"it runs {known_widths}")
        return tuple(sorted(found, key=lambda scheme: scheme.stored_bytes((2**12, 2**12))))


def _of_llama_cpp() -> tuple[Scheme, ...]:
    from moqa.format.encodings import GGML_TYPES
    from moqa.format.scheme import Scheme

    return tuple(Scheme(width=kind.width, group_size=kind.weights, encoding=kind.name) for kind in GGML_TYPES.values())


def _of_vllm() -> tuple[Scheme, ...]:
    from moqa.format.scheme import Scheme

    return tuple(Scheme(width=width, group_size=group, symmetric=True) for width in (4, 8) for group in (128, 64, 32))


ENGINES: Registry[Engine] = Registry("--engine")
for _engine in (
    Engine(OWN, "unit"),
    Engine("llama.cpp", "layer_projection", _of_llama_cpp, "gguf"),
    Engine("vllm", "layer", _of_vllm, "compressed-tensors"),
):
    ENGINES[_engine.name] = _engine
