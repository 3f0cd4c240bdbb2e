"""Sampling options beside temperature and nucleus, what a model's folder says about them, grammars, echoed prompts."""

import json
import re

import pytest
import torch
from families import random_model
from test_generate import Says, ids_of, shares
from transformers import GenerationConfig

from moqa.errors import MoqaError
from moqa.generation import PromptCache, Sampling, generate, json_grammar, load_any, loop, tokens
from moqa.generation.run import begin_grammar

GREEDY = {"max_tokens": 24, "temperature": 0}
OWN = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return load_any(tiny_model)


def text_of(tiny, prompt, **options):
    return "".join(piece.text for piece in generate(*tiny, prompt, Sampling(**options)))


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"min_p": 0.5}, [0.625, 0.375, 0, 0]),
            ({"min_p": 0.5, "temperature": 0.5}, [1, 0, 0, 0]),
            ({"logit_bias": {3: 100}}, [0, 0, 0, 1]),
            ({"logit_bias": {0: -100, 1: 0.0}}, [0, 0.6, 0.3, 0.1]),
        ],
    )
    def test_change_how_often_tokens_come(self, options, expected):
        found = ids_of(Says([0.5, 0.3, 0.15, 0.05]), [9], Sampling(max_tokens=3000, seed=4, **options))
        assert shares(found) == pytest.approx(expected, abs=0.03)

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"presence_penalty": 0.6}, [0, 1, 0, 0]),  # once it was written, and not once more
            ({"frequency_penalty": 0.3}, [0, 0, 1, 0]),
            ({"presence_penalty": -0.6}, [0, 0, 0, 0]),
            ({"logit_bias": {1: 0.6}}, [1, 1, 1, 1]),
        ],
    )
    def test_count_what_was_written_and_not_the_prompt(self, options, expected):
        model = Says([0.5, 0.3])
        assert ids_of(model, [0, 0, 0], Sampling(max_tokens=4, temperature=0, **options)) == expected

    @pytest.mark.parametrize("option", [{"logit_bias": {10: 1}}, {"logit_bias": {-1: 1}}])
    def test_name_tokens_that_there_are(self, option):
        with pytest.raises(MoqaError, match="logit_bias has token"):
            tokens(Says([1.0]), [1], Sampling(**option))


class TestDefaults:
    def completed(self, own, **options):
        model = Says([1.0])
        model.generation_config = GenerationConfig(**own)
        return Sampling(**options).completed(model)

    def test_are_those_of_the_folder(self):
        found = self.completed(OWN, top_k=5, temperature=1.0)
        assert (found.temperature, found.top_p, found.top_k, found.min_p) == (1.0, 0.95, 5, 0.1)
        assert found.repetition_penalty == 1.1
        assert self.completed({}) == Sampling()
        assert self.completed({"do_sample": False}).greedy
        assert self.completed({"top_k": -1}).top_k == 0

    def test_are_refused_where_they_make_no_sense(self):
        config = GenerationConfig()
        config.temperature = 7.0
        model = Says([1.0])
        model.generation_config = config
        with pytest.raises(MoqaError, match=r"generation_config.json says temperature 7.0: should be less"):
            Sampling().completed(model)
        assert Sampling(temperature=1).completed(model).temperature == 1

    def test_hold_for_every_command(self, moqa_command, tiny_model, tmp_path):
        folder = tmp_path / "model"
        folder.mkdir()
        for file in tiny_model.iterdir():
            (folder / file.name).symlink_to(file)
        (folder / "generation_config.json").unlink()
        (folder / "generation_config.json").write_text(json.dumps({"top_k": 1, "temperature": 0.7, "eos_token_id": 0}))

        def written(command, *options, model=folder):
            code, out, err = moqa_command(command, model, *options, "--max-tokens", "8", stdin="The")
            assert code == 0, err
            return out

        greedy = written("generate", "The", "--temperature", "0", model=tiny_model)
        assert written("generate", "The") == greedy != written("generate", "The", model=tiny_model)
        assert written("generate", "The", "--top-k", "0") != greedy
        assert (
            written("chat")
            == written("chat", "--temperature", "0", model=tiny_model)
            != written("chat", "--top-k", "0")
        )


