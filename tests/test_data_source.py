"""Reading distributions: every kind of source, and what is said when one is wrong."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from moqa.data import read_distribution, read_distributions
from moqa.data.chat import chat_text
from moqa.errors import MoqaError

CHAT = [{"role": "user", "content": "Hallo"}, {"role": "assistant", "content": "Guten Tag"}]
SHAREGPT = [{"from": "human", "value": "Hallo"}, {"from": "gpt", "value": "Guten Tag"}]
CHAT_TEXT = "user|Hallo\nassistant|Guten Tag\n"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}|{{ m['content'] }}\n{% endfor %}"


@pytest.fixture
def chat_tokenizer():
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "reference" / "model")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_parquet(path, **columns):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def fake_hub(monkeypatch, load_dataset):
    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)


class TestFiles:
    @pytest.mark.parametrize("name", ["a.txt", "a.md", "a.unknown", "a", "a:b.txt", "a=b.txt"])
    def test_text_file_is_one_document(self, tmp_path, name):
        (tmp_path / name).write_bytes("Grüße\r\n\nzwei".encode())
        wiki = read_distribution(f"wiki={tmp_path / name}")
        assert wiki.texts == ("Grüße\r\n\nzwei",)
        assert (wiki.name, wiki.origin) == ("wiki", str(tmp_path / name))

    def test_byte_order_mark_is_no_text(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
        assert read_distribution(f"a={tmp_path}/a.txt").texts == ("hello",)

    def test_folder_is_its_txt_files_sorted_by_path(self, tmp_path):
        (tmp_path / "sub").mkdir()
        for name in ("z.txt", "sub/b.txt", "a.txt"):
            (tmp_path / name).write_text(name)
        (tmp_path / "picture.png").write_bytes(b"\xff")
        (tmp_path / "empty.txt").touch()
        assert read_distribution(f"a={tmp_path}").texts == ("a.txt", "sub/b.txt", "z.txt")

    def test_jsonl_reads_text_by_default_and_skips_blank_lines(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", {"text": "one"}, {"text": ""}, {"text": "zwölf\u2028"})
        path.write_text(path.read_text() + "\n\n")
        assert read_distribution(f"a={path}").texts == ("one", "zwölf\u2028")

    def test_jsonl_field(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", {"text": "no", "body": "yes"})
        assert read_distribution(f"a={path}:body").texts == ("yes",)

    def test_a_path_that_exists_wins_over_the_field(self, tmp_path):
        write_jsonl(tmp_path / "a.jsonl", {"body": "field"})
        (tmp_path / "a.jsonl:body").write_text("a file")
        assert read_distribution(f"a={tmp_path}/a.jsonl:body").texts == ("a file",)

    def test_parquet(self, tmp_path):
        path = write_parquet(tmp_path / "a.parquet", text=["one", "two"], body=["three", ""], id=[1, 2])
        assert read_distribution(f"a={path}").texts == ("one", "two")
        assert read_distribution(f"a={path}:body").texts == ("three",)

    def test_json_and_tables_are_records(self, tmp_path):
        (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}, {"text": "b"}]))
        (tmp_path / "a.csv").write_text('id,text\n1,a\n2,"b\n, c"\n')
        (tmp_path / "a.tsv").write_text("text\tid\na\t1\n")
        (tmp_path / "a.ndjson").write_text('{"text": "a"}\n')
        read = {
            suffix: read_distribution(f"a={tmp_path}/a.{suffix}").texts for suffix in ("json", "csv", "tsv", "ndjson")
        }
        assert read == {"json": ("a", "b"), "csv": ("a", "b\n, c"), "tsv": ("a",), "ndjson": ("a",)}

    def test_several_keep_their_order(self, tmp_path):
        for name in "ab":
            (tmp_path / name).write_text(name)
        both = read_distributions([f"y={tmp_path}/b", f"x={tmp_path}/a"])
        assert [(d.name, d.texts) for d in both] == [("y", ("b",)), ("x", ("a",))]


class TestChats:
    @pytest.mark.parametrize("messages", [CHAT, SHAREGPT])
    @pytest.mark.parametrize("field", ["messages", "conversations"])
    def test_found_without_naming_the_field(self, tmp_path, chat_tokenizer, field, messages):
        path = write_jsonl(tmp_path / "a.jsonl", {"id": 1, field: messages})
        assert read_distribution(f"a={path}", chat_tokenizer).texts == (CHAT_TEXT,)
        assert read_distribution(f"a={path}:{field}", chat_tokenizer).texts == (CHAT_TEXT,)

    def test_in_parquet(self, tmp_path, chat_tokenizer):
        path = write_parquet(tmp_path / "a.parquet", messages=[CHAT, CHAT])
        assert read_distribution(f"a={path}", chat_tokenizer).texts == (CHAT_TEXT, CHAT_TEXT)

    def test_need_a_tokenizer_with_a_template(self, tmp_path, chat_tokenizer):
        path = write_jsonl(tmp_path / "a.jsonl", {"messages": CHAT})
        with pytest.raises(MoqaError, match=r"line 1, field 'messages' is a chat: .*none was given"):
            read_distribution(f"a={path}")
        chat_tokenizer.chat_template = None
        with pytest.raises(MoqaError, match=f"{chat_tokenizer.name_or_path} has no chat template"):
            read_distribution(f"a={path}", chat_tokenizer)

    def test_the_template_may_refuse(self, tmp_path, chat_tokenizer):
        chat_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        path = write_jsonl(tmp_path / "a.jsonl", {"messages": CHAT})
        with pytest.raises(MoqaError, match=r"line 1, .*the chat template refuses.*roles must alternate"):
            read_distribution(f"a={path}", chat_tokenizer)

    def test_text_parts_are_joined_and_other_parts_refused(self, tmp_path, chat_tokenizer):
        parts = [{"type": "text", "text": "Hal"}, {"type": "text", "text": "lo"}]
        path = write_jsonl(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": parts}, CHAT[1]]})
        assert read_distribution(f"a={path}", chat_tokenizer).texts == (CHAT_TEXT,)
        image = [{"type": "image_url", "image_url": {"url": "data:"}}]
        path = write_jsonl(tmp_path / "a.jsonl", {"messages": CHAT}, {"messages": [{"role": "user", "content": image}]})
        with pytest.raises(MoqaError, match="line 2, field 'messages': message 1 has a part of type 'image_url'"):
            read_distribution(f"a={path}", chat_tokenizer)

    @pytest.mark.parametrize("arguments", ['{"city": "Bonn"}', {"city": "Bonn"}])
    def test_tools_and_their_calls(self, tmp_path, chat_tokenizer, arguments):
        chat_tokenizer.chat_template = (
            "{{ tools[0].function.name }}{% for m in messages %}|{{ m.content }}"
            "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments.city }}){% endfor %}"
            "{% endfor %}"
        )
        call = {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "w", "arguments": arguments}}],
        }
        record = {"messages": [CHAT[0], call], "tools": [{"type": "function", "function": {"name": "w"}}]}
        path = write_jsonl(tmp_path / "a.jsonl", record)
        assert read_distribution(f"a={path}", chat_tokenizer).texts == ("w|Hallo|w(Bonn)",)

    @pytest.mark.parametrize(
        ("message", "lost"),
        [
            ({"role": "tool", "content": "22 degrees"}, "'22' of message 2"),
            ({"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "w"}}]}, "'w' of message 2"),
        ],
    )
    def test_what_the_template_leaves_out_is_an_error(self, tmp_path, chat_tokenizer, message, lost):
        chat_tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
        path = write_jsonl(tmp_path / "a.jsonl", {"messages": [CHAT[0], message]})
        with pytest.raises(MoqaError, match=f"line 1, .* leaves out {lost}"):
            read_distribution(f"a={path}", chat_tokenizer)
        # as a server must answer: clients send back what they have got
        assert chat_text(chat_tokenizer, [CHAT[0], message], answer=True) == "Hallo"

    @pytest.mark.parametrize("content", ["<think>first</think>Gut", "first</think> Gut ", 'with "quotes"\n\n  lines'])
    def test_templates_may_leave_out_thinking_and_change_spaces(self, tmp_path, chat_tokenizer, content):
        chat_tokenizer.chat_template = (
            "{% for m in messages %}{{ (m.content.split('</think>')[-1].split() | join(' ')) | tojson }}{% endfor %}"
        )
        path = write_jsonl(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": content}]})
        assert len(read_distribution(f"a={path}", chat_tokenizer).texts) == 1


class TestHub:
    @pytest.mark.parametrize(
        ("source", "expected", "split"),
        [
            ("org/corpus", "text", "train"),
            ("org/corpus:body", "body", "train"),
            ("org/corpus:body#test", "body", "test"),
            ("org/corpus#train[:10%]", "text", "train[:10%]"),
        ],
    )
    def test_dataset(self, monkeypatch, source, expected, split):
        asked = []

        def load_dataset(name, split):
            asked.append((name, split))
            return [{"text": "text", "body": "body"}]

        fake_hub(monkeypatch, load_dataset)
        assert read_distribution(f"a={source}").texts == (expected,)
        assert asked == [("org/corpus", split)]

    def test_failure_says_both(self, monkeypatch):
        def load_dataset(name, split):
            raise ConnectionError("first line\n  second line")

        fake_hub(monkeypatch, load_dataset)
        with pytest.raises(MoqaError, match=r"a=org/corpus: there is no such file .* Hub .*: first line$"):
            read_distribution("a=org/corpus")

    def test_missing_package_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(MoqaError, match=r"pip install 'moqa\[data\]'"):
            read_distribution("a=org/corpus")

    @pytest.mark.parametrize(
        "source", ["texts/wiki.txt", "wiki.txt", "/no/such/file", "../a/b", "a/b/c", "a/b.jsonl:x"]
    )
    def test_is_not_asked_for_what_looks_like_a_file(self, monkeypatch, source):
        fake_hub(monkeypatch, lambda *_, **__: pytest.fail("asked the Hub"))
        with pytest.raises(MoqaError, match="there is no such file or folder"):
            read_distribution(f"a={source}")


class TestErrors:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ('{"text": "a"}\n{"text": ', "line 2 is not JSON"),
            ("[" * 100_000, "line 1 is not JSON"),
            ('{"body": "a", "id": 1}', "line 1 has no field 'text': its fields are body, id"),
            ('{"text": "a"}\n{}', "line 2 has no field 'text': its fields are none"),
            ('"text"', "line 1 is not a record"),
            ('{"text": 3}', "field 'text' is of type int"),
            ('{"text": null}', "field 'text' is of type NoneType"),
            ('{"text": ["a"]}', "field 'text' is a list, but not of messages"),
            ('{"messages": "[]"}', "field 'messages' is of type str: a list of messages is needed"),
            ('{"text": "\\ud800"}', "not valid Unicode"),
            ("\n\n", "holds no text"),
        ],
    )
    def test_jsonl(self, tmp_path, content, message):
        path = tmp_path / "a.jsonl"
        path.write_text(content)
        with pytest.raises(MoqaError) as caught:
            read_distribution(f"wiki={path}")
        assert str(caught.value).startswith(f"wiki={path}: ")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.txt", b"abc\xffdef", "not UTF-8 at byte 3"),
            ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "line 2 is not UTF-8 at byte 24"),
            ("a.txt", b" \n", "holds no text"),
            ("a.txt", b"", "holds no text"),
            ("a.txt", b'{"text": "a"}\n{"text": "b"}\n', r"holds JSON lines: name it \.jsonl"),
            ("a.html", b"<p>a</p>", "is not plain text: extract its text"),
            ("a.json", b'{"text": "a"}\n{"text": "b"}\n', "a file of JSON lines ends in"),
            ("a.json", b'{"text": "a"}', "holds one dict: give a list of records"),
            ("a.csv", b"id,text\n1\n", "line 2 has another number of fields"),
            ("a.csv", b"id,body\n1,a\n", "line 2 has no field 'text': its fields are id, body"),
        ],
    )
    def test_files(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MoqaError, match=message):
            read_distribution(f"a={tmp_path / name}")

    def test_explicit_field_has_no_substitute(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", {"text": "a"})
        with pytest.raises(MoqaError, match="line 1 has no field 'body': its fields are text"):
            read_distribution(f"a={path}:body")

    def test_parquet(self, tmp_path):
        path = write_parquet(tmp_path / "a.parquet", body=["a"], id=[1])
        with pytest.raises(MoqaError, match="row 1 has no field 'text': its fields are body, id"):
            read_distribution(f"a={path}")
        path.write_bytes(b"PAR1 and nothing more")
        with pytest.raises(MoqaError, match=r"not a readable \.parquet file"):
            read_distribution(f"a={path}")

    def test_missing_pyarrow_says_what_to_install(self, tmp_path, monkeypatch):
        (tmp_path / "a.parquet").touch()
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(MoqaError, match=r"pip install 'moqa\[data\]'"):
            read_distribution(f"a={tmp_path}/a.parquet")

    def test_folder_without_texts_and_field_of_a_text_file(self, tmp_path):
        with pytest.raises(MoqaError, match=r"holds no \.txt file"):
            read_distribution(f"a={tmp_path}")
        (tmp_path / "a.txt").write_text("a")
        write_jsonl(tmp_path / "b.jsonl", {"text": "b"})
        with pytest.raises(MoqaError, match=r"holds texts and b\.jsonl"):
            read_distribution(f"a={tmp_path}")
        with pytest.raises(MoqaError, match="has no fields: leave out ':body'"):
            read_distribution(f"a={tmp_path}/a.txt:body")

    def test_unreadable_file(self, tmp_path, monkeypatch):
        (tmp_path / "a.txt").write_text("a")

        def denied(_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "read_bytes", denied)
        with pytest.raises(MoqaError, match=r"cannot be read \(Permission denied\)"):
            read_distribution(f"a={tmp_path}/a.txt")

    @pytest.mark.parametrize(
        "spec", ["wiki.txt", "wiki=", "=wiki.txt", "my wiki=a.txt", "ö=a.txt", "a/b=c", "a\n=b", ""]
    )
    def test_spec(self, spec):
        with pytest.raises(MoqaError):
            read_distribution(spec)

    def test_duplicate_names_are_found_before_anything_is_read(self):
        with pytest.raises(MoqaError, match=r"a=missing\.txt and a=other\.txt are both named 'a'"):
            read_distributions(["a=missing.txt", "b=x", "a=other.txt"])


def test_a_tokenizer_is_only_asked_about_chats(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    assert read_distribution(f"a={tmp_path}/a.txt", SimpleNamespace()).texts == ("a",)
