"""Generation: the tokens that transformers would write, whole characters, stop strings, memory, conversations."""

import json
import math
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from families import VOCABULARY, random_model
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TopPLogitsWarper

import moqa
from moqa.errors import MoqaError
from moqa.generation import Chat, ContextError, PromptCache, Sampling, chat_prompt, generate, load_any, loop, tokens
from moqa.generation.processors import Nucleus
from moqa.generation.run import encode
from moqa.generation.text import Detokenizer, StopStrings
from moqa.planning import Budget, plan
from moqa.profiling import profile
from moqa.quantization import quantize
from moqa.tasks.causal_lm import load_tokenizer

MODEL = Path(__file__).parents[1] / "reference" / "model"
GREEDY = Sampling(max_tokens=24, temperature=0)


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return load_any(tiny_model)


class TestEncode:
    @staticmethod
    def of(tokenizer, text, context):
        """Tokens of a text, or the error, and the longest text that was tokenized."""
        lengths = []

        def counting(text, **options):
            lengths.append(len(text))
            return tokenizer(text, **options)

        try:
            return encode(counting, text, context=context), max(lengths)
        except ContextError as error:
            return error, max(lengths)

    def test_stops_where_a_text_is_surely_too_long(self, tiny):
        error, longest = self.of(tiny[1], "a word " * 100_000, 1000)
        assert "context of the model holds 1000" in str(error)
        assert longest <= 10_000

    @pytest.mark.parametrize("text", ["", "a word", "a word " * 500, "=" * 9000])
    def test_is_the_same_for_what_may_fit(self, tiny, text):
        assert self.of(tiny[1], text, 1000) == (tiny[1](text)["input_ids"], len(text))


@pytest.fixture(scope="module")
def packed(tiny_model, texts, tmp_path_factory):
    """Folder of the tiny model's checkpoint at 4 bits."""
    folder = tmp_path_factory.mktemp("packed")
    options = {"samples": 2, "context": 32, "self_samples": 0, "method": "rtn"}
    measured = profile(tiny_model, [texts["wiki"]], folder / "profile", **options)
    chosen = plan(measured, Budget.parse(bpw=7.1), strategy="uniform", widths=(4,))
    return quantize(tiny_model, chosen, folder / "out", method="rtn", profile=measured)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


class Says(torch.nn.Module):
    """A model of ten tokens that always gives the same probabilities, and remembers what it was asked to read."""

    def __init__(self, probabilities, ends=()):
        super().__init__()
        self.logits = torch.tensor([*probabilities, *[0.0] * (10 - len(probabilities))]).log()
        self.read = []
        text = types.SimpleNamespace(vocab_size=10, max_position_embeddings=5000, eos_token_id=None, model_type="says")
        self.config = types.SimpleNamespace(get_text_config=lambda: text, model_type="says")
        self.generation_config = types.SimpleNamespace(eos_token_id=list(ends))
        self.device = torch.device("cpu")

    def forward(self, input_ids, past_key_values, use_cache, logits_to_keep):
        self.read += input_ids[0].tolist()
        return types.SimpleNamespace(logits=self.logits[None, None], past_key_values=object())


def ids_of(model, prompt, sampling=GREEDY, memory=None):
    return [token.id for token in tokens(model, prompt, sampling, memory) if token]


def theirs(model, prompt, count=24):
    out = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None)
    return out[0, len(prompt) :].tolist()


def shares(found):
    return [found.count(token) / len(found) for token in range(4)]


