"""A graphics card as the memory plan sees it: its memory, what it can compute, and how fast, from published figures.

`CardMemory` reads the device while the model is loaded; tests replace it. Only `find_card` and `CardMemory` touch a device.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

GIB, MIB = 2**30, 2**20
# Of a card's nominal memory a process gets about this share: the driver, ECC and a desktop take the rest.
USABLE_SHARE = 0.97
CONTEXT_BYTES = 300 * MIB  # of CUDA itself in one process; measured as free memory it is already gone
FIRST_WITH_FP8, FIRST_WITH_BF16, FIRST_WITH_NF4 = (8, 9), (8, 0), (7, 5)


class Speed(NamedTuple):
    gb_per_s: float  # memory bandwidth
    tflops: float  # dense 16-bit products with 32-bit sums
    capability: tuple[int, int]


# Published figures, rounded. A name matches the longest entry whose words it contains.
SPEEDS = {
    "T4": Speed(320, 65, (7, 5)), "RTX 2080 Ti": Speed(616, 54, (7, 5)), "TITAN RTX": Speed(672, 130, (7, 5)),
    "Quadro RTX 6000": Speed(672, 130, (7, 5)), "Quadro RTX 8000": Speed(672, 130, (7, 5)),
    "A2": Speed(200, 18, (8, 6)), "A10": Speed(600, 125, (8, 6)), "A10G": Speed(600, 70, (8, 6)),
    "A30": Speed(933, 165, (8, 0)), "A40": Speed(696, 150, (8, 6)),
    "A100 SXM4 40GB": Speed(1555, 312, (8, 0)), "A100 PCIE 40GB": Speed(1555, 312, (8, 0)),
    "A100": Speed(1935, 312, (8, 0)), "A100 SXM4 80GB": Speed(2039, 312, (8, 0)),
    "RTX A2000": Speed(288, 32, (8, 6)), "RTX A4000": Speed(448, 77, (8, 6)), "RTX A4500": Speed(640, 95, (8, 6)),
    "RTX A5000": Speed(768, 111, (8, 6)), "RTX A6000": Speed(768, 155, (8, 6)),
    "RTX 3060": Speed(360, 25, (8, 6)), "RTX 3060 Ti": Speed(448, 32, (8, 6)), "RTX 3070": Speed(448, 41, (8, 6)),
    "RTX 3080": Speed(760, 60, (8, 6)), "RTX 3080 Ti": Speed(912, 68, (8, 6)), "RTX 3090": Speed(936, 71, (8, 6)),
    "RTX 3090 Ti": Speed(1008, 80, (8, 6)),
    "RTX 4060": Speed(272, 30, (8, 9)), "RTX 4060 Ti": Speed(288, 44, (8, 9)), "RTX 4070": Speed(504, 58, (8, 9)),
    "RTX 4070 SUPER": Speed(504, 71, (8, 9)), "RTX 4070 Ti": Speed(504, 80, (8, 9)),
    "RTX 4070 Ti SUPER": Speed(672, 88, (8, 9)), "RTX 4080": Speed(717, 97, (8, 9)),
    "RTX 4080 SUPER": Speed(736, 104, (8, 9)), "RTX 4090": Speed(1008, 165, (8, 9)), "RTX 4090 D": Speed(1008, 147, (8, 9)),
    "L4": Speed(300, 121, (8, 9)), "L40": Speed(864, 181, (8, 9)), "L40S": Speed(864, 362, (8, 9)),
    "RTX 2000 Ada": Speed(224, 48, (8, 9)), "RTX 4000 Ada": Speed(360, 107, (8, 9)),
    "RTX 4500 Ada": Speed(432, 159, (8, 9)), "RTX 5000 Ada": Speed(576, 261, (8, 9)),
    "RTX 6000 Ada": Speed(960, 364, (8, 9)),
    "RTX 5060": Speed(448, 38, (12, 0)), "RTX 5060 Ti": Speed(448, 47, (12, 0)), "RTX 5070": Speed(672, 62, (12, 0)),
    "RTX 5070 Ti": Speed(896, 88, (12, 0)), "RTX 5080": Speed(960, 113, (12, 0)), "RTX 5090": Speed(1792, 210, (12, 0)),
    "RTX PRO 6000 Blackwell": Speed(1792, 503, (12, 0)),
    "H100 PCIe": Speed(2000, 756, (9, 0)), "H100": Speed(3350, 989, (9, 0)), "H100 NVL": Speed(3900, 835, (9, 0)),
    "H200": Speed(4800, 989, (9, 0)), "GH200": Speed(4000, 989, (9, 0)), "B200": Speed(8000, 2250, (10, 0)),
}  # fmt: skip


@dataclass(frozen=True)
class Card:
    name: str
    total_bytes: int
    usable_bytes: int  # what this process may take, CUDA itself included
    capability: tuple[int, int]
    speed: Speed | None = None  # None: not in the table

    @property
    def has_fp8(self) -> bool:
        return self.capability >= FIRST_WITH_FP8

    @property
    def has_bf16(self) -> bool:
        return self.capability >= FIRST_WITH_BF16

    def describe(self) -> str:
        major, minor = self.capability
        usable, total = self.usable_bytes / GIB, self.total_bytes / GIB
        return f"{self.name} ({total:.1f} GiB, {usable:.1f} of them usable, compute capability {major}.{minor})"


def find_card() -> Card | None:
    """The card of this machine that torch uses; None if there is none."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    free, total = torch.cuda.mem_get_info()
    return Card(name, total, min(free + CONTEXT_BYTES, total), torch.cuda.get_device_capability(), speed_of(name))


