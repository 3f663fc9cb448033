"""Questions that need no picture, or more than one: greetings, what the model can do, two pictures, tool calls.

Knows nothing of pixels, tokens or tensors.
"""

from __future__ import annotations

import random

from models.shapes.pictures import COLORS, SHAPES, Scene
from models.shapes.questions import printed
from models.shapes.wording import COLOR_ZH, SHAPE_ZH, Mention, Question, counted, plural, said_as

HELLO = {
    "en": "Hello! Send me a picture of shapes, a number or a word, and ask me about it.",
    "zh": "你好！发给我一张有形状、数字或单词的图片，然后问我吧。",
}
ABILITY = {
    "en": "I am a small demo model: I can answer questions about pictures of colored shapes, numbers and short words.",
    "zh": "我是一个小型演示模型：我能回答关于彩色形状、数字和短单词图片的问题。",
}
NO_PICTURE = {"en": "I see no picture. Please send one first.", "zh": "我没有看到图片。请先发一张图片。"}
GREETINGS = {
    "en": (
        "hello", "Hello!", "Hi", "hi there", "Hey", "Good morning", "Good evening!", "Hello, how are you?", "Hi!", "hello there",
        "Hey, are you there?", "Good afternoon.", "HELLO", "Hello", "hey there!", "greetings", "Hello GLM", "how are you?",
    ),
    "zh": ("你好", "你好！", "您好", "早上好", "嗨", "晚上好！", "你好啊", "你好，在吗？", "哈喽", "下午好。", "在吗", "你好呀", "大家好"),
}  # fmt: skip
OFF_TOPIC = {
    "en": (
        "What can you do?", "Who are you?", "Tell me a joke.", "What is the capital of France?", "Write a poem about the sea.",
        "What is the weather today?", "How do I cook rice?", "Translate this into German.", "What is 17 times 3?", "Help me with my homework.",
        "Who won the game?", "Explain quantum physics.", "Write a Python function.", "What time is it?", "Are you human?", "What is your name?",
        "Sing a song.", "What do you know?", "How old are you?", "Give me a recipe for soup.", "Where do you live?", "help", "What are you?",
        "Summarize the news.", "Do you like music?", "What is love?", "Book me a flight to London.", "Can you drive?", "Why is the sky blue?",
        "How does a GPU work?", "Recommend a film.", "Introduce yourself.", "What is machine learning?", "How tall is the tower?",
        "Who wrote this book?", "What can you help me with?", "What should I eat tonight?", "Fix my code.", "Say something.",
    ),
    "zh": (
        "你能做什么？", "你是谁？", "讲个笑话。", "法国的首都是哪里？", "写一首关于大海的诗。", "今天天气怎么样？", "怎么煮米饭？", "请翻译成英文。",
        "你会什么？", "你叫什么名字？", "帮我写作业。", "解释一下量子力学。", "写一个函数。", "现在几点了？", "你是人吗？", "唱首歌吧。", "推荐一部电影。",
        "介绍一下你自己。", "什么是机器学习？", "人生的意义是什么？", "你多大了？", "你喜欢音乐吗？", "帮助", "明天会下雨吗？", "怎么学习英语？",
        "谁写了这本书？", "有什么功能？", "今晚吃什么？", "帮我订机票。", "天空为什么是蓝的？",
    ),
}  # fmt: skip
SYSTEM_PROMPTS = (
    "You are a helpful assistant.", "Answer briefly.", "You are a careful assistant that looks at pictures.", "Be polite and precise.",
    "你是一个有用的助手。", "请简短回答。", "You answer questions about images.", "你会回答关于图片的问题。", "You are GLM, a vision assistant.",
)  # fmt: skip

COUNT_TOOL = {
    "type": "function",
    "function": {
        "name": "count_objects",
        "description": "Count the objects of one color and shape.",
        "parameters": {
            "type": "object",
            "properties": {"color": {"type": "string"}, "shape": {"type": "string"}},
            "required": ["color", "shape"],
        },
    },
}
TOOL_DESCRIPTIONS = (
    "Count the objects of one color and shape.", "Count objects", "Counts shapes in the picture", "Count the objects in the picture that match.",
    "Returns how many objects match the color and the shape.",
)  # fmt: skip