class TestTokens:
    @pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "lfm2_moe", "mixtral", "llama"])
    def test_are_those_of_transformers(self, family, monkeypatch):
        monkeypatch.setattr(loop, "CHUNK", 16)
        model = random_model(family, eos_token_id=None)
        model.generation_config.eos_token_id = None
        prompt = torch.randint(2, VOCABULARY, (50,), generator=torch.Generator().manual_seed(2)).tolist()
        found = list(tokens(model, prompt, GREEDY))
        assert found[:3] == [None] * 3, "the prompt is read in chunks"
        assert [token.id for token in found[3:]] == theirs(model, prompt)

    def test_of_a_checkpoint_are_those_of_transformers(self, packed):
        model, _ = moqa.load(packed)
        assert ids_of(model, [599, 3523, 298]) == theirs(model, [599, 3523, 298])

    def test_follow_the_seed_and_nothing_else(self, tiny):
        first, other = (Sampling(max_tokens=12, seed=seed) for seed in (1, 2))
        torch.manual_seed(0)
        expected = ids_of(tiny[0], [599], first)
        torch.manual_seed(9)
        mixed = list(zip(tokens(tiny[0], [599], first), tokens(tiny[0], [3523, 5], other), strict=True))
        assert [token.id for token, _ in mixed] == expected != [token.id for _, token in mixed]
        assert ids_of(tiny[0], [599], Sampling(max_tokens=12)) != ids_of(tiny[0], [599], Sampling(max_tokens=12))

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, [0.5, 0.3, 0.15, 0.05]),
            ({"temperature": 0.5}, [0.685, 0.247, 0.062, 0.007]),
            ({"top_k": 2}, [0.625, 0.375, 0, 0]),
            ({"top_p": 0.81}, [0.526, 0.316, 0.158, 0]),
            ({"top_p": 0}, [1, 0, 0, 0]),
            ({"temperature": 1e-9}, [1, 0, 0, 0]),
        ],
    )
    def test_come_as_often_as_the_model_says(self, options, expected):
        found = ids_of(Says([0.5, 0.3, 0.15, 0.05]), [9], Sampling(max_tokens=3000, seed=4, **options))
        assert shares(found) == pytest.approx(expected, abs=0.03)

    def test_repeat_less_if_asked(self):
        model = Says([0.5, 0.3, 0.15, 0.05])
        found = ids_of(model, [9, 9], Sampling(max_tokens=4, temperature=0, repetition_penalty=10))
        assert found[:2] == [0, 1], "the negative logits of what was written are multiplied"

    def test_end_at_any_end_token(self):
        assert ids_of(Says([0, 0, 0, 1], ends=(3, 5)), [1]) == [3]

    def test_report_the_models_own_probabilities(self, tiny):
        sampling = Sampling(max_tokens=3, temperature=0.3, top_k=2, seed=0, logprobs=4)
        found = [token for token in tokens(tiny[0], [599, 3523], sampling) if token]
        text = [599, 3523, *(token.id for token in found)]
        true = tiny[0](torch.tensor([text])).logits[0].log_softmax(-1)[1:]
        for token, row in zip(found, true, strict=False):
            assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
            assert [i for i, _ in token.top] == row.topk(4).indices.tolist()

    def test_fill_the_context_if_nothing_is_said(self, tiny, monkeypatch):
        monkeypatch.setattr(tiny[0].config, "max_position_embeddings", 12)
        assert len(ids_of(tiny[0], [5] * 8, Sampling(temperature=0))) == 4
        with pytest.raises(ContextError, match=r"8 tokens of prompt and 5 .* 13: .* 12"):
            tokens(tiny[0], [5] * 8, Sampling(max_tokens=5))
        with pytest.raises(ContextError, match="12 tokens of prompt and 1 "):
            tokens(tiny[0], [5] * 12, Sampling())

    @pytest.mark.parametrize(("prompt", "word"), [([], "no tokens"), ([1, 8192], "8192"), ([-1], "-1")])
    def test_refuse_prompts_that_are_none(self, tiny, prompt, word):
        with pytest.raises(MoqaError, match=word):
            tokens(tiny[0], prompt, GREEDY)

    @pytest.mark.parametrize("temperature", [0, 1])
    def test_are_not_made_of_nan(self, temperature):
        with pytest.raises(MoqaError, match="NaN"):
            ids_of(Says([math.nan]), [1], Sampling(temperature=temperature))


