"""/health answers a nonce with a proof that only the holder of the probe token can make."""

from __future__ import annotations

import hashlib
import hmac
import json

import pytest
from served import wait_for

from api import __version__
from api.health.proof import sign

NONCE = "00112233445566778899aabbccddeeff"
SHARED = {"identity", "loading_still_s", "success_age_s", "outcomes", "pace", "corrupt", "card_events"}


def test_the_proof_can_be_checked_by_its_description_alone(serve) -> None:
    served = serve(probe_token="pt-e", token_s=0.001)
    served.chat("hi")

    body = served.client.get(f"/health?nonce={NONCE}").json()

    proof = body.pop("proof")
    message = NONCE + "\n" + json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    assert proof == hmac.new(b"pt-e", message.encode(), hashlib.sha256).hexdigest()
    body["steps"] += 1
    assert sign("pt-e", NONCE, body) != proof, "every value is under the proof"
    assert "pt-e" not in served.client.get(f"/health?nonce={NONCE}").text


def test_another_nonce_or_token_gives_another_proof() -> None:
    proofs = {sign(token, nonce, {"a": 1}) for token in ("t", "u") for nonce in (NONCE, NONCE[::-1])}

    assert len(proofs) == 4


def test_without_a_nonce_or_without_a_token_there_is_no_proof(serve) -> None:
    with_token, without = serve(probe_token="pt"), serve()

    for client, path in ((with_token.client, "/health"), (without.client, f"/health?nonce={NONCE}")):
        answer = client.get(path)
        assert answer.status_code == 200 and "proof" not in answer.json()


@pytest.mark.parametrize("nonce", ["", "abc", "f" * 15, "f" * 65, "g" * 32, "f" * 31 + "%0a", "%C2%B2" * 16])
def test_other_nonces_are_refused(serve, nonce: str) -> None:
    answer = serve(probe_token="pt").client.get(f"/health?nonce={nonce}")

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "nonce")


def test_a_server_that_does_not_serve_proves_it_too(serve) -> None:
    served = serve(probe_token="pt")
    served.engine.drain(0)

    answer = served.client.get(f"/health?nonce={NONCE.upper()}")

    body = answer.json()
    assert answer.status_code == 503 and body.pop("proof") == sign("pt", NONCE.upper(), body)


def test_the_heartbeat_file_says_the_same_of_the_process(serve) -> None:
    served = serve(probe_token="pt")
    served.chat("hi")
    path = served.app.state.server.settings.log_dir / "api.heartbeat.json"
    wait_for(lambda: path.exists() and json.loads(path.read_text()).get("outcomes", {}).get("answered", {}).get("text") == 1)
    record, health = json.loads(path.read_text()), served.client.get(f"/health?nonce={NONCE}").json()

    assert set(record) >= SHARED and set(health) >= SHARED and "proof" not in record
    for name in SHARED - {"success_age_s"}:
        assert record[name] == health[name], name
    assert set(health["identity"]) == {"pid", "start_time", "boot_id", "version"}
    assert health["identity"]["version"] == __version__ and health["identity"]["pid"] == record["pid"]
    assert set(health["corrupt"]) == {
        "nonfinite_total", "nonfinite_recent", "fingerprint", "fingerprint_stage", "fingerprint_age_s", "reference",
        "reference_detail",
    }  # fmt: skip
    assert health["card_events"] == [] and health["loading_still_s"] == 0.0
