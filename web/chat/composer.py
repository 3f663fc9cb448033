"""What goes with the next question besides its words: pictures from the camera or by address, ready-made questions.

The input box itself takes what is dropped, pasted or picked. What is added here waits in the tray above it.
"""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st

from web.chat import controls
from web.chat.presets import PRESETS, preset_named
from web.i18n.strings import Words
from web.images import attached_image
from web.images.attached_image import Picture, PictureError
from web.safe_text import plain

TRAY_WIDTH = 96


def show_tray(tray: list[Picture], words: Words) -> None:
    """The pictures that wait, each with a button that takes it away."""
    if not tray:
        return

    def remove(picture: Picture) -> None:
        tray.remove(picture)

    st.caption(words("tray.title"))
    with st.container(horizontal=True):
        for picture in tray:
            with st.container(width=TRAY_WIDTH + 40, border=True):
                if picture.data:
                    st.image(picture.data, width=TRAY_WIDTH, alt=words("picture.alt", name=picture.name))
                else:
                    st.markdown(f":material/link: {plain(picture.name)}")
                st.button(
                    words("tray.remove"), key=f"remove-{picture.sha}", type="tertiary", icon=":material/close:",
                    on_click=remove, args=(picture,),
                )  # fmt: skip


def show_ways_in(
    tray: list[Picture], prepare: Callable[[str, bytes], Picture], limits: str, words: Words, by_link: bool, presets_folded: bool = False
) -> None:
    with st.container(horizontal=True, vertical_alignment="center"):
        if presets_folded:
            with st.popover(words("preset.open"), icon=":material/bolt:", type="tertiary"):
                show_presets(words)
        if st.button(words("add.camera"), icon=":material/photo_camera:", key="add-camera", type="tertiary"):
            _camera(tray, prepare, words)
        if by_link and st.button(words("add.url"), icon=":material/link:", key="add-url", type="tertiary"):
            _address(tray, words)
        st.caption(limits)


def show_presets(words: Words) -> None:
    st.pills(
        words("preset.title"),
        [preset.name for preset in PRESETS],
        format_func=lambda name: f"{preset_named(name).icon} {words(f'preset.{name}')}",
        key="preset",
        on_change=_take_preset,
        args=(words.language,),
    )


def _take_preset(language: str) -> None:
    """Its words come into the input box; sending stays the visitor's act."""
    name, st.session_state["preset"] = st.session_state["preset"], None
    if name:
        preset = preset_named(name)
        st.session_state["draft"] = preset.question[language]
        controls.want_json(preset.schema)


def _camera(tray: list[Picture], prepare: Callable[[str, bytes], Picture], words: Words) -> None:
    @st.dialog(words("add.camera"))
    def ask() -> None:
        photo = st.camera_input(words("camera.label"), key="camera", label_visibility="collapsed")
        st.caption(words("camera.how"))
        if photo is not None:
            _put(tray, lambda: prepare(photo.name, photo.getvalue()), words)

    ask()


def _address(tray: list[Picture], words: Words) -> None:
    @st.dialog(words("add.url"))
    def ask() -> None:
        with st.form("address", border=False):
            url = st.text_input(words("url.label"), placeholder="https://")
            st.caption(words("url.how"))
            sent = st.form_submit_button(words("url.add"), type="primary")
        if sent:
            _put(tray, lambda: attached_image.elsewhere(url), words)

    ask()


def _put(tray: list[Picture], make: Callable[[], Picture], words: Words) -> None:
    try:
        picture = make()
    except PictureError as error:
        st.warning(picture_problem(error, words), icon=":material/image_not_supported:")
        return
    if picture.sha not in [each.sha for each in tray]:
        tray.append(picture)
    st.rerun()


def picture_problem(error: PictureError, words: Words) -> str:
    return words(f"picture.{error.kind}", name=plain(error.name), limit=f"{error.limit:g}")
