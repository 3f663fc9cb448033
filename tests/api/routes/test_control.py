"""POST /control: the probe token alone opens it, and it answers when the engine has done what it says."""

from __future__ import annotations

import pytest

TOKEN = "probe-0123456789"
PROBE = {"X-GLM-Probe": TOKEN}


@pytest.mark.parametrize("headers", [{}, {"X-GLM-Probe": "wrong"}, {"X-GLM-Probe": ""}])
def test_only_the_right_token_may_command(headers: dict[str, str], serve) -> None:
    answer = serve(probe_token=TOKEN).client.post("/control", json={"action": "drop-caches"}, headers=headers)

    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")


def test_without_a_configured_token_nobody_may(serve) -> None:
    answer = serve().client.post("/control", json={"action": "drop-caches"}, headers={"X-GLM-Probe": ""})

    assert answer.status_code == 403


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"action": "explode"}', b'{"action": ["drop-caches"]}'])
def test_other_bodies_are_refused(body: bytes, serve) -> None:
    answer = serve(probe_token=TOKEN).client.post("/control", content=body, headers=PROBE)

    assert answer.status_code == 400


def test_dropped_caches_are_computed_again(serve) -> None:
    served = serve(probe_token=TOKEN)
    before = [served.chat("the same " * 9).json() for _ in range(2)]

    answer = served.client.post("/control", json={"action": "drop-caches"}, headers=PROBE)

    after = served.chat("the same " * 9).json()
    cached = [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in (*before, after)]
    assert answer.status_code == 200 and answer.json()["done"] is True and answer.json()["seconds"] >= 0
    assert cached[0] == 0 and cached[1] > 50 and cached[2] == 0
    assert after["choices"] == before[0]["choices"]


def test_what_a_model_cannot_do_is_an_error(serve) -> None:
    answer = serve(probe_token=TOKEN).client.post("/control", json={"action": "reload-weights"}, headers=PROBE)

    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "control_failed")
