"""Chat templates: rendered as transformers renders them, whatever a hostile one asks for."""

import datetime
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from serving import PATIENCE, running

from moqa.data import read_distribution, templates
from moqa.data.chat import chat_text
from moqa.data.templates import render
from moqa.errors import MoqaError
from moqa.generation import load_any

MESSAGES = [{"role": "user", "content": "Grüße \U0001f600"}, {"role": "assistant", "content": "b\n <c>"}]
TOOLS = [{"type": "function", "function": {"name": "w", "parameters": {"x": [1, 2.5, None, True]}}}]
CONTENT = "{{ messages[0].content }}"
FOREVER = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
TWICE = "{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}"


@pytest.fixture
def tokenizer():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "reference" / "model")


@pytest.fixture
def started(monkeypatch):
    """The processes that a test starts; it finds none."""
    found, start = [], templates._start
    monkeypatch.setattr(templates, "_idle", [])
    monkeypatch.setattr(templates, "_start", lambda: found.append(start()) or found[-1])
    yield found
    for process in found:
        templates._end(process)


class TestOrdinary:
    @pytest.mark.parametrize(
        "template",
        [
            "{% for m in messages %}<{{ m.role }}>\n  {{ m.content }}\n{% endfor %}",
            "{{ bos_token }}{{ tools | tojson(indent=2) }}{{ messages | tojson }}{{ eos_token }}",
            "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}",
            "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
            "{% set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
            "{{ strftime_now('%Y') }}{% if add_generation_prompt %}<assistant>{% endif %}{{ name is defined }}",
            "{% macro say(m) %}{{ m.content | trim | upper }}{% endmacro %}{{ say(messages[0]) }}{{ '\ud83d' }}",
        ],
    )
    def test_is_what_transformers_renders(self, tokenizer, template):
        tokenizer.chat_template = template
        expected = tokenizer.apply_chat_template(
            MESSAGES, tools=TOOLS, tokenize=False, add_generation_prompt=True, name="Ada"
        )
        assert chat_text(tokenizer, MESSAGES, answer=True, tools=TOOLS, name="Ada") == expected

    def test_variables_have_any_name(self, tokenizer):
        tokenizer.chat_template = "{{ template }}{{ tokenizer }}{{ question }}"
        assert chat_text(tokenizer, MESSAGES, answer=True, template=1, tokenizer=2, question=3) == "123"

    def test_a_value_that_json_cannot_say_is_named(self, tokenizer):
        tokenizer.chat_template = "{{ messages[0].when }}"
        message = {**MESSAGES[0], "when": datetime.date(2026, 1, 1)}
        assert chat_text(tokenizer, [message], answer=True) == "<date>"

    def test_the_refusal_of_a_template_is_its_reason(self):
        template = "{% if messages | length > 1 %}{{ raise_exception('one\nmessage ' * 1000) }}{% endif %}" + CONTENT
        with pytest.raises(MoqaError, match=r"^the chat template refuses these messages: one message one") as caught:
            render(template, MESSAGES)
        assert len(str(caught.value)) < 400
        assert render(template, MESSAGES[:1]) == MESSAGES[0]["content"]

    def test_the_default_of_several_is_taken_and_that_of_tools(self, tokenizer):
        tokenizer.chat_template = {"default": "a", "tool_use": "b"}
        assert [chat_text(tokenizer, MESSAGES, answer=True, tools=tools) for tools in (None, TOOLS)] == ["a", "b"]
        tokenizer.chat_template = {"other": "a"}
        with pytest.raises(MoqaError, match="no default chat template"):
            chat_text(tokenizer, MESSAGES)

    def test_threads_get_their_own_texts(self, started):
        with ThreadPoolExecutor(4) as pool:
            texts = [f"{number}" * 1000 for number in range(200)]
            assert list(pool.map(lambda text: render(CONTENT, [{"content": text}]), texts)) == texts
        assert len(started) <= 4

    def test_a_forked_process_has_its_own(self):
        assert render(CONTENT, [{"content": "before"}]) == "before"
        child = os.fork()
        if child == 0:
            os._exit(0 if not templates._idle and render(CONTENT, [{"content": "child"}]) == "child" else 1)
        assert render(CONTENT, [{"content": "after"}]) == "after"
        assert os.waitpid(child, 0)[1] == 0

    def test_what_lies_in_the_working_folder_is_not_imported(self, tmp_path, monkeypatch, started):
        (tmp_path / "jinja2.py").write_text("raise SystemExit")
        monkeypatch.chdir(tmp_path)
        assert render(CONTENT, MESSAGES) == MESSAGES[0]["content"]
        assert len(started) == 1