class TestGrammar:
    def test_holds_for_every_text(self, tiny):
        pattern = 'start: "a" /[0-9]{3}/ ("!" | "?")'
        for seed in range(4):
            found = text_of(tiny, "The", grammar=pattern, seed=seed, max_tokens=20)
            assert re.fullmatch(r"a[0-9]{3}[!?]", found), found

    def test_may_be_written_as_llama_cpp_does(self, tiny):
        assert text_of(tiny, "The", grammar='root ::= "yes" | "no"', **GREEDY) in ("yes", "no")

    def test_of_json(self, tiny):
        schema = {
            "type": "object", "properties": {"n": {"type": "integer"}, "of": {"enum": ["a", "b"]}},
            "required": ["n", "of"], "additionalProperties": False,
        }  # fmt: skip
        for seed in range(3):
            *_, last = pieces = list(
                generate(*tiny, "The", Sampling(grammar=json_grammar(schema), seed=seed, max_tokens=400))
            )
            found = json.loads("".join(piece.text for piece in pieces))
            assert isinstance(found["n"], int)
            assert found["of"] in ("a", "b")
            assert last.finish.finish_reason == "stop"

    def test_ends_with_an_end_token_where_more_could_follow(self, tiny):
        found = text_of(tiny, "The", grammar='start: "a"+', logit_bias={0: 100}, max_tokens=20)
        assert set(found) == {"a"}

    @pytest.mark.parametrize(
        "grammar", ["start: nothing", "%%%", "root ::= " + "(" * 5000, 'start: %json {"type": "x"}']
    )
    def test_that_is_none_is_an_error(self, tiny, grammar):
        with pytest.raises(MoqaError, match=r"^the grammar cannot be") as error:
            begin_grammar(*tiny, Sampling(grammar=grammar))
        assert "\n" not in str(error.value)

    def test_changes_nothing_else(self, tiny):
        free = text_of(tiny, "The", **GREEDY)
        assert text_of(tiny, "The", grammar=r"start: /(.|\n)*/", **GREEDY) == free


class TestEcho:
    @pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "lfm2_moe"])
    def test_reports_the_prompt_as_transformers_sees_it(self, family, monkeypatch):
        monkeypatch.setattr(loop, "CHUNK", 16)
        model = random_model(family, eos_token_id=None)
        model.generation_config.eos_token_id = None
        prompt = torch.randint(2, 512, (40,), generator=torch.Generator().manual_seed(2)).tolist()
        sampling = Sampling(echo=True, logprobs=2, **GREEDY)
        memory = PromptCache()
        steps = list(tokens(model, prompt, sampling, memory))
        *chunks, first = steps[:4]
        echoed = [token for chunk in chunks for token in chunk]
        assert [token.id for token in echoed] == prompt
        assert echoed[0].logprob is None
        true = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        assert [token.logprob for token in echoed[1:]] == pytest.approx(
            true[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist(), abs=1e-4
        )
        assert [token.top[0][0] for token in echoed[1:]] == true[:-1].argmax(1).tolist()
        assert [first.id, *(token.id for token in steps[4:])] == ids_of(model, prompt)
        again = tokens(model, prompt, sampling, memory)
        assert sum(len(next(again)) for _ in range(3)) == 40, "also what was read before"

    def test_comes_before_what_is_written(self, tiny):
        prompt = "The history of the city"
        written = text_of(tiny, prompt, **GREEDY)
        pieces = list(generate(*tiny, prompt, Sampling(echo=True, stop=("history",), **GREEDY)))
        assert "".join(piece.text for piece in pieces) == prompt + written, "stop strings are looked for behind it"
        offsets = [at for piece in pieces for _, at in piece.tokens]
        assert offsets == sorted(offsets)
        assert len(offsets) == pieces[-1].finish.prompt_tokens + 24

    def test_may_be_all(self, tiny):
        last = list(generate(*tiny, [599, 3523], Sampling(echo=True, max_tokens=0, logprobs=1)))[-1]
        assert [token.id for token, _ in last.tokens] == [599, 3523]
        assert (last.finish.finish_reason, last.finish.completion_tokens, last.text) == (
            "length", 0, tiny[1].decode([599, 3523]),
        )  # fmt: skip
        with pytest.raises(MoqaError, match="--max-tokens 0: should be greater than or equal to 1"):
            Sampling.of(max_tokens=0)