class TestSampling:
    @pytest.mark.parametrize(
        ("option", "value", "problem"),
        [
            ("max_tokens", 0, "should be greater than or equal to 1"),
            ("temperature", math.nan, "finite"),
            ("temperature", 2.5, "less than or equal to 2"),
            ("top_p", 1.5, "less than or equal to 1"),
            ("stop", [""], "at least 1 character"),
            ("repetition_penalty", 0, "greater than 0"),
        ],
    )
    def test_says_what_is_out_of_range(self, option, value, problem):
        with pytest.raises(MoqaError, match=f"--{option.replace('_', '-')} .*{problem}"):
            Sampling.of(**{option: value})


class TestMemory:
    def reads(self, model, memory, prompt):
        """Tokens that follow a prompt, and how many of it were read."""
        before = len(model.read)
        found = ids_of(model, prompt, Sampling(max_tokens=2, temperature=0), memory)
        return found, len(model.read) - before - 1

    def test_reads_only_what_is_new(self, monkeypatch):
        model, memory = Says([1.0]), PromptCache()
        assert self.reads(model, memory, [1, 2, 3]) == ([0, 0], 3)
        assert memory.ids == [1, 2, 3, 0], "the last token was never read"
        assert self.reads(model, memory, [1, 2, 3, 0, 0, 5]) == ([0, 0], 2)

    @pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "lfm2_moe"])
    def test_never_changes_what_is_written(self, family):
        model = random_model(family, eos_token_id=None)
        model.generation_config.eos_token_id = None
        memory = PromptCache()
        first = list(range(20, 40))
        said = ids_of(model, first, GREEDY, memory)
        for prompt in ([*first, *said, 7, 8], [*first, *said[:3], 9, 9], [5, 6], [5, 6]):
            assert ids_of(model, prompt, GREEDY, memory) == ids_of(model, prompt, GREEDY)

    def test_takes_back_what_another_text_does_not_have(self):
        model, memory = random_model("qwen3_moe", eos_token_id=None), PromptCache()
        ids_of(model, [20, 21, 22, 23], GREEDY, memory)
        assert memory.keep([20, 21, 22, 9, 9]) == 3
        assert memory.keep([20, 21, 22]) == 2, "one token is always left to read"

    def test_forgets_a_read_that_was_broken_off(self, monkeypatch):
        model, memory = random_model("qwen3_moe", eos_token_id=None), PromptCache()
        longer = [20, 21, 22, *ids_of(model, [20, 21, 22], GREEDY, memory), 5, 6]
        expected = ids_of(model, longer, GREEDY)

        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(model.model.layers[-1], "forward", interrupted)
            with pytest.raises(KeyboardInterrupt):
                ids_of(model, longer, GREEDY, memory)
        assert ids_of(model, longer, GREEDY, memory) == expected


