"""Cutting distributions in windows and splits, and finding text that both sides of an evaluation have."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from moqa.data import (
    Distribution,
    cut_windows,
    overlap,
    overlap_share,
    prompt_start,
    refuse_overlap,
    shingles,
    split_held_out,
)
from moqa.errors import MoqaError

REFERENCE = Path(__file__).parents[1] / "reference"
NAMES = ["wiki", "novels", "python", "math", "german", "french"]
TOKENIZER = AutoTokenizer.from_pretrained(REFERENCE / "model")

documents = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=80), min_size=1, max_size=6)


def reference_text(name, split="calib", size=None):
    return (REFERENCE / "text" / f"{name}.{split}.txt").read_text(encoding="utf-8")[:size]


def distribution(*texts):
    return Distribution("wiki", texts, "FILE")


def all_tokens(texts):
    stream = []
    for index, text in enumerate(texts):
        stream += [TOKENIZER.eos_token_id] * bool(index) + TOKENIZER(text, add_special_tokens=False).input_ids
    return stream


class TestWindows:
    @settings(deadline=None)
    @given(documents, st.integers(2, 9))
    def test_all_windows_are_the_token_stream_in_order(self, texts, context):
        stream = all_tokens(texts)
        if len(stream) < context:
            with pytest.raises(MoqaError, match=f"holds {len(stream)} tokens"):
                cut_windows(distribution(*texts), TOKENIZER, context)
            return
        windows = cut_windows(distribution(*texts), TOKENIZER, context)
        assert windows.inputs.dtype == torch.int64
        assert windows.inputs.flatten().tolist() == stream[: len(stream) // context * context]

    def test_windows_begin_as_prompts_do(self):
        tokenizer = AutoTokenizer.from_pretrained(REFERENCE / "model")
        mark = tokenizer.convert_tokens_to_ids("<|endoftext|>")
        tokenizer._tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", pair="$A $B", special_tokens=[("<|endoftext|>", mark)]
        )
        text = reference_text("wiki", size=2000)
        stream = all_tokens([text])
        windows = cut_windows(distribution(text), tokenizer, 9, count=3)
        assert prompt_start(tokenizer) == [mark]
        assert prompt_start(TOKENIZER) == []
        assert windows.inputs[:, 0].tolist() == [mark] * 3
        assert windows.inputs[0, 1:].tolist() == stream[:8]
        # all 8 tokens after the first one are predicted
        assert cut_windows(distribution(text), tokenizer, 9, count=1).text_bytes == len(TOKENIZER.decode(stream[:8]))
        # a chat template has written the first token already
        assert cut_windows(distribution("<|endoftext|>" + text), tokenizer, 9, count=3).inputs[0].tolist() == [
            mark, *stream[:8]
        ]  # fmt: skip

    @settings(deadline=None)
    @given(documents, st.integers(2, 5), st.integers(1, 8), st.integers(0, 2**70))
    def test_chosen_windows_are_different_ones_of_all(self, texts, context, count, seed):
        text = "".join(texts) + "0 1 2 3 4 5 6 7 8 9 " * 3
        everything = cut_windows(distribution(text), TOKENIZER, context).inputs
        chosen = cut_windows(distribution(text), TOKENIZER, context, count, seed).inputs
        assert chosen.shape == (min(count, len(everything)), context)
        # In order and without repetition: each is found after the one before.
        rows, position = everything.tolist(), -1
        for window in chosen.tolist():
            position = rows.index(window, position + 1)

    def test_same_seed_same_windows_and_seed_0_starts_with_the_first(self):
        wiki = distribution(reference_text("wiki", size=30_000))
        everything = cut_windows(wiki, TOKENIZER, 64).inputs
        cuts = [cut_windows(wiki, TOKENIZER, 64, 8, seed).inputs for seed in (0, 0, 1, 2)]
        assert torch.equal(cuts[0], cuts[1])
        assert torch.equal(cuts[0][0], everything[0])
        assert not torch.equal(cuts[0], cuts[2])
        assert not torch.equal(cuts[2], cuts[3])
        assert torch.equal(cut_windows(wiki, TOKENIZER, 64, 10**6, seed=3).inputs, everything)

    @settings(deadline=None)
    @given(documents)
    def test_text_bytes_of_one_window_are_the_text_after_its_first_token(self, texts):
        count = len(all_tokens(texts))
        if count < 2:
            return
        second = TOKENIZER(texts[0], add_special_tokens=False, return_offsets_mapping=True).offset_mapping[1:2]
        begin = second[0][0] if second else len(texts[0])
        windows = cut_windows(distribution(*texts), TOKENIZER, count)
        assert windows.text_bytes == len(texts[0][begin:].encode()) + sum(len(text.encode()) for text in texts[1:])

    @pytest.mark.parametrize("name", ["wiki", "python", "math"])
    def test_text_bytes_are_those_of_the_decoded_text(self, name):
        text = reference_text(name, size=20_000)
        windows = cut_windows(distribution(text[:9000], text[9000:]), TOKENIZER, 32, 20)
        decoded = [TOKENIZER.decode(window[1:], skip_special_tokens=True) for window in windows.inputs]
        assert not any("\N{REPLACEMENT CHARACTER}" in text for text in decoded)  # no border inside a character
        assert windows.text_bytes == sum(len(text.encode()) for text in decoded)

    def test_the_separator_counts_no_bytes(self):
        texts = ("héllo wörld", "x y", "zwölf")
        windows = cut_windows(distribution(*texts), TOKENIZER, len(all_tokens(texts)))
        assert windows.text_bytes == len("".join(texts).encode()) - 1  # the first token is "h"

    def test_spaces_that_offsets_leave_out_are_counted(self):
        class Trimming:
            """Splits at spaces and leaves them out of the offsets, as byte-level tokenizers may be set to do."""

            is_fast, eos_token_id, name_or_path = True, None, "trimming"

            def __call__(self, texts, **_):
                spans = [[match.span() for match in re.finditer(r"\S+", text)] for text in texts]
                return {"input_ids": [[1] * len(s) for s in spans], "offset_mapping": spans}

        assert cut_windows(distribution("ab cd  ef", "gh"), Trimming(), 4).text_bytes == len(" cd  ef" + "gh")

    def test_shingles_are_those_of_the_chosen_text_only(self):
        text = reference_text("wiki", size=60_000)
        whole = shingles([text])
        everything = cut_windows(distribution(text), TOKENIZER, 256)
        assert overlap_share(everything.hashes, whole) == 1
        assert overlap_share(whole, everything.hashes) > 0.98  # all but the tail of less than a window
        few = cut_windows(distribution(text), TOKENIZER, 256, 8)
        assert 0 < len(few.hashes) < len(everything.hashes) / 4
        assert overlap_share(few.hashes, whole) == 1

    def test_short_windows_that_touch_are_hashed_as_one_text(self):
        text = reference_text("novels", size=20_000)
        assert overlap_share(shingles([text]), cut_windows(distribution(text), TOKENIZER, 16).hashes) > 0.98

    def test_many_documents(self):
        texts = [f"Document {index}." for index in range(600)]
        assert (
            cut_windows(distribution(*texts), TOKENIZER, 32).inputs.flatten().tolist()
            == all_tokens(texts)[: -(len(all_tokens(texts)) % 32) or None]
        )

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"context": 256}, "wiki=FILE holds 3 tokens: one window of --context 256 needs at least 256"),
            ({"context": 1}, "--context 1 leaves no token to predict"),
            ({"context": 2, "count": 0}, "0 windows of wiki"),
        ],
    )
    def test_errors(self, arguments, message):
        with pytest.raises(MoqaError, match=message):
            cut_windows(distribution("a b c"), TOKENIZER, **arguments)

    def test_a_tokenizer_without_offsets_is_refused(self):
        with pytest.raises(MoqaError, match="the tokenizer slow returns no offsets"):
            cut_windows(distribution("a"), SimpleNamespace(is_fast=False, name_or_path="slow"), 2)


class TestSplit:
    @given(documents, st.floats(0.01, 0.99))
    def test_splits_never_overlap_and_lose_nothing(self, texts, share):
        try:
            calibration, held_out = split_held_out(distribution(*texts), share)
        except MoqaError:
            return
        assert "".join(calibration.texts) + "".join(held_out.texts) == "".join(texts)
        assert "".join(calibration.texts).strip()
        assert "".join(held_out.texts).strip()
        assert (calibration.name, held_out.origin) == ("wiki", "FILE")

    @given(st.lists(st.text("ab", min_size=20, max_size=30), min_size=10, max_size=30), st.floats(0.2, 0.8))
    def test_many_documents_stay_whole(self, texts, share):
        calibration, held_out = split_held_out(distribution(*texts), share)
        assert calibration.texts + held_out.texts == tuple(texts)
        held = sum(map(len, held_out.texts))
        assert abs(held - share * sum(map(len, texts))) <= 30

    def test_one_document_is_cut_at_a_newline(self):
        calibration, held_out = split_held_out(distribution(reference_text("wiki", size=50_000)))
        assert calibration.texts[0].endswith("\n")
        assert 0.15 < len(held_out.texts[0]) / 50_000 < 0.25

    def test_a_huge_document_among_small_ones_is_cut(self):
        calibration, held_out = split_held_out(distribution("start", "word " * 1000, "end"))
        assert (len(calibration.texts), len(held_out.texts)) == (2, 2)
        assert calibration.texts[1].endswith(" ")

    def test_text_without_spaces_is_cut_where_asked(self):
        calibration, held_out = split_held_out(distribution("字" * 100), 0.3)
        assert (calibration.texts, held_out.texts) == (("字" * 70,), ("字" * 30,))

    @pytest.mark.parametrize("texts", [("a",), (), ("   \n  ",), ("word      ",)])
    def test_an_empty_split_is_refused(self, texts):
        with pytest.raises(MoqaError, match="wiki=FILE is too short to hold out 20%"):
            split_held_out(distribution(*texts))

    @pytest.mark.parametrize("share", [0, 1, -0.5, 20, float("nan")])
    def test_the_share_is_checked(self, share):
        with pytest.raises(MoqaError, match="between 0 and 1"):
            split_held_out(distribution("a b c"), share)


def steps(work):
    """Lines of Python that some work runs: what goes byte by byte runs millions, on any machine."""
    count = 0

    def trace(*_):
        nonlocal count
        count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


class TestOverlap:
    @settings(deadline=None)
    @given(st.data())
    def test_hashes_do_not_depend_on_the_cut(self, data):
        text = reference_text(data.draw(st.sampled_from(NAMES)), size=6_000)
        begin = data.draw(st.integers(0, len(text)))
        part = text[begin : data.draw(st.integers(begin, len(text)))]
        assert np.isin(shingles([part]), shingles([text])).all()

    @settings(deadline=None)
    @given(st.integers(1, 700), st.text(" \n\ta€", max_size=3000))
    def test_hashes_do_not_depend_on_the_chunks(self, chunk, text):
        text = reference_text("french", size=2_000) + text
        whole = shingles([text])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(overlap, "CHUNK", chunk)
            assert np.array_equal(shingles([text]), whole)

    def test_whitespace_is_collapsed(self):
        text = reference_text("novels", size=20_000)
        assert np.array_equal(shingles([text.replace(" ", "\n \t")]), shingles([text]))

    def test_format_and_rate(self):
        hashes = shingles([reference_text("wiki"), reference_text("wiki", size=50_000)])
        assert hashes.dtype == np.uint64
        assert (np.diff(hashes) > 0).all()
        assert len(hashes) == pytest.approx(1_000_000 / overlap.SAMPLING, rel=0.05)
        assert len(shingles([])) == len(shingles(["", "short"])) == 0
        assert overlap_share(shingles([]), hashes) == overlap_share(hashes, shingles([])) == 0

    def test_a_megabyte_takes_no_more_steps_than_a_page(self):
        text = reference_text("novels")
        shingles([text])  # imports what it needs
        assert steps(lambda: shingles([text])) < 1000

    @pytest.mark.parametrize("name", NAMES)
    def test_held_out_reference_texts_are_accepted_and_fitted_ones_refused(self, name):
        calibration, test = reference_text(name), reference_text(name, "test")
        fitted = {other: shingles([reference_text(other)]) for other in {name, "wiki", "python"}}
        refuse_overlap(name, shingles([test]), fitted)
        leak = calibration[len(calibration) // 3 :][: len(test) // 19]  # 5 % of what is evaluated
        with pytest.raises(MoqaError, match=f"of the text of {name} was already fitted on .*in {name}"):
            refuse_overlap(name, shingles([test, leak]), fitted)

    def test_overlaps_with_several_fitted_distributions_add_up(self):
        texts = {name: reference_text(name, size=3_500) for name in NAMES}
        fitted = {name: shingles([texts[name]]) for name in ("wiki", "novels")}
        evaluated = shingles([reference_text("math", size=90_000), texts["wiki"], texts["novels"]])
        assert max(overlap_share(evaluated, hashes) for hashes in fitted.values()) < overlap.MAX_OVERLAP
        with pytest.raises(MoqaError, match=r"of mix was already fitted on \(.*in wiki.*in novels|in novels.*in wiki"):
            refuse_overlap("mix", evaluated, fitted)
        refuse_overlap("mix", evaluated, {})


def test_importing_is_light():
    code = "import sys, moqa.data; print({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