def pretended_card(total_bytes: int, name: str | None = None) -> Card:
    """A card that is not there. Without a known name it has the features of the RTX 40 series, and no known speed."""
    speed = speed_of(name) if name else None
    capability = speed.capability if speed else FIRST_WITH_FP8
    shown = name or f"a card of {total_bytes / GIB:.0f} GiB"
    return Card(shown, total_bytes, int(total_bytes * USABLE_SHARE), capability, speed)


def with_free(card: Card, free_bytes: int) -> Card:
    """The same card with only this much memory free."""
    return replace(card, usable_bytes=min(card.total_bytes, free_bytes))


def speed_of(name: str) -> Speed | None:
    words = _words(name)
    if "laptop" in words or "mobile" in words:
        return None  # slower than the card of the same number, each by its own power limit
    found = [entry for entry in SPEEDS if _within(_words(entry), words)]
    return SPEEDS[max(found, key=lambda entry: len(_words(entry)))] if found else None


def parse_size(text: str) -> int:
    """Bytes of `12GiB`, `24GB` (as cards are sold: the same as GiB), `8188MiB` or a number. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GiB|GB|G|MiB|MB|M|)\s*", text, re.IGNORECASE)
    unit = {"G": GIB, "M": MIB, "": 1}[match.group(2)[:1].upper()] if match else 0
    size = int(float(match.group(1)) * unit) if match else 0
    if size < 2**30:
        raise ValueError(f"must be a size of at least 1 GiB, like 12GiB. Given: {text}")
    return size


class CardMemory:
    """What the allocator of torch has taken from the device of this process."""

    def free_bytes(self) -> int:
        """Free on the device, after torch has returned what it holds unused."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def allocated_bytes(self) -> int:
        return torch.cuda.memory_allocated()

    def reset_peak(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        """Most bytes allocated at once since `reset_peak`."""
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


def _words(name: str) -> list[str]:
    """Letters and digits apart, so that `RTX4090` is `RTX 4090`."""
    return re.findall(r"[a-z]+|[0-9]+", name.lower())


def _within(part: list[str], whole: list[str]) -> bool:
    return any(whole[at : at + len(part)] == part for at in range(len(whole) - len(part) + 1))