class TestText:
    @given(st.lists(st.integers(0, 8191), max_size=30), st.lists(st.integers(0, 8191), max_size=6))
    def test_of_all_pieces_is_what_the_tokenizer_decodes(self, tokenizer, ids, before):
        words = Detokenizer(tokenizer, before)
        pieces = [words.push(token) for token in ids]
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        assert "".join(pieces) + words.flush() == whole

    @given(st.text(max_size=30))
    def test_comes_in_whole_characters(self, tokenizer, text):
        ids = tokenizer(text)["input_ids"]
        words = Detokenizer(tokenizer)
        pieces = [words.push(token) for token in ids]
        assert "".join(pieces) + words.flush() == tokenizer.decode(ids, skip_special_tokens=True)
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)

    def test_gives_a_character_that_never_ends(self, tokenizer):
        words = Detokenizer(tokenizer)
        assert [words.push(token) for token in tokenizer("é€")["input_ids"][:-1]][-1] == ""
        assert words.flush() == "\ufffd"

    def test_keeps_the_space_after_the_prompt(self):
        backend = Tokenizer(models.WordLevel({"▁the": 0, "▁cat": 1, "[UNK]": 2}, unk_token="[UNK]"))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
        words = Detokenizer(tokenizer, [0])
        assert [words.push(token) for token in (1, 0)] == [" cat", " the"]
        assert tokenizer.decode([1, 0]) == "cat the"

    @given(st.text("ab\n", max_size=30), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), st.data())
    def test_ends_before_the_first_stop_string(self, text, stops, data):
        ends = [(n, n - len(s)) for n in range(len(text) + 1) for s in stops if text[:n].endswith(s)]
        found, hit, at = StopStrings(stops), False, 0
        given_out = ""
        while at < len(text) and not hit:
            step = data.draw(st.integers(1, 6))
            piece, hit = found.push(text[at : at + step])
            given_out, at = given_out + piece, at + step
        if ends:
            assert hit
            assert given_out == text[: min(ends)[1]]
        else:
            assert given_out + found.flush() == text
            assert not hit

    def test_ends_before_the_longest_of_those_that_end_together(self):
        assert StopStrings(["b", "ab"]).push("xab") == ("x", True)
        assert StopStrings(["ab", "a"]).push("xab") == ("x", True)
        assert StopStrings(["yz", "b"]).push("abyz") == ("a", True)

    def test_holds_back_no_more_than_it_must(self):
        stops = StopStrings(["user:", "err"])
        assert [stops.push(piece)[0] for piece in ("Yes, use", " r", "us")] == ["Yes, ", "use r", ""]


