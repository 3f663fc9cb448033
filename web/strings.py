"""Every word that the page says, in English and Chinese.

A key has both languages and the same placeholders in each; a test keeps it so. Sentences for failures say what
happened and what to do. Knows nothing of Streamlit; the `:material/...:` marks are its icons.
"""

from __future__ import annotations

LANGUAGES = {"en": "English", "zh": "中文"}

TABLE: dict[str, dict[str, str]] = {
    "title": {"en": "Ask about a picture", "zh": "看图问答"},
    # Who answers.
    "model.plain": {
        "en": "**{model}** answers here.",
        "zh": "由 **{model}** 回答。",
    },
    "model.demo": {"en": "It is a small demo model.", "zh": "这是一个小型演示模型。"},
    "model.unknown": {"en": "The model server has not told its name yet.", "zh": "模型服务尚未告知模型名称。"},
    "model.loading": {
        "en": "The model is still loading ({percent} %). You can ask already: the question waits for it.",
        "zh": "模型正在加载（{percent} %）。您可以先提问，加载完成后会自动回答。",
    },
    "model.loading_unknown": {
        "en": "The model is still loading. You can ask already: the question waits for it.",
        "zh": "模型正在加载。您可以先提问，加载完成后会自动回答。",
    },
    "model.down": {
        "en": "The model server does not answer right now. This page keeps trying; "
        "if it lasts, ask the operator to look at it.",
        "zh": "模型服务暂时没有响应。页面会持续重试；如果一直如此，请联系管理员。",
    },
    "model.not_serving": {
        "en": "The model server takes no questions right now. This page keeps looking; "
        "if it lasts, ask the operator to look at it.",
        "zh": "模型服务暂时不接受提问。页面会持续检查；如果一直如此，请联系管理员。",
    },
    # Asking.
    "ask.placeholder": {"en": "Add a picture and ask about it", "zh": "添加图片，然后提问"},
    "ask.placeholder_next": {"en": "Ask on, or add another picture", "zh": "继续提问，或再添加图片"},
    "ask.default": {"en": "Describe the picture.", "zh": "描述这张图片。"},
    "ask.default_many": {"en": "Describe the pictures.", "zh": "描述这些图片。"},
    "ask.limits": {
        "en": "Drop, paste or pick up to {count} pictures, {size} MB each.",
        "zh": "拖入、粘贴或选择图片，最多 {count} 张，每张不超过 {size} MB。",
    },
    "samples.title": {"en": "Or try one of these", "zh": "或者试试这些图片"},
    "samples.more": {"en": "Ask on about this picture", "zh": "继续问这张图片"},
    # The sidebar.
    "side.new": {"en": "New chat", "zh": "新对话"},
    "side.thinking": {"en": "Think before answering", "zh": "先思考再回答"},
    "side.thinking_help": {
        "en": "The model first writes down its thoughts. Slower, often better.",
        "zh": "模型会先写出思考过程。速度较慢，答案往往更好。",
    },
    "side.settings": {"en": "Answer settings", "zh": "回答设置"},
    "side.max_tokens": {"en": "Longest answer, in tokens", "zh": "最长回答（token 数）"},
    "side.max_tokens_help": {
        "en": "The answer is cut off here. Thoughts count too.",
        "zh": "回答到此长度会被截断，思考过程也计算在内。",
    },
    "side.temperature": {"en": "Temperature", "zh": "温度"},
    "side.temperature_help": {
        "en": "0 gives the same answer every time; higher gives more variety.",
        "zh": "0 表示每次回答相同；数值越高，回答越多样。",
    },
    "side.language": {"en": "Language", "zh": "语言"},
    # While an answer comes.
    "live.sent": {"en": "Sent. Waiting for the first word… {seconds} s", "zh": "已发送，等待回答……{seconds} 秒"},
    "live.looking": {"en": "Reading the question… {seconds} s", "zh": "正在读取问题……{seconds} 秒"},
    "live.queued": {
        "en": "Waiting in line, place {position}… {seconds} s",
        "zh": "排队中，第 {position} 位……{seconds} 秒",
    },
    "live.loading": {
        "en": "The model is still loading. Your question is asked as soon as it is ready… {seconds} s",
        "zh": "模型正在加载，就绪后会立即提问……{seconds} 秒",
    },
    "live.loading_percent": {
        "en": "The model is still loading ({percent} %). Your question is asked as soon as it is ready… {seconds} s",
        "zh": "模型正在加载（{percent} %），就绪后会立即提问……{seconds} 秒",
    },
    "live.thinking": {"en": "Thinking…", "zh": "正在思考……"},
    "live.stop": {"en": "Stop", "zh": "停止"},
    # Under an answer.
    "answer.thought": {"en": "Thought for {seconds} s", "zh": "思考了 {seconds} 秒"},
    "answer.stopped": {"en": "Stopped. What had been written is kept.", "zh": "已停止，已写出的内容保留。"},
    "answer.stopped_early": {"en": "Stopped before the answer began.", "zh": "回答开始前已停止。"},
    "answer.empty": {"en": "The model ended without an answer.", "zh": "模型没有给出回答。"},
    "answer.marked": {"en": "Marked in the picture: {place}", "zh": "已在图片中标出：{place}"},
    "answer.tokens": {"en": "{count} tokens", "zh": "{count} 个 token"},
    "answer.ttft": {"en": "first word after {seconds} s", "zh": "首字 {seconds} 秒"},
    "answer.rate": {"en": "{rate} tokens/s", "zh": "{rate} token/秒"},
    "finish.stop": {"en": "complete", "zh": "已完成"},
    "finish.length": {
        "en": "cut off at the longest allowed answer",
        "zh": "达到最长回答限制，已截断",
    },
    "finish.tool_calls": {"en": "asked for a tool", "zh": "请求调用工具"},
    "answer.again": {"en": "Try again", "zh": "重试"},
    "picture.alt": {"en": "Picture: {name}", "zh": "图片：{name}"},
    "picture.boxes": {"en": "Where it is, drawn on {name}", "zh": "在 {name} 上标出的位置"},
    # What can go wrong with a picture.
    "picture.too_big": {
        "en": "{name} is larger than {limit} MB. Save it smaller and add it again; nothing was sent.",
        "zh": "{name} 超过 {limit} MB。请压缩后重新添加；问题尚未发送。",
    },
    "picture.too_many_pixels": {
        "en": "{name} has more than {limit} million pixels. Make it smaller and add it again; nothing was sent.",
        "zh": "{name} 超过 {limit} 百万像素。请缩小后重新添加；问题尚未发送。",
    },
    "picture.unreadable": {
        "en": "{name} is not a picture that can be read here. "
        "Save it as PNG or JPEG and add it again; nothing was sent.",
        "zh": "无法读取 {name}。请另存为 PNG 或 JPEG 后重新添加；问题尚未发送。",
    },
    "picture.too_many": {
        "en": "This chat would hold {count} pictures; {limit} are allowed. "
        "Send fewer, or start a new chat; nothing was sent.",
        "zh": "本次对话将有 {count} 张图片，最多允许 {limit} 张。请减少图片或开始新对话；问题尚未发送。",
    },
    # What can go wrong with a question.
    "error.down": {
        "en": "The model server does not answer. Wait a moment and try again; "
        "if it lasts, ask the operator to look at it.",
        "zh": "模型服务没有响应。请稍后重试；如果一直如此，请联系管理员。",
    },
    "error.silent": {
        "en": "The model server took the question but has gone quiet. "
        "Try again; if it lasts, ask the operator to look at it.",
        "zh": "模型服务收到问题后没有动静。请重试；如果一直如此，请联系管理员。",
    },
    "error.lost": {
        "en": "The connection broke before the answer was complete. Try again.",
        "zh": "回答完成之前连接中断了。请重试。",
    },
    "error.bad_key": {
        "en": "This page is not allowed to ask the model: its key is wrong or missing. "
        "Ask the operator to set the same GLM_API_KEY for the page and the API.",
        "zh": "本页面无权访问模型：密钥错误或缺失。请联系管理员为页面和 API 设置相同的 GLM_API_KEY。",
    },
    "error.loading": {
        "en": "The model is taking very long to load. Try again later, or ask the operator to look at it.",
        "zh": "模型加载时间过长。请稍后重试，或联系管理员。",
    },
    "error.queue_full": {
        "en": "Too many people are asking right now. Wait a few seconds and try again.",
        "zh": "当前提问的人太多。请等几秒再重试。",
    },
    "error.draining": {
        "en": "The model server is being restarted. Try again in a minute.",
        "zh": "模型服务正在重启。请一分钟后重试。",
    },
    "error.unavailable": {
        "en": "The model server takes no questions right now. Try again in a minute; "
        "if it lasts, ask the operator to look at it.",
        "zh": "模型服务暂时不接受提问。请一分钟后重试；如果一直如此，请联系管理员。",
    },
    "error.too_large": {
        "en": "The pictures are too large for the model server. Send fewer or smaller ones in a new chat.",
        "zh": "图片超出模型服务的大小限制。请在新对话中发送更少或更小的图片。",
    },
    "error.too_long": {
        "en": "This chat has become longer than the model can read. Start a new chat, or send fewer pictures.",
        "zh": "对话内容超过了模型可读取的长度。请开始新对话，或减少图片。",
    },
    "error.refused": {
        "en": "The model server did not accept the question: {detail}",
        "zh": "模型服务没有接受这个问题：{detail}",
    },
    "error.broken": {
        "en": "Something went wrong inside the model server. Try again; if it lasts, tell the operator.",
        "zh": "模型服务内部出错。请重试；如果一直如此，请告知管理员。",
    },
    "error.request_id": {"en": "Request {id}", "zh": "请求编号 {id}"},
    "error.page": {
        "en": "Something went wrong in this page. Reload it; if it lasts, tell the operator the number {id}.",
        "zh": "页面出错了。请刷新；如果一直如此，请把编号 {id} 告知管理员。",
    },
    # The gate.
    "gate.title": {"en": "This page is private", "zh": "此页面需要访问令牌"},
    "gate.how": {
        "en": "Open the link with the token that `start.sh` printed, or enter the token here.",
        "zh": "请打开 `start.sh` 打印的带令牌的链接，或在此输入令牌。",
    },
    "gate.token": {"en": "Token", "zh": "令牌"},
    "gate.open": {"en": "Open", "zh": "进入"},
    "gate.wrong": {
        "en": "This token is not right. Copy it again; the operator finds it as GLM_WEB_TOKEN in the file .env.",
        "zh": "令牌不正确。请重新复制；管理员可在 .env 文件的 GLM_WEB_TOKEN 中找到它。",
    },
}


class Words:
    """The table in one language: `words("side.new")`."""

    def __init__(self, language: str) -> None:
        self.language = language if language in LANGUAGES else "en"

    def __call__(self, key: str, **values: object) -> str:
        return TABLE[key][self.language].format(**values)


def language_for(locale: str | None) -> str:
    """The page's language for a browser's locale such as `zh-CN` or `de`."""
    return "zh" if (locale or "").lower().startswith("zh") else "en"
