"""What the page says while the API downloads or loads its model."""

from __future__ import annotations

from web.api_client.client import Download, Health
from web.i18n.strings import Texts
from web.safe_text import escaped


def loading_notice(health: Health, texts: Texts) -> str:
    if health.download is not None:
        return _download_notice(health.download, texts)
    if health.progress is None:
        return texts("model.loading_unknown")
    return texts("model.loading", percent=f"{100 * health.progress:.0f}")


def _download_notice(download: Download, texts: Texts) -> str:
    hub = escaped(download.hub)
    if not download.total_bytes:
        return texts("model.connecting", hub=hub)
    words = {
        "hub": hub,
        "here": _size(download.downloaded_bytes, download.total_bytes),
        "total": _size(download.total_bytes),
        "percent": f"{100 * min(download.downloaded_bytes / download.total_bytes, 1.0):.0f}",
    }
    if download.remaining_s is None:
        return texts("model.downloading_still", **words)
    return texts(
        "model.downloading", **words, rate=_size(download.bytes_per_s), left=_span(download.remaining_s, texts)
    )


def _size(number: float, like: float = 0.0) -> str:
    """In decimal units, as hubs and lines are measured; `like`: in the unit of another number."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if max(number, like) >= factor:
            return f"{number / factor:.{2 if unit == 'GB' else 1}f} {unit}"
    return f"{number:.0f} B"


def _span(seconds: float, texts: Texts) -> str:
    if seconds < 60:
        return texts("left.seconds", seconds=f"{seconds:.0f}")
    minutes = round(seconds / 60)
    if minutes < 60:
        return texts("left.minutes", minutes=minutes)
    return texts("left.hours", hours=minutes // 60, minutes=minutes % 60)
