"""x-glm-cache-key: the questions of one conversation have the same, on every server, and it says nothing of them."""

from __future__ import annotations

import re
from hashlib import sha256
from typing import Any

from served import image_part, text_part

SYSTEM = {"role": "system", "content": "You are brief."}
ANSWER = {"role": "assistant", "content": "One."}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def key_of(served: Any, messages: list[dict[str, Any]], path: str = "/v1/chat/completions", **fields: Any) -> str:
    answer = served.client.post(path, json={"messages": messages, **fields})
    assert answer.status_code == 200, answer.text
    key = answer.headers["x-glm-cache-key"]
    assert re.fullmatch(r"[0-9a-f]{16}", key)
    return key


def test_follow_up_questions_have_the_key_of_the_first(serve) -> None:
    served = serve()
    text, picture = user("What is this about?"), user([image_part("red"), text_part("What is it?")])
    for opening in ([SYSTEM, text], [text], [SYSTEM, picture], [picture]):
        first = key_of(served, opening)
        later = [*opening, ANSWER, user("And why?")]
        assert key_of(served, later) == first
        assert key_of(served, [*later, ANSWER, user([image_part("blue"), text_part("And this?")])], stream=True) == first


def test_another_question_about_the_same_picture_has_the_same_key(serve) -> None:
    served = serve()

    def about(colour: str, question: str, *before: dict[str, Any]) -> str:
        return key_of(served, [*before, user([image_part(colour), text_part(question)])])

    assert about("red", "What is it?") == about("red", "Where is it?")
    assert len({about("red", "What?"), about("blue", "What?"), about("red", "What?", SYSTEM)}) == 3
    assert key_of(served, [user([text_part("Look: "), image_part("red")])]) == about("red", "What?")


def test_other_openings_have_other_keys(serve) -> None:
    served = serve()
    openings = [
        [user("a")], [user("b")], [SYSTEM, user("a")], [{**SYSTEM, "content": "You are long."}, user("a")],
        [{"role": "system", "content": "a"}, user("")], [{"role": "assistant", "content": "a"}, user("")],
        [user([image_part("red")])], [user(image_part("red")["image_url"]["url"])],
    ]  # fmt: skip

    keys = [key_of(served, messages) for messages in openings] + [key_of(served, [user("a")], cache_salt="x")]

    assert len(set(keys)) == len(keys)
    assert key_of(served, [user([text_part("a")])]) == keys[0], "one text, in whatever form it is sent"


def test_every_server_with_the_key_makes_the_same_and_nobody_else(serve) -> None:
    hashed = sha256(b"sk-ann").hexdigest()
    one, other, bare = serve(api_keys="ann:sk-ann"), serve(api_keys=f"ann:sha256:{hashed}"), serve(api_key=None)
    messages = [SYSTEM, user("a secret word")]

    def as_ann(served: Any) -> str:
        served.client.headers["Authorization"] = "Bearer sk-ann"
        return key_of(served, messages)

    by_default = key_of(one, messages)
    assert as_ann(one) == as_ann(other) != by_default
    assert key_of(bare, messages) not in (by_default, as_ann(one))


def test_the_other_formats_have_it_too(serve) -> None:
    served = serve()
    chat = key_of(served, [SYSTEM, user("hello")])

    anthropic = key_of(served, [user("hello")], "/v1/messages", system=SYSTEM["content"], max_tokens=9)
    response = served.client.post("/v1/responses", json={"instructions": SYSTEM["content"], "input": "hello"})
    begun = "Once upon a time. " * 20
    texts = [served.client.post("/v1/completions", json={"prompt": text}).headers["x-glm-cache-key"] for text in (begun, begun + "It", "Then")]

    assert chat == anthropic == response.headers["x-glm-cache-key"]
    assert texts[0] == texts[1] != texts[2]


def test_key_and_session_are_logged_and_a_session_that_could_garble_the_log_is_not(serve, caplog) -> None:
    caplog.set_level("INFO")
    served = serve()

    served.client.headers["x-session-id"] = "chat-7"
    key = key_of(served, [user("a secret word")])
    served.client.headers["x-session-id"] = "x level=error " + "y" * 100
    key_of(served, [user("a secret word")])

    lines = [r.getMessage() for r in caplog.records if "path=/v1/chat/completions" in r.getMessage()]
    assert "session=chat-7" in lines[0] and f"cache_key={key}" in lines[0]
    assert "session=" not in lines[1] and "secret" not in "".join(lines)


def test_a_refused_request_has_no_key(serve) -> None:
    assert "x-glm-cache-key" not in serve().chat(temperature=-1).headers
