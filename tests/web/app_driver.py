"""Steps for Streamlit's own test driver, and the text that the page then shows."""

from __future__ import annotations

import io

from streamlit.testing.v1 import AppTest

from models.shapes.pictures import draw_shapes


def png(color: str = "red", shape: str = "circle") -> bytes:
    buffer = io.BytesIO()
    draw_shapes([(color, shape)], seed=3).save(buffer, "PNG")
    return buffer.getvalue()


def ask(page: AppTest, question: str, *images: tuple[str, bytes]) -> AppTest:
    box = page.chat_input[0]
    for name, data in images:
        box.upload(name, data, "image/png")
    return box.set_value(question).run()


def shown_text(page: AppTest) -> str:
    """Everything that the page shows as text."""
    parts = [
        *page.markdown,
        *page.caption,
        *page.text,
        *page.header,
        *page.error,
        *page.warning,
        *page.info,
        *page.code,
    ]
    return "\n".join(str(part.value) for part in parts)