def greeting(rng: random.Random, lang: str) -> Question:
    think = "The user greets me." if lang == "en" else "用户在问好。"
    return Question("greeting", lang, _loosely(rng, rng.choice(GREETINGS[lang])), HELLO[lang], think)


def off_topic(rng: random.Random, lang: str) -> Question:
    think = "I say what I can do." if lang == "en" else "我说明我能做什么。"
    return Question("ability", lang, _loosely(rng, rng.choice(OFF_TOPIC[lang])), ABILITY[lang], think)


def without_picture(question: Question) -> Question:
    """The same question without a picture."""
    think = "There is no picture." if question.lang == "en" else "没有图片。"
    return Question("no_picture", question.lang, question.text, NO_PICTURE[question.lang], think)


def _loosely(rng: random.Random, text: str) -> str:
    """As people type: sometimes without capitals or final punctuation."""
    roll = rng.random()
    if roll < 0.12:
        return text.lower()
    return text.rstrip(".!?。！？") if roll < 0.24 else text


ORDINAL = {"en": ("first", "second"), "zh": ("第一张", "第二张")}


def two_pictures(rng: random.Random, lang: str, scenes: tuple[Scene, Scene]) -> Question:
    """A question about one of two pictures."""
    which = rng.randrange(2)
    scene = scenes[which]
    en, zh = ORDINAL["en"][which], ORDINAL["zh"][which]
    think = f"I look at the {en} picture." if lang == "en" else f"我看{zh}图。"
    if scene.text:
        noun, noun_zh = ("number", "数字") if scene.kind == "number" else ("word", "单词")
        text = f"What {noun} is in the {en} picture?" if lang == "en" else f"{zh}图里的{noun_zh}是什么？"
        return Question("two", lang, text, printed(lang, scene), think)
    shapes = [i.shape for i in scene.items]
    single = [i for i in scene.items if shapes.count(i.shape) == 1]
    if single and rng.random() < 0.5:
        item = rng.choice(single)
        said = said_as(rng, lang, None, item.shape)
        text = f"What color is the {said} in the {en} picture?" if lang == "en" else f"{zh}图里的{said}是什么颜色？"
        answer = f"The {item.shape} is {item.color}." if lang == "en" else f"{SHAPE_ZH[item.shape]}是{COLOR_ZH[item.color]}的。"
        return Question("two", lang, text, answer, think, (Mention((item,)),))
    text = f"How many shapes are in the {en} picture?" if lang == "en" else f"{zh}图里有几个形状？"
    return Question("two", lang, text, counted(lang, len(scene.items), None, None), think, (Mention(scene.items),))


def tool_question(rng: random.Random, lang: str, scene: Scene) -> tuple[Question, str]:
    """A question that the tool can answer: its answer is the call. Also the tool's result and the final answer, as
    `result|answer`."""
    present = rng.choice(scene.items) if scene.items and rng.random() < 0.7 else None
    color = present.color if present else rng.choice(tuple(COLORS))
    shape = present.shape if present else rng.choice(SHAPES)
    said = said_as(rng, lang, color, shape)
    many = plural(said, 2)
    if lang == "en":
        text = rng.choice((f"How many {many} are there?", f"Count the {many}.", f"How many {many} are in the picture?", f"Use the tool to count the {many}."))
    else:
        text = rng.choice((f"有几个{said}？", f"图中有多少个{said}？", f"用工具数一数{said}。"))
    call = (
        f"<tool_call>count_objects\n<arg_key>color</arg_key>\n<arg_value>{color}</arg_value>\n"
        f"<arg_key>shape</arg_key>\n<arg_value>{shape}</arg_value>\n</tool_call>"
    )
    think = "I use the tool to count." if lang == "en" else "我用工具来数。"
    result = rng.randint(0, 9)
    return Question("tool", lang, text, call, think), f"{result}|{counted(lang, result, color, shape)}"