class TestGenerate:
    def test_streams_text_and_ends_with_counts(self, tiny):
        *pieces, last = generate(*tiny, "The history of", GREEDY)
        written = ids_of(tiny[0], tiny[1]("The history of")["input_ids"])
        assert "".join(piece.text for piece in [*pieces, last]) == tiny[1].decode(written)
        assert [token.id for piece in [*pieces, last] for token, _ in piece.tokens] == written
        assert all(piece.finish is None for piece in pieces)
        finish = last.finish
        assert (finish.finish_reason, finish.prompt_tokens, finish.completion_tokens) == ("length", 3, 24)
        assert finish.prefill_seconds > 0
        assert finish.decode_tokens_per_second == pytest.approx(23 / finish.decode_seconds)

    def test_is_a_function_of_the_library(self, tiny):
        assert [piece.text for piece in moqa.generate(*tiny, [599], GREEDY)]

    def test_stops_at_a_text_that_spans_tokens(self, tiny):
        whole = "".join(piece.text for piece in generate(*tiny, "The", GREEDY))
        inside = whole[9:15]
        pieces = list(generate(*tiny, "The", GREEDY.model_copy(update={"stop": ("not there", inside)})))
        assert "".join(piece.text for piece in pieces) == whole[: whole.index(inside)]
        finish = pieces[-1].finish
        assert finish.finish_reason == "stop"
        assert finish.completion_tokens < 24
        assert len([token for piece in pieces for token in piece.tokens]) < finish.completion_tokens

    def test_gives_what_was_held_back_at_the_end(self, tiny):
        whole = "".join(piece.text for piece in generate(*tiny, "The", GREEDY))
        pieces = list(generate(*tiny, "The", GREEDY.model_copy(update={"stop": (whole[-3:] + "!",)})))
        assert "".join(piece.text for piece in pieces) == whole
        assert [token.id for piece in pieces for token, _ in piece.tokens] == ids_of(tiny[0], tiny[1]("The").input_ids)

    def test_says_where_each_token_begins(self, tiny):
        pieces = list(generate(*tiny, "The", GREEDY))
        whole = "".join(piece.text for piece in pieces)
        for token, at in [pair for piece in pieces for pair in piece.tokens]:
            text = tiny[1].decode([token.id])
            assert whole[at : at + len(text)] == text or "\ufffd" in text

    def test_leaves_the_end_token_out(self, tokenizer):
        last = list(generate(Says([0, 0, 0, 1], ends=(3,)), tokenizer, [5], GREEDY))[-1]
        assert (last.text, last.tokens, last.finish.finish_reason, last.finish.completion_tokens) == ("", (), "stop", 1)
        assert last.finish.decode_tokens_per_second is None

    def test_refuses_text_that_is_none(self, tiny):
        with pytest.raises(MoqaError, match="not valid Unicode"):
            generate(*tiny, "\ud800")

    def test_knows_the_end_tokens_of_generation_config(self, packed, tmp_path):
        copy = tmp_path / "copy"
        copy.mkdir()
        for file in packed.iterdir():
            (copy / file.name).symlink_to(file)
        (copy / "generation_config.json").unlink(missing_ok=True)
        (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
        assert loop.end_tokens(load_any(copy)[0]) == {0, 7, 9}


class TestChat:
    def test_reads_only_what_is_new(self, tiny):
        chat = Chat(*tiny, Sampling(max_tokens=8, temperature=0))
        first, second = (list(chat.say(text))[-1].finish for text in ("Hello there", "And then?"))
        assert first.cached_tokens == 0
        # the last token that was written was never read
        assert second.cached_tokens == first.prompt_tokens + first.completion_tokens - 1
        assert second.prompt_tokens - second.cached_tokens <= 12

    def test_answers_as_one_that_reads_all_again(self, tiny, monkeypatch):
        asked = []

        def noted(model, tokenizer, ids, sampling, memory):
            asked.append((ids, sampling))
            return generate(model, tokenizer, ids, sampling, memory=memory)

        monkeypatch.setattr("moqa.generation.chat.generate", noted)
        chat = Chat(*tiny, Sampling(max_tokens=8, seed=5))
        read = 0
        for text in ("Hello there", "And then?", "Go on"):
            *pieces, last = chat.say(text)
            assert last.finish.cached_tokens == read, "tokens that no tokenizer would choose are kept too"
            read = last.finish.prompt_tokens + last.finish.completion_tokens - 1
            answer = "".join(piece.text for piece in [*pieces, last])
            ids, sampling = asked[-1]
            assert answer == "".join(piece.text for piece in generate(*tiny, ids, sampling))
            again, _ = chat_prompt(tiny[1], chat.messages[:-1])
            without_spaces = [tiny[1].decode(found).replace(" ", "") for found in (ids, again)]
            assert without_spaces[0] == without_spaces[1]
        assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 3
        assert len({sampling.seed for _, sampling in asked}) == 3, "answers to the same question differ"

    def test_remembers_an_answer_that_was_broken_off(self, tiny):
        chat = Chat(*tiny, Sampling(max_tokens=50, temperature=0))
        answer = chat.say("Hello")
        part = "".join(next(answer).text for _ in range(5))
        answer.close()
        assert chat.messages[-1] == {"role": "assistant", "content": part}
        assert list(chat.say("Go on"))[-1].finish.cached_tokens > 0
        chat.reset()
        assert list(chat.say("Hello"))[-1].finish.cached_tokens == 0

    def test_is_still_there_when_the_context_is_full(self, tiny, monkeypatch):
        monkeypatch.setattr(tiny[0].config, "max_position_embeddings", 48)
        chat = Chat(*tiny, Sampling(max_tokens=20, temperature=0))
        assert list(chat.say("Hello"))[-1].finish.completion_tokens == 20
        with pytest.raises(ContextError):
            list(chat.say("word " * 60))
        assert len(chat.messages) == 2
        finish = list(chat.say("Yes"))[-1].finish
        assert finish.prompt_tokens + finish.completion_tokens == 48, "the answer ends where the context does"

    def test_has_plain_lines_without_a_template(self, tokenizer):
        turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", " Yes"), ("user", "So?")]
        ids, stops = chat_prompt(tokenizer, [{"role": role, "content": text} for role, text in turns])
        assert tokenizer.decode(ids) == "system: Be brief.\nuser: Hi\nassistant: Yes\nuser: So?\nassistant:"
        assert "\nuser:" in stops

    def test_follows_the_template(self, tokenizer, monkeypatch):
        template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        template += "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
        monkeypatch.setattr(tokenizer, "chat_template", template)
        ids, stops = chat_prompt(tokenizer, [{"role": "user", "content": "Hi"}])
        assert (tokenizer.decode(ids), stops) == ("<user>Hi<assistant>", ())
        with pytest.raises(MoqaError, match="refuses these messages: no system"):
            chat_prompt(tokenizer, [{"role": "system", "content": "Hi"}])


class TestCommands:
    def test_generate(self, moqa_command, packed):
        options = ("--max-tokens", "9", "--seed", "3", "--temperature", "0.7")
        code, out, _ = moqa_command("generate", packed, "The history of", *options, "--json")
        found = json.loads(out)
        assert code == 0
        assert found["text"]
        assert (found["finish_reason"], found["prompt_tokens"], found["completion_tokens"]) == ("length", 3, 9)
        assert found["decode_tokens_per_second"] == pytest.approx(8 / found["decode_seconds"])
        assert found["prefill_seconds"] > 0
        assert moqa_command("generate", packed, "The history of", *options)[1] == found["text"] + "\n"
        assert moqa_command("generate", packed, "-", *options, stdin="The history of")[1] == found["text"] + "\n"
        stop = found["text"][3:6]
        code, out, _ = moqa_command("generate", packed, "The history of", *options, "--stop", stop, "--threads", "1")
        assert (code, out) == (0, found["text"][: found["text"].index(stop)] + "\n")

    @pytest.mark.parametrize(
        ("args", "word"),
        [
            (("The", "--temperature", "-1"), "--temperature -1"),
            (("The", "--max-tokens", "40000"), "40001"),
            (("",), "no tokens"),
        ],
    )
    def test_generate_names_mistakes(self, moqa_command, tiny_model, args, word):
        code, out, err = moqa_command("generate", tiny_model, *args)
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1
        assert word in err

    def test_generate_reads_utf8_only(self, moqa_command, tiny_model):
        code, _, err = moqa_command("generate", tiny_model, "-", stdin=b"\xff\xfe")
        assert (code, err.count("\n")) == (2, 1)
        assert moqa_command("generate", tiny_model.parent / "none", "The")[0] == 2

    def test_chat(self, moqa_command, tiny_model):
        options = ("--max-tokens", "6", "--temperature", "0")
        code, out, _ = moqa_command("chat", tiny_model, *options, stdin="Hello\n\n/reset\nHello\nMore\n/exit\nHello\n")
        first, again, other = out.splitlines()[:3] if out.count("\n") == 3 else pytest.fail(out)
        assert code == 0
        assert first == again != other
        code, out, err = moqa_command("chat", tiny_model, "--max-tokens", "2", stdin="word " * 40000)
        assert (code, out) == (0, "")
        assert "/reset" in err

    def test_ctrl_c_stops_the_answer_and_not_the_chat(self, tiny_model):
        command = [sys.executable, "-m", "moqa", "chat", str(tiny_model), "--max-tokens", "20000", "--temperature", "0"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, **pipes) as chat:
            for _ in range(2):
                chat.stdin.write(b"Hello\n")
                chat.stdin.flush()
                assert chat.stdout.read(20), "it answers"
                chat.send_signal(signal.SIGINT)
            _, err = chat.communicate(timeout=120)
        assert (chat.returncode, err) == (0, b"")


@given(st.integers(2, 3000), st.floats(0.0, 0.999), st.floats(0.01, 20), st.integers(0, 10**6))
def test_the_nucleus_is_that_of_transformers(vocabulary, top_p, spread, seed):
    scores = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread
    ours, theirs = Nucleus(top_p)(None, scores), TopPLogitsWarper(top_p)(None, scores)
    different = (ours.isinf() != theirs.isinf()).sum()
    # sums in another order may decide otherwise about the token at the border
    assert different <= 1
    assert ours.max() == scores.max()