class TestHostile:
    @pytest.mark.parametrize(
        ("template", "taken"),
        [
            (FOREVER, "more than 2 s of processor time"),
            ("{% set ns = namespace(a=[1]) %}" + TWICE + "{{ ns.a | tojson }}", "more than 2 s of processor time"),
            ("{{ 10 ** (10 ** 10) }}", "more than 2 s of processor time"),
            ("{{ 'a' * 10 ** 12 }}", "more than 256 MiB of memory"),
            ("{{ 'a' | center(10 ** 12) }}", "more than 256 MiB of memory"),
            ("{% for i in range(100000) %}{{ i }}{% endfor %}", r"more than [67]\d{4} characters"),
        ],
    )
    def test_takes_no_more_than_its_limits(self, template, taken):
        with pytest.raises(MoqaError, match=rf"^the chat template takes {taken} for \d+ bytes") as caught:
            render(template, MESSAGES)
        assert str(caught.value).isprintable()
        assert render(CONTENT, MESSAGES) == MESSAGES[0]["content"]

    def test_ends_with_its_process(self, started):
        with pytest.raises(MoqaError):
            render("{{ 'a' * 10 ** 12 }}", MESSAGES)
        assert started[0].poll() is not None
        assert started[0].stdout.closed
        assert not templates._idle

    def test_messages_that_are_nested_too_deeply_are_refused(self):
        nested: list = []
        for _ in range(100_000):
            nested = [nested]
        with pytest.raises(MoqaError, match="no chat template can be given these messages"):
            render(CONTENT, [{"content": "", "name": nested}])

    def test_an_interrupt_leaves_no_answer_for_the_next(self, monkeypatch):
        ask = templates._ask

        def interrupted(process, lines):
            ask(process, lines)
            process.stdin.write(b"[1, 1, 1]\n")  # a question whose answer nobody would read
            raise KeyboardInterrupt

        monkeypatch.setattr(templates, "_ask", interrupted)
        with pytest.raises(KeyboardInterrupt):
            render(CONTENT, MESSAGES)
        monkeypatch.undo()
        assert render(CONTENT, [{"content": "next"}]) == "next"

    def test_of_a_text_to_fit_is_named_with_its_line(self, tokenizer, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
        tokenizer.chat_template = FOREVER
        with pytest.raises(MoqaError, match="line 1, field 'messages': the chat template takes more than 2 s"):
            read_distribution(f"a={tmp_path}/a.jsonl", tokenizer)

    def test_is_refused_by_a_server(self, tiny_model):
        model, tokenizer = load_any(tiny_model)
        tokenizer.chat_template = "{% if hang %}" + FOREVER + "{% endif %}" + CONTENT
        ask = {"messages": MESSAGES[:1], "max_tokens": 1}
        with running((model, tokenizer)) as url, httpx.Client(base_url=url, timeout=PATIENCE) as http:
            refused = http.post("/v1/chat/completions", json={**ask, "chat_template_kwargs": {"hang": True}})
            assert refused.status_code == 400
            assert "the chat template takes more than 2 s" in refused.json()["error"]["message"]
            assert http.post("/v1/chat/completions", json=ask).status_code == 200

    def test_holds_up_no_request_without_a_template(self, tiny_model, monkeypatch):
        model, tokenizer = load_any(tiny_model)
        tokenizer.chat_template = CONTENT
        begun, done = threading.Event(), threading.Event()

        def slow(template, messages, **variables):
            begun.set()
            assert done.wait(PATIENCE)
            return render(template, messages, **variables)

        monkeypatch.setattr("moqa.data.chat.render", slow)
        with running((model, tokenizer)) as url, httpx.Client(base_url=url, timeout=PATIENCE) as http:
            with ThreadPoolExecutor(1) as pool:
                ask = {"messages": MESSAGES[:1], "max_tokens": 1}
                waiting = pool.submit(httpx.post, f"{url}/v1/chat/completions", json=ask, timeout=PATIENCE)
                assert begun.wait(PATIENCE)
                try:
                    assert http.get("/health").status_code == 200
                    assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
                    assert not waiting.done()
                finally:
                    done.set()
            assert waiting.result().status_code == 200
