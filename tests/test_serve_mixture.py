"""A mixture that is served: the variant of each text, what responses and metrics say of it, and damage on disk."""

import shutil
from functools import partial

import httpx
import openai
import pytest
from serving import PATIENCE, complete, fails, gauges, running

import moqa
from moqa.errors import MoqaError
from moqa.mixture.generate import continued, route_of
from moqa.serve import serve
from moqa.serve.mixture import RoutedVariants

WRITE = {"temperature": 0, "max_tokens": 16}
PROMPT = "The history of"


@pytest.fixture(scope="module")
def loaded(mix):
    return moqa.load(mix)


@pytest.fixture(scope="module")
def answers(loaded):
    """What each variant writes alone; they differ, or the tests would show nothing."""
    model, tokenizer = loaded
    ids, found = tokenizer(PROMPT).input_ids, {}
    for name in model.mixture.names:
        pieces = continued(model, tokenizer, ids, moqa.Sampling(**WRITE), route_of(model, ids, name))
        found[name] = "".join(piece.text for piece in pieces)
    assert len(set(found.values())) > 2
    return found


def served(folder, **options):
    model, tokenizer = moqa.load(folder)
    return running((model, tokenizer), adjusting=partial(RoutedVariants, model.mixture), **options)


@pytest.fixture(scope="module")
def url(mix):
    with served(mix) as address:
        yield address


@pytest.fixture(scope="module")
def http(url):
    with httpx.Client(base_url=url, timeout=PATIENCE) as client:
        yield client


class TestChoice:
    @pytest.mark.parametrize("name", ["base", "novels", "python", "wide"])
    def test_is_the_requests(self, http, answers, name):
        found = complete(http, prompt=PROMPT, variant=name, **WRITE).json()
        assert found["choices"][0]["text"] == answers[name]
        assert (found["variant"], found["confidence"], found["variant_problem"]) == (name, None, None)

    def test_is_the_routers_without_one(self, http, loaded, answers):
        model, tokenizer = loaded
        route = model.mixture.choose(tokenizer(PROMPT).input_ids)
        found = complete(http, prompt=PROMPT, **WRITE).json()
        assert (found["variant"], found["choices"][0]["text"]) == (route.variant, answers[route.variant])
        assert found["confidence"] == pytest.approx(route.confidence)

    def test_is_made_for_each_prompt(self, http, loaded, texts):
        model, tokenizer = loaded
        prompts = [texts[name].texts[0][:200] for name in ("python", "novels", "wiki")]
        routes = [model.mixture.choose(tokenizer(prompt).input_ids) for prompt in prompts]
        found = complete(http, prompt=prompts, n=2, **WRITE | {"temperature": 1.0}).json()
        assert found["variant"] == [route.variant for route in routes]
        assert found["confidence"] == pytest.approx([route.confidence for route in routes])

    def test_stands_in_the_last_chunk_of_a_stream(self, url, answers):
        messages = [{"role": "user", "content": "Hello"}]
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            ask = partial(
                client.chat.completions.create, model="tiny", messages=messages, extra_body={"variant": "wide"}
            )
            chunks = list(ask(stream=True, **WRITE))
        assert chunks[-1].model_extra["variant"] == "wide"

    def test_of_several_at_once_stays_what_it_is_alone(self, url, answers):
        from concurrent.futures import ThreadPoolExecutor

        def ask(name):
            with httpx.Client(base_url=url, timeout=PATIENCE) as http:
                return complete(http, prompt=PROMPT, variant=name, **WRITE).json()["choices"][0]["text"]

        names = [*answers, *answers]
        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(ask, names)) == [answers[name] for name in names]

    def test_is_counted(self, mix):
        with served(mix) as url, httpx.Client(base_url=url, timeout=PATIENCE) as http:
            complete(http, prompt=PROMPT, variant="wide", **WRITE)
            complete(http, prompt=PROMPT, **WRITE)
            found = gauges(http)
        assert found["moqa_routed_texts_total", "wide"] >= 1
        assert sum(value for (name, *_), value in found.items() if name == "moqa_routed_texts_total") == 2
        assert found["moqa_route_confidence_count",] == 1


class TestRefusals:
    def test_a_variant_that_is_not_there(self, http):
        fails(complete(http, prompt=PROMPT, variant="french", **WRITE), 400, "variant", "base, novels, python, wide")

    def test_an_adjustment(self, http):
        fails(complete(http, prompt=PROMPT, adjustment="python", **WRITE), 400, "adjustment", "give variant")

    def test_an_empty_prompt(self, http):
        fails(complete(http, prompt=[[]], **WRITE), 400, "prompt")

    def test_a_variant_where_there_is_no_mixture(self, tiny):
        with running(tiny) as url, httpx.Client(base_url=url, timeout=PATIENCE) as http:
            fails(complete(http, prompt=PROMPT, variant="base", **WRITE), 400, "variant", "the server has none")

    def test_adjustments_beside_a_mixture(self, mix):
        with pytest.raises(MoqaError, match="is a mixture, which takes no --adjust auto"):
            serve(mix, adjust=["auto"])


class TestDamage:
    @pytest.fixture
    def changed(self, mix, tmp_path):
        return shutil.copytree(mix, tmp_path / "mix")

    @pytest.mark.parametrize("how", ["deleted", "cut off"])
    @pytest.mark.parametrize(
        ("name", "file"), [("python", "adjustment.safetensors"), ("wide", "model-00002-of-00003.safetensors")]
    )
    def test_the_intact_answer_and_say_so(self, changed, answers, name, file, how):
        with served(changed) as url, httpx.Client(base_url=url, timeout=PATIENCE) as http:
            path = changed / name / file
            if how == "deleted":
                shutil.rmtree(path.parent)
            else:
                with path.open("r+b") as file:
                    file.truncate(100)
            found = complete(http, prompt=PROMPT, variant=name, **WRITE).json()
            assert found["variant"] != name
            assert found["choices"][0]["text"] == answers[found["variant"]]
            assert found["variant_problem"].startswith(f"{name} ")
            assert ".safetensors" in found["variant_problem"]
            assert gauges(http)["moqa_variant_failures_total",] == 1
            again = complete(http, prompt=PROMPT, variant="base", **WRITE).json()
            assert (again["variant"], again["variant_problem"]) == ("base", None)
