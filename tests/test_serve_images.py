"""A server of an image classifier, and of a mixture of them: forms and JSON, routes, metrics, damage and refusals."""

import base64
import io
import os
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
import torch
from images import CLASSES, save_classifier, save_images
from PIL import Image
from serving import PATIENCE, fails, gauges

import moqa
from moqa.errors import MoqaError
from moqa.mixture.classifier import classifies, load_classifier
from moqa.mixture.variants import CheckpointVariant
from moqa.serve import serve
from moqa.serve.connection import Connections
from moqa.serve.forms import form_fields
from moqa.serve.images import ImageService
from moqa.serve.refusal import RefusalError
from moqa.serve.run import Server

PLAIN = {"strategy": "uniform", "method": "rtn"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A classifier and a mixture of it."""
    root = tmp_path_factory.mktemp("images")
    save_classifier("resnet", root / "model")
    data = {name: save_images(root / name, each=6, seed=seed) for seed, name in enumerate(("plain", "other"))}
    specs = {f"bits{width}": CheckpointVariant(widths=(width,), groups=(64,), **PLAIN) for width in (2, 4)}
    moqa.build_mixture(root / "model", data, root / "mix", variants=specs, samples=8, profile_samples=8)
    return root


@contextmanager
def served(folder, queue=8, **options):
    service = ImageService(*load_classifier(folder), "tiny", queue)
    server, listener = Server(service, Connections(64), **options), socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=PATIENCE) as http:
            yield http
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        service.close()
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def http(folders):
    with served(folders / "mix") as client:
        yield client


@pytest.fixture(scope="module")
def alone(folders):
    with served(folders / "model") as client:
        yield client


@pytest.fixture(scope="module")
def picture():
    """A picture, and its file."""
    image, file = Image.fromarray(np.random.default_rng(5).integers(0, 256, (40, 30, 3), dtype=np.uint8)), io.BytesIO()
    image.save(file, "PNG")
    return image, file.getvalue()


def send(http, file, **fields):
    return http.post("/v1/classify", files={"image": ("a.png", file)}, data=fields)


def expected(folder, image, variant=None):
    """[classes] probabilities of a picture."""
    model, reader = load_classifier(folder)
    with torch.inference_mode():
        return (model.mixture.use(variant) if variant else model)(reader.pixels([image])).logits[0].softmax(-1)


def shares(answer):
    return torch.tensor([{c["label"]: c["probability"] for c in answer["classes"]}[name] for name in CLASSES])


class TestAnswers:
    def test_of_a_single_model_are_its_own(self, alone, folders, picture):
        found = send(alone, picture[1]).json()
        assert set(found) == {"object", "model", "classes"}
        assert torch.allclose(shares(found), expected(folders / "model", picture[0]), atol=1e-5)
        values = [one["probability"] for one in found["classes"]]
        assert values == sorted(values, reverse=True)

    @pytest.mark.parametrize("name", ["bits2", "bits4"])
    def test_are_the_variants_that_a_request_names(self, http, folders, picture, name):
        found = send(http, picture[1], variant=name).json()
        assert (found["variant"], found["confidence"], found["variant_problem"]) == (name, None, None)
        assert torch.allclose(shares(found), expected(folders / "mix", picture[0], name), atol=1e-5)

    def test_are_the_routers_without_one(self, http, folders, picture):
        model, reader = load_classifier(folders / "mix")
        route = model.mixture.choose(reader.pixels([picture[0]])[0])
        found = send(http, picture[1]).json()
        assert (found["variant"], found["confidence"]) == (route.variant, pytest.approx(route.confidence))

    @pytest.mark.parametrize("begin", ["", "data:image/png;base64,"])
    def test_to_json_are_those_to_a_form(self, http, picture, begin):
        text = begin + base64.b64encode(picture[1]).decode()
        found = http.post("/v1/classify", json={"image": text, "top": 2, "variant": "bits2"}).json()
        assert found["classes"] == send(http, picture[1], top="2", variant="bits2").json()["classes"]
        assert len(found["classes"]) == 2

    def test_are_counted(self, folders, picture):
        with served(folders / "mix") as http:
            send(http, picture[1], variant="bits2")
            send(http, picture[1])
            found = gauges(http)
        assert sum(value for (name, *_), value in found.items() if name == "moqa_routed_images_total") == 2
        assert found["moqa_routed_images_total", "bits2"] >= 1
        assert found["moqa_route_confidence_count",] == 1
        assert found["moqa_image_seconds_count",] == 2
        assert found["moqa_requests_total", "/v1/classify", "200"] == 2

    @pytest.mark.parametrize("how", ["deleted", "cut off"])
    def test_of_a_damaged_variant_are_the_intact_ones_and_say_so(self, folders, picture, tmp_path, how):
        mix = shutil.copytree(folders / "mix", tmp_path / "mix")
        with served(mix) as http:
            for path in (mix / "bits2").glob("*.safetensors"):
                path.unlink() if how == "deleted" else os.truncate(path, 100)
            found = send(http, picture[1], variant="bits2").json()
            assert found["variant"] == "bits4"
            assert found["variant_problem"].startswith("bits2 ")
            assert torch.allclose(shares(found), expected(folders / "mix", picture[0], "bits4"), atol=1e-5)
            assert gauges(http)["moqa_variant_failures_total",] == 1
            assert send(http, picture[1], variant="bits4").json()["variant_problem"] is None


class TestRefusals:
    @pytest.mark.parametrize("file", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
    def test_an_unreadable_image(self, http, file):
        fails(send(http, file), 400, "image", "cannot be read as an image")

    def test_a_cut_off_image(self, http, picture):
        fails(send(http, picture[1][:600]), 400, "image", "cannot be read as an image")

    def test_an_image_of_more_pixels_than_memory(self, http):
        file = io.BytesIO()
        Image.new("1", (9_000, 9_000)).save(file, "PNG")
        fails(send(http, file.getvalue()), 400, "image", "9000 x 9000 pixels")

    @pytest.mark.parametrize(
        ("fields", "param", "word"),
        [
            ({"image": "n@t base64"}, "image", "not base64"),
            ({}, "image", "is missing"),
            ({"image": "", "top": 0}, "top", "greater than or equal to 1"),
            ({"image": "", "variant": "bits8"}, "variant", "the server has bits2, bits4"),
            ({"image": "", "varient": "bits8"}, "varient", "did you mean variant?"),
        ],
    )
    def test_fields(self, http, fields, param, word):
        fails(http.post("/v1/classify", json=fields), 400, param, word)

    def test_another_model(self, http, picture):
        fails(send(http, picture[1], model="other"), 404, "model", "the only one is tiny")

    def test_a_variant_where_there_is_no_mixture(self, alone, picture):
        fails(send(alone, picture[1], variant="bits2"), 400, "variant", "the server has none")

    def test_a_body_of_another_kind(self, http, picture):
        answer = http.post("/v1/classify", content=picture[1], headers={"Content-Type": "image/png"})
        fails(answer, 400, None, "or multipart/form-data")

    def test_texts(self, http):
        fails(http.post("/v1/completions", json={"prompt": "The"}), 404)

    def test_more_images_than_may_wait(self, folders, picture, monkeypatch):
        begun, go_on, answer = threading.Event(), threading.Event(), ImageService._classified

        def slowly(self, body, pixels):
            begun.set()
            assert go_on.wait(PATIENCE)
            return answer(self, body, pixels)

        monkeypatch.setattr(ImageService, "_classified", slowly)
        with served(folders / "model", queue=0) as http, ThreadPoolExecutor(1) as threads:
            first = threads.submit(send, http, picture[1])
            assert begun.wait(PATIENCE)
            fails(send(http, picture[1]), 429, None, "0 images wait")
            go_on.set()
            assert first.result().status_code == 200

    def test_without_the_key(self, folders, picture):
        with served(folders / "model", keys=["secret"]) as http:
            fails(send(http, picture[1]), 401)

    def test_options_of_texts(self, folders):
        with pytest.raises(MoqaError, match="is an image classifier: leave out --adjust, which is of texts"):
            serve(folders / "model", port=0, adjust=["auto"])

    @pytest.mark.parametrize(
        ("data", "content_type"),
        [
            (b"--x\r\n\r\n", "multipart/form-data; boundary=x"),
            (b"--x--", "multipart/form-data"),
            (b"--x\r\n\r\nvalue\r\n--x--", "multipart/form-data; boundary=x"),
            (
                b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n\xff\r\n--x--',
                "multipart/form-data; boundary=x",
            ),
            (b"--x" + b"\r\n\r\n\r\n--x" * 40 + b"--", "multipart/form-data; boundary=x"),
        ],
    )
    def test_forms_that_are_wrong(self, data, content_type):
        with pytest.raises(RefusalError):
            form_fields(data, content_type)


def test_a_form_keeps_every_byte_of_a_file():
    every = bytes(range(256)) + b"\r\n--y\n\r\r\n"
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    assert form_fields(head + every + b"\r\n--x--\r\n", 'multipart/form-data; boundary="x"') == {"image": every}


def test_models_are_told_apart(folders, tiny_model):
    assert classifies(folders / "mix")
    assert classifies(folders / "model")
    assert not classifies(tiny_model)
