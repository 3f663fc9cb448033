"""Adds to the next question what the input box does not accept: camera photos, images by URL, ready-made questions.

Images added here are pending: they are listed above the input box and sent with the next question.
"""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st

from web.chat import controls
from web.chat.presets import PRESETS, preset_named
from web.i18n.strings import Texts
from web.images import attached_image
from web.images.attached_image import AttachedImage, ImageError
from web.safe_text import escaped

THUMBNAIL_WIDTH = 96


def show_pending_images(pending_images: list[AttachedImage], texts: Texts) -> None:
    """The images that go with the next question, each with a button to remove it."""
    if not pending_images:
        return

    def remove(image: AttachedImage) -> None:
        pending_images.remove(image)

    st.caption(texts("pending.title"))
    with st.container(horizontal=True):
        for image in pending_images:
            with st.container(width=THUMBNAIL_WIDTH + 40, border=True):
                if image.data:
                    st.image(image.data, width=THUMBNAIL_WIDTH, alt=texts("image.alt", name=image.name))
                else:
                    st.markdown(f":material/link: {escaped(image.name)}")
                st.button(
                    texts("pending.remove"), key=f"remove-{image.sha}", type="tertiary", icon=":material/close:",
                    on_click=remove, args=(image,),
                )  # fmt: skip


def show_attach_controls(
    pending_images: list[AttachedImage],
    prepare: Callable[[str, bytes], AttachedImage],
    limits: str,
    texts: Texts,
    by_link: bool,
    presets_folded: bool = False,
) -> None:
    """Camera, image by link (if `by_link`) and, if `presets_folded`, a menu of ready-made questions."""
    with st.container(horizontal=True, vertical_alignment="center"):
        if presets_folded:
            with st.popover(texts("preset.open"), icon=":material/bolt:", type="tertiary"):
                show_presets(texts)
        if st.button(texts("add.camera"), icon=":material/photo_camera:", key="add-camera", type="tertiary"):
            _camera_dialog(pending_images, prepare, texts)
        if by_link and st.button(texts("add.url"), icon=":material/link:", key="add-url", type="tertiary"):
            _link_dialog(pending_images, texts)
        st.caption(limits)


def show_presets(texts: Texts) -> None:
    st.pills(
        texts("preset.title"),
        [preset.name for preset in PRESETS],
        format_func=lambda name: f"{preset_named(name).icon} {texts(f'preset.{name}')}",
        key="preset",
        on_change=_apply_preset,
        args=(texts.language,),
    )


def _apply_preset(language: str) -> None:
    """Put the preset's question into the input box; the visitor sends it."""
    name, st.session_state["preset"] = st.session_state["preset"], None
    if name:
        preset = preset_named(name)
        st.session_state["draft"] = preset.question[language]
        controls.request_json(preset.schema)


def _camera_dialog(pending_images: list[AttachedImage], prepare: Callable[[str, bytes], AttachedImage], texts: Texts) -> None:
    @st.dialog(texts("add.camera"))
    def content() -> None:
        photo = st.camera_input(texts("camera.label"), key="camera", label_visibility="collapsed")
        st.caption(texts("camera.how"))
        if photo is not None:
            _attach(pending_images, lambda: prepare(photo.name, photo.getvalue()), texts)

    content()


def _link_dialog(pending_images: list[AttachedImage], texts: Texts) -> None:
    @st.dialog(texts("add.url"))
    def content() -> None:
        with st.form("address", border=False):
            url = st.text_input(texts("url.label"), placeholder="https://")
            st.caption(texts("url.how"))
            submitted = st.form_submit_button(texts("url.add"), type="primary")
        if submitted:
            _attach(pending_images, lambda: attached_image.remote_image(url), texts)

    content()


def _attach(pending_images: list[AttachedImage], make: Callable[[], AttachedImage], texts: Texts) -> None:
    try:
        image = make()
    except ImageError as error:
        st.warning(image_problem(error, texts), icon=":material/image_not_supported:")
        return
    if image.sha not in [each.sha for each in pending_images]:
        pending_images.append(image)
    st.rerun()


def image_problem(error: ImageError, texts: Texts) -> str:
    return texts(f"image.{error.kind}", name=escaped(error.name), limit=f"{error.limit:g}")
