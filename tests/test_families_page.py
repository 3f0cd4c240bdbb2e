"""Every family of the installed transformers in its default shape: the page in docs/ says what moqa understands."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def page():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import family_page
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return family_page


@pytest.fixture(scope="module")
def families(page):
    return list(page.survey())


def test_the_page_is_what_is_found(page, families):
    assert page.page(families) == page.PAGE.read_text(encoding="utf-8"), "run `make families`"


def test_all_causal_language_models_are_on_it(page, families):
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() <= {(family.model_type, family.kind) for family in families}


def test_enough_mixtures_are_understood(families):
    mixtures = {f.model_type for f in families if f.refused is None and f.experts}
    assert len(mixtures) >= 47
    assert mixtures >= {"qwen3_5_moe", "llama4", "gemma4", "gemma4_text", "deepseek_v3", "gpt_oss", "mixtral"}


def test_numbers_are_those_of_the_configuration(families):
    found = {(f.model_type, f.kind): (f.layers, f.experts, f.top_k) for f in families}
    assert found["deepseek_v3", "DeepseekV3ForCausalLM"] == (61, 256, 8)
    assert found["gemma4_text", "Gemma4ForCausalLM"] == (30, 128, 8)
    assert found["ernie4_5_moe", "Ernie4_5_MoeForCausalLM"] == (28, 64, 6)
    assert found["minimax_m3_vl", "MiniMaxM3SparseForConditionalGeneration"] == (60, 128, 4)


def test_refusals_say_why_in_one_line(families):
    reasons = [family.refused for family in families if family.refused]
    assert reasons
    assert all(re.fullmatch(r"[^\n]{20,}", reason) and " meta" not in reason for reason in reasons)
