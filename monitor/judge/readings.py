"""The readings that have thresholds, their values in an observation, and the texts of the warnings."""

from __future__ import annotations

from monitor.judge.evidence import Observation
from monitor.judge.pace import Pace
from monitor.judge.thresholds import Threshold
from settings import Settings

HYSTERESIS = 10.0
BUSY_WARN_S = 300.0
SLOWER = "slower_than_before"  # judged by pace.py, whose verdict tells people of it
OF_THE_API = ("open_files_percent", SLOWER, "busy_s")  # the other readings are of the machine


def settings_thresholds(settings: Settings) -> list[Threshold]:
    window_s = settings.limit_window_s
    percent = settings.gpu_memory_limit_mib == 0
    memory_limit = settings.gpu_memory_limit_percent if percent else settings.gpu_memory_limit_mib
    memory_unit = "%" if percent else "MiB"
    memory_name = "gpu_memory_used_percent" if percent else "gpu_memory_used"
    disk = settings.disk_free_limit_mib
    # A busy card is what it was bought for, so its load alone warns only where somebody asks for it.
    load = [_above("gpu_load", settings.gpu_load_limit_percent, window_s, "GPU load", "显卡负载", "%")] if settings.gpu_load_limit_percent else []
    return [
        *load,
        Threshold(
            memory_name, memory_limit, memory_limit * 0.9, window_s,
            f"GPU memory is above {memory_limit:g} {memory_unit}.", f"显存占用超过 {memory_limit:g} {memory_unit}。",
        ),
        _above("cpu_percent", settings.cpu_limit_percent, window_s, "Processor load", "处理器负载", "%"),
        _above("memory_used_percent", settings.memory_limit_percent, window_s, "Memory use", "内存占用", "%"),
        # No window, because a full disk does not recover on its own.
        Threshold(
            "disk_free_mib", disk, disk * 1.1 + 1, 0.0, f"Less than {disk:g} MiB of disk is free.", f"磁盘剩余不足 {disk:g} MiB。"
        ),
        Threshold(
            "open_files_percent", 80.0, 70.0, 0.0, "The API holds more than 80 % of the files it may open.",
            "接口打开的文件数超过上限的 80%。",
        ),
        Threshold(SLOWER, 0.5, 0.4, 0.0, "It is slower than before at like load.", "同等负载下比以往慢。"),
        Threshold(
            "busy_s", BUSY_WARN_S, BUSY_WARN_S - 1, 0.0, f"It has been too busy for the checker's question for {BUSY_WARN_S / 60:.0f} minutes "
            "or more.", f"服务繁忙，无法回答检查提问已达 {BUSY_WARN_S / 60:.0f} 分钟以上。",
        ),
    ]  # fmt: skip


def _above(name: str, limit: float, window_s: float, en: str, zh: str, unit: str) -> Threshold:
    minutes = f" over {window_s / 60:.0f} min" if window_s >= 60 else ""
    return Threshold(
        name, limit, max(0.0, limit - HYSTERESIS), window_s, f"{en} is above {limit:g} {unit} on average{minutes}.",
        f"{zh}平均超过 {limit:g}{unit}。",
    )  # fmt: skip


def values_of(observation: Observation, busy_since: float | None, pace: Pace) -> dict[str, float | None]:
    """The readings for roll-ups and thresholds, None where unknown. `busy_since`: wall-clock seconds."""
    process = observation.machine.get("process") or {}
    free = [disk["free_mib"] for disk in observation.machine.get("disks") or () if disk.get("free_mib") is not None]
    files, most = process.get("open_files"), process.get("open_files_limit")
    answers = {answer.kind: answer for answer in observation.api.answers if answer.outcome not in ("credited", "skipped")}
    picture, text = answers.get("picture"), answers.get("text")
    shares = [
        100 * card["memory_used_mib"] / card["memory_total_mib"]
        for card in observation.gpu.get("gpus") or ()
        if card.get("memory_used_mib") is not None and card.get("memory_total_mib")
    ]
    health = observation.api.last or observation.api.first
    return {
        "gpu_load": observation.gpu.get("load_percent"),
        "gpu_memory_used": observation.gpu.get("memory_used_mib"),
        "gpu_memory_used_percent": max(shares, default=None),
        "cpu_percent": observation.machine.get("cpu_percent"),
        "memory_used_percent": observation.machine.get("memory_used_percent"),
        "disk_free_mib": min(free, default=None),
        "api_rss_mib": process.get("rss_mib"),
        "open_files_percent": round(100 * files / most, 1) if files is not None and most else None,
        "pending": health.pending,
        "kv_peak_tokens": observation.api.beat.kv_peak_tokens if observation.api.beat else None,
        "times_slower": pace.ratio,
        SLOWER: 0.0 if pace.since is None else (pace.ratio or 1.0),
        "busy_s": 0.0 if busy_since is None else max(0.0, observation.moment.wall - busy_since),
        "text_s": text.seconds if text else None,
        "picture_s": picture.seconds if picture else None,
        "first_token_s": picture.first_token_s if picture else None,
        "page_s": observation.page.health.seconds if observation.page else None,
    }
