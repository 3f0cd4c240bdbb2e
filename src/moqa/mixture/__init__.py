"""Mixtures: each prompt is answered by the variant of a model that suits it, chosen by a small router."""

from moqa.mixture.build import BuiltMixture, build_mixture

__all__ = ["BuiltMixture", "build_mixture"]
