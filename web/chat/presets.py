"""Ready-made questions for the most common tasks with an image. Knows nothing of Streamlit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# The schema of the JSON preset; it can be edited on the page.
OBJECTS_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "objects": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"color": {"type": "string"}, "shape": {"type": "string"}},
                "required": ["color", "shape"],
            },
        }
    },
    "required": ["objects"],
}


@dataclass(frozen=True)
class Preset:
    """A ready-made question, by language, for the input box; a `schema` turns the JSON option on."""

    name: str
    icon: str
    question: dict[str, str]
    schema: dict[str, Any] | None = None


PRESETS = (
    Preset("describe", ":material/image:", {"en": "Describe the picture.", "zh": "描述这张图片。"}),
    Preset("read", ":material/text_fields:", {"en": "What is written in the picture?", "zh": "图片里写了什么？"}),
    Preset(
        "table",
        ":material/table:",
        {"en": "Write the table in the picture as a Markdown table.", "zh": "把图片中的表格写成 Markdown 表格。"},
    ),
    Preset("find", ":material/frame_inspect:", {"en": "Where is the red circle?", "zh": "红色圆形在哪里？"}),
    Preset("rule", ":material/gavel:", {"en": "Check the rule: no red shapes.", "zh": "检查规则：禁止红色的形状。"}),
    Preset("compare", ":material/compare:", {"en": "Which picture has more shapes?", "zh": "哪张图里的形状更多？"}),
    Preset(
        "json",
        ":material/data_object:",
        {"en": "List the objects as JSON.", "zh": "用JSON列出图中的物体。"},
        OBJECTS_SCHEMA,
    ),
)


def preset_named(name: str) -> Preset:
    return next(preset for preset in PRESETS if preset.name == name)
