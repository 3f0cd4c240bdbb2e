"""Who may ask the server: pages of which sites, and clients with which keys."""

import httpx
import pytest
from serving import PATIENCE, fails, running

from moqa.errors import MoqaError
from moqa.serve.origins import check_origins


class TestSites:
    @pytest.mark.parametrize(
        "host", ["localhost", "localhost:1", "127.0.0.1", "127.1.2.3:80", "[::1]:9", "a.localhost"]
    )
    def test_that_are_this_machine_may_ask(self, http, host):
        assert http.get("/v1/models", headers={"host": host}).status_code == 200

    @pytest.mark.parametrize(
        "host",
        ["evil.com", "evil.com:8000", "127.0.0.1.evil.com", "localhost.evil.com", "evillocalhost", "a@localhost", "",
         "10.0.0.1", "[::2]", "localhost:x"],
    )  # fmt: skip
    def test_that_only_mean_this_machine_may_not(self, http, host):
        for path in ("/v1/models", "/health", "/metrics"):
            fails(http.get(path, headers={"host": host}), 403, word="localhost")

    @pytest.mark.parametrize("origin", ["https://evil.com", "null", "http://localhost:1", "http://127.0.0.1.evil.com"])
    def test_of_others_may_not(self, http, origin):
        fails(http.get("/v1/models", headers={"origin": origin}), 403, word="--cors")
        preflight = {"origin": origin, "access-control-request-method": "POST"}
        found = http.options("/v1/completions", headers=preflight)
        assert found.status_code == 403
        assert not [name for name in found.headers if name.startswith("access-control")]

    def test_of_its_own_may(self, http, url):
        assert http.get("/v1/models", headers={"origin": url}).status_code == 200

    def test_are_named_by_cors(self, tiny):
        page = "https://page.example"
        with (
            running(tiny, cors=[page], keys=["right"]) as url,
            httpx.Client(base_url=url, timeout=PATIENCE) as http,
        ):
            asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-a"}
            found = http.options("/v1/chat/completions", headers={"origin": page, **asks})
            assert found.status_code == 200
            assert found.headers["access-control-allow-origin"] == page
            assert "POST" in found.headers["access-control-allow-methods"]
            assert found.headers["access-control-allow-headers"] == "authorization,x-a"
            assert "access-control-allow-credentials" not in found.headers
            local = http.options(
                "/v1/chat/completions",
                headers={"origin": page, **asks, "access-control-request-private-network": "true"},
            )
            assert local.headers["access-control-allow-private-network"] == "true"
            other = http.options("/v1/chat/completions", headers={"origin": "https://evil.com", **asks})
            assert other.status_code == 400
            assert "access-control-allow-origin" not in other.headers
            refused = http.get("/v1/models", headers={"origin": page})
            fails(refused, 401)
            assert refused.headers["access-control-allow-origin"] == page, "the page can read why"
            right = {"authorization": "Bearer right"}
            assert http.get("/v1/models", headers={**right, "origin": page}).status_code == 200
            assert http.get("/v1/models", headers={**right, "host": "moqa.example"}).status_code == 200, "a proxy"

    def test_of_cors_still_have_to_ask_this_machine(self, tiny):
        with running(tiny, cors=["https://page.example"]) as url:
            for headers, status in (({}, 200), ({"host": "evil.com"}, 403)):
                origin = {"origin": "https://page.example"}
                assert httpx.get(f"{url}/v1/models", headers=origin | headers, timeout=PATIENCE).status_code == status

    @pytest.mark.parametrize(
        "origin", ["page.example", "https://page.example/", "https://", "https://A.example", "a:b"]
    )
    def test_that_are_no_origin_are_a_mistake(self, origin):
        with pytest.raises(MoqaError, match="--cors"):
            check_origins([origin])


class TestKeys:
    def test_open_everything_but_health(self, tiny):
        with (
            running(tiny, keys=["one", "two"]) as url,
            httpx.Client(base_url=url, timeout=PATIENCE) as http,
        ):
            for path in (
                "/",
                "/docs",
                "/openapi.json",
                "/redoc",
                "/metrics",
                "/v1/models",
                "/V1/models",
                "//v1/models",
            ):
                fails(http.get(path), 401)
            assert http.get("/health").status_code == 200
            for key in ("one", "two"):
                assert http.get("/metrics", headers={"authorization": f"Bearer {key}"}).status_code == 200
            fails(http.get("/metrics", headers={"authorization": "Bearer onetwo"}), 401)

    def test_are_not_needed_for_pages_that_are_not_there(self, http):
        for path in ("/docs", "/openapi.json", "/redoc"):
            fails(http.get(path), 404)
