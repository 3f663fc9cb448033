"""All texts of the page, in English and Chinese.

Every key has both languages with the same placeholders (a test checks it). Sentences about failures say what happened
and what to do. Knows nothing of Streamlit.
"""

from __future__ import annotations

from web.i18n import strings_console

LANGUAGES = {"en": "English", "zh": "中文"}

TABLE: dict[str, dict[str, str]] = {
    "title": {"en": "Ask about a picture", "zh": "看图问答"},
    # Who answers.
    "model.plain": {
        "en": "**{model}** answers here.",
        "zh": "由 **{model}** 回答。",
    },
    "model.demo": {"en": "It is a small demo model.", "zh": "这是一个小型演示模型。"},
    "model.unknown": {"en": "The model server has not reported its model yet.", "zh": "模型服务尚未告知模型名称。"},
    "model.loading": {
        "en": "The model is still loading ({percent} %). You can already ask: the question will wait.",
        "zh": "模型正在加载（{percent} %）。您可以先提问，加载完成后会自动回答。",
    },
    "model.loading_unknown": {
        "en": "The model is still loading. You can already ask: the question will wait.",
        "zh": "模型正在加载。您可以先提问，加载完成后会自动回答。",
    },
    "model.connecting": {
        "en": "The server asks {hub} for the model's files. You can already ask: the question will wait.",
        "zh": "服务器正在向 {hub} 请求模型文件。您可以先提问，就绪后会自动回答。",
    },
    "model.downloading": {
        "en": "The model is being downloaded from {hub}: {here} of {total} ({percent} %), {rate}/s, about {left} left. "
        "You can already ask: the question will wait.",
        "zh": "正在从 {hub} 下载模型：{here} / {total}（{percent} %），{rate}/秒，大约还需 {left}。您可以先提问，就绪后会自动回答。",
    },
    "model.downloading_still": {
        "en": "The model is being downloaded from {hub}: {here} of {total} ({percent} %). Nothing is coming at the moment; "
        "the server keeps trying.",
        "zh": "正在从 {hub} 下载模型：{here} / {total}（{percent} %）。目前没有收到数据，服务器会继续尝试。",
    },
    "left.seconds": {"en": "{seconds} s", "zh": "{seconds} 秒"},
    "left.minutes": {"en": "{minutes} min", "zh": "{minutes} 分钟"},
    "left.hours": {"en": "{hours} h {minutes} min", "zh": "{hours} 小时 {minutes} 分钟"},
    "model.down": {
        "en": "The model server does not answer right now. This page keeps trying; "
        "if this continues, ask the operator to look into it.",
        "zh": "模型服务暂时没有响应。页面会持续重试；如果一直如此，请联系管理员。",
    },
    "model.not_serving": {
        "en": "The model server is not accepting questions right now. This page keeps checking; "
        "if this continues, ask the operator to look into it.",
        "zh": "模型服务暂时不接受提问。页面会持续检查；如果一直如此，请联系管理员。",
    },
    # Asking.
    "ask.placeholder": {"en": "Add a picture and ask about it", "zh": "添加图片，然后提问"},
    "ask.placeholder_next": {"en": "Ask a follow-up, or add another picture", "zh": "继续提问，或再添加图片"},
    "ask.default": {"en": "Describe the picture.", "zh": "描述这张图片。"},
    "ask.default_many": {"en": "Describe the pictures.", "zh": "描述这些图片。"},
    "ask.limits": {
        "en": "Drop, paste or pick up to {count} pictures, {size} MB each.",
        "zh": "拖入、粘贴或选择图片，最多 {count} 张，每张不超过 {size} MB。",
    },
    "samples.title": {"en": "Or try one of these", "zh": "或者试试这些图片"},
    "samples.more": {"en": "More questions about this picture", "zh": "继续问这张图片"},
    # Adding to the next question.
    "add.camera": {"en": "Camera", "zh": "拍照"},
    "add.url": {"en": "Picture by link", "zh": "图片链接"},
    "camera.label": {"en": "Take a picture", "zh": "拍照"},
    "camera.how": {
        "en": "The browser asks for permission to use the camera. This works only over https or on the server's own machine.",
        "zh": "浏览器会请求使用摄像头；需要 https 或在本机访问。",
    },
    "url.label": {"en": "Address of the picture", "zh": "图片地址"},
    "url.how": {
        "en": "The model server fetches it, and only from public addresses.",
        "zh": "由模型服务获取图片，且仅限公网地址。",
    },
    "url.add": {"en": "Add", "zh": "添加"},
    "pending.title": {"en": "Goes with the next question", "zh": "将随下一个问题发送"},
    "pending.remove": {"en": "Remove", "zh": "移除"},
    "preset.title": {"en": "What do you want to know?", "zh": "您想知道什么？"},
    "preset.open": {"en": "Ready-made questions", "zh": "常用问题"},
    "preset.describe": {"en": "Describe", "zh": "描述图片"},
    "preset.read": {"en": "Read text", "zh": "识别文字"},
    "preset.table": {"en": "Table to Markdown", "zh": "表格转 Markdown"},
    "preset.find": {"en": "Find and box", "zh": "定位并框出"},
    "preset.rule": {"en": "Check a rule", "zh": "按规则审核"},
    "preset.compare": {"en": "Compare two", "zh": "比较两张图"},
    "preset.json": {"en": "JSON by schema", "zh": "按模式输出 JSON"},
    # The sidebar.
    "side.new": {"en": "New chat", "zh": "新对话"},
    "side.chats": {"en": "Your chats", "zh": "您的对话"},
    "side.more": {"en": "{count} older", "zh": "更早的 {count} 个"},
    "side.thinking": {"en": "Think before answering", "zh": "先思考再回答"},
    "side.thinking_help": {
        "en": "The model first writes down its thoughts. Slower, often better.",
        "zh": "模型会先写出思考过程。速度较慢，答案往往更好。",
    },
    "side.settings": {"en": "Answer settings", "zh": "回答设置"},
    "side.system": {"en": "Instructions for every answer", "zh": "系统提示词"},
    "side.system_help": {
        "en": "The system prompt: how the model should behave in this chat.",
        "zh": "系统提示：规定模型在对话中的行为。",
    },
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
    "side.top_p": {"en": "Top p", "zh": "核采样 top_p"},
    "side.top_p_help": {
        "en": "Chooses only among the likeliest words whose probabilities add up to this.",
        "zh": "只从累计概率达到该值的候选词中选取。",
    },
    "side.top_k": {"en": "Top k", "zh": "候选数 top_k"},
    "side.top_k_help": {
        "en": "Chooses only among this many of the likeliest words; 0 means no limit.",
        "zh": "只从概率最高的若干个词中选取；0 表示不限制。",
    },
    "side.penalty": {"en": "Repetition penalty", "zh": "重复惩罚"},
    "side.penalty_help": {
        "en": "Above 1, words that were already used become less likely.",
        "zh": "大于 1 时，已出现的词更不易重复。",
    },
    "side.seed": {"en": "Seed", "zh": "随机种子"},
    "side.seed_help": {"en": "The same seed gives the same answer.", "zh": "相同的种子得到相同的回答。"},
    "side.seed_none": {"en": "random", "zh": "随机"},
    "side.reset": {"en": "Back to the model's defaults", "zh": "恢复模型默认值"},
    "side.format": {"en": "JSON and tools", "zh": "JSON 与工具"},
    "side.json": {"en": "Answer as JSON", "zh": "以 JSON 回答"},
    "side.json_help": {
        "en": "The answer must follow the schema below and is checked against it; an empty schema allows any JSON.",
        "zh": "回答须符合下方模式并会被校验；模式留空则接受任意 JSON。",
    },
    "side.schema": {"en": "JSON schema", "zh": "JSON 模式（schema）"},
    "side.schema_wrong": {
        "en": "The JSON schema cannot be used ({why}). Correct it under \"JSON and tools\"; nothing was sent.",
        "zh": "JSON 模式无法使用（{why}）。请在“JSON 与工具”中更正；问题尚未发送。",
    },
    "side.tools": {"en": "Tools, as JSON", "zh": "工具定义（JSON）"},
    "side.tools_help": {
        "en": "Definitions in OpenAI's format. The page runs no tools: it shows which ones the model calls and sends the results that you enter.",
        "zh": "采用 OpenAI 格式的定义。页面不会执行工具：它显示模型要调用什么，并把您填写的结果发回模型。",
    },
    "side.tools_wrong": {
        "en": "The tools cannot be used ({why}). Correct them under \"JSON and tools\"; nothing was sent.",
        "zh": "工具定义无法使用（{why}）。请在“JSON 与工具”中更正；问题尚未发送。",
    },
    "side.language": {"en": "Language", "zh": "语言"},
    # The open chat.
    "chat.menu": {"en": "This chat", "zh": "当前对话"},
    "chat.title": {"en": "Name", "zh": "名称"},
    "chat.markdown": {"en": "Save as Markdown", "zh": "导出为 Markdown"},
    "chat.json": {"en": "Save as JSON", "zh": "导出为 JSON"},
    "chat.delete": {"en": "Delete this chat", "zh": "删除此对话"},
    "chat.delete_sure": {"en": "Delete it for good", "zh": "确认永久删除"},
    "chat.changed": {
        "en": "This chat went on in another tab. Its newest state is shown now; nothing was sent, and your question is still in the box.",
        "zh": "此对话已在另一个标签页中继续。现在显示的是最新内容；尚未发送任何内容，您的问题仍在输入框中。",
    },
    "chat.full": {
        "en": "A chat holds {limit} questions. Start a new chat to go on; nothing was sent.",
        "zh": "一个对话最多 {limit} 个问题。请开始新对话；问题尚未发送。",
    },
    "chat.replaced": {
        "en": "The file of the chats was damaged. What could be read was kept; the damaged file lies beside it in `logs/`.",
        "zh": "对话文件已损坏。可读出的内容已保留，损坏的文件仍在 `logs/` 中。",
    },
    "chat.unsaved": {
        "en": "This chat cannot be saved right now (is the disk full?). It stays here until this tab is closed; "
        "\"This chat\" at the side saves it as a file.",
        "zh": "对话暂时无法保存（磁盘已满？）。关闭此标签页前内容仍在；可在侧栏“当前对话”中导出为文件。",
    },
    "export.question": {"en": "Question", "zh": "问题"},
    "export.answer": {"en": "Answer", "zh": "回答"},
    # Changing the last question.
    "edit.edit": {"en": "Edit the question", "zh": "修改问题"},
    "edit.label": {"en": "Your question", "zh": "您的问题"},
    "edit.send": {"en": "Send", "zh": "发送"},
    "edit.cancel": {"en": "Cancel", "zh": "取消"},
    # While an answer comes.
    "live.sent": {"en": "Sent. Waiting for the first word… {seconds} s", "zh": "已发送，等待回答……{seconds} 秒"},
    "live.looking": {"en": "Reading the question… {seconds} s", "zh": "正在读取问题……{seconds} 秒"},
    "live.queued": {
        "en": "Waiting in line, place {position}… {seconds} s",
        "zh": "排队中，第 {position} 位……{seconds} 秒",
    },
    "live.loading": {
        "en": "The model is still loading. Your question will be sent as soon as it is ready… {seconds} s",
        "zh": "模型正在加载，就绪后会立即提问……{seconds} 秒",
    },
    "live.loading_percent": {
        "en": "The model is still loading ({percent} %). Your question will be sent as soon as it is ready… {seconds} s",
        "zh": "模型正在加载（{percent} %），就绪后会立即提问……{seconds} 秒",
    },
    "live.thinking": {"en": "Thinking…", "zh": "正在思考……"},
    "live.stop": {"en": "Stop", "zh": "停止"},
    # Under an answer.
    "answer.thought": {"en": "Thought for {seconds} s", "zh": "思考了 {seconds} 秒"},
    "answer.stopped": {"en": "Stopped. What had been written is kept.", "zh": "已停止，已写出的内容保留。"},
    "answer.stopped_early": {"en": "Stopped before the answer began.", "zh": "回答开始前已停止。"},
    "answer.empty": {"en": "The model ended without an answer.", "zh": "模型没有给出回答。"},
    "answer.marked": {"en": "Marked in the picture: {box}", "zh": "已在图片中标出：{box}"},
    "answer.tokens": {"en": "{count} tokens", "zh": "{count} 个 token"},
    "answer.ttft": {"en": "first word after {seconds} s", "zh": "首字 {seconds} 秒"},
    "answer.rate": {"en": "{rate} tokens/s", "zh": "{rate} token/秒"},
    "finish.stop": {"en": "complete", "zh": "已完成"},
    "finish.length": {
        "en": "cut off at the longest allowed answer",
        "zh": "达到最长回答限制，已截断",
    },
    "finish.tool_calls": {"en": "asked for a tool", "zh": "请求调用工具"},
    "finish.repetition": {"en": "ended, because it repeated itself", "zh": "因内容重复而结束"},
    "answer.prompt_tokens": {"en": "{count} tokens in the question", "zh": "问题含 {count} 个 token"},
    "answer.cached": {"en": "{count} of them from the cache", "zh": "其中 {count} 个来自缓存"},
    "answer.earlier": {"en": "Earlier answer", "zh": "之前的回答"},
    "answer.earlier_to": {"en": "Earlier answer to: {question}", "zh": "之前的回答：{question}"},
    "answer.call": {"en": "Asks for the tool **{name}**", "zh": "请求调用工具 **{name}**"},
    "tool.result": {"en": "Result of the tool {name}", "zh": "工具 {name} 的结果"},
    "tool.send": {"en": "Send to the model", "zh": "发送给模型"},
    "tool.result_of": {"en": "Result of {name}", "zh": "{name} 的结果"},
    "answer.again": {"en": "Try again", "zh": "重试"},
    "answer.other": {"en": "Answer again", "zh": "重新回答"},
    "answer.fewer": {"en": "Ask without the older pictures", "zh": "不带较早的图片重试"},
    "answer.go_on": {"en": "Go on", "zh": "继续"},
    "answer.go_on_question": {"en": "Go on where you stopped.", "zh": "请从中断处继续。"},
    "answer.copy": {"en": "Copy", "zh": "复制"},
    "json.valid": {"en": "Valid JSON", "zh": "JSON 有效"},
    "json.fits": {"en": "Valid JSON that fits the schema", "zh": "JSON 有效且符合模式"},
    "json.broken": {
        "en": "This is not JSON: {problem} ({where}). Ask again, or allow a longer answer.",
        "zh": "这不是有效的 JSON：{problem}（{where}）。请重新提问，或允许更长的回答。",
    },
    "json.misfit": {
        "en": "Valid JSON, but it does not fit the schema at {where}: {problem}",
        "zh": "JSON 有效，但在 {where} 处不符合模式：{problem}",
    },
    "boxes.title": {"en": "{count} marked in {name}", "zh": "在 {name} 中标出 {count} 处"},
    "boxes.label": {"en": "What", "zh": "内容"},
    "boxes.pixels": {"en": "Pixels", "zh": "像素坐标"},
    "boxes.image": {"en": "Save the picture", "zh": "保存图片"},
    "boxes.json": {"en": "Save as JSON", "zh": "保存为 JSON"},
    "boxes.not_drawn": {
        "en": "Only the model server has this picture, so places are listed below and not drawn.",
        "zh": "此图片仅模型服务持有，因此下方只列出位置，不作标注。",
    },
    "boxes.outside": {
        "en": "{count} cannot be drawn: the numbers are not within 0-1000. Ask for coordinates from 0 to 1000 of width and height.",
        "zh": "有 {count} 处无法标出：坐标不在 0-1000 内。请要求按宽高的 0-1000 给出位置。",
    },
    "image.alt": {"en": "Picture: {name}", "zh": "图片：{name}"},
    "image.boxes": {"en": "Where it is, drawn on {name}", "zh": "在 {name} 上标出的位置"},
    "image.elsewhere": {"en": "{name}, fetched by the model server", "zh": "{name}（由模型服务获取）"},
    "image.left_out": {"en": "Not sent any more.", "zh": "不再发送。"},
    "image.lost": {"en": "{name} is lost", "zh": "{name} 已丢失"},
    # What can go wrong with a picture.
    "image.no_url": {
        "en": "{name} is not the address of a picture: it must begin with https:// or http://.",
        "zh": "{name} 不是有效的图片地址：须以 https:// 或 http:// 开头。",
    },
    "image.too_big": {
        "en": "{name} is larger than {limit} MB. Save it smaller and add it again; nothing was sent.",
        "zh": "{name} 超过 {limit} MB。请压缩后重新添加；问题尚未发送。",
    },
    "image.too_many_pixels": {
        "en": "{name} has more than {limit} million pixels. Make it smaller and add it again; nothing was sent.",
        "zh": "{name} 超过 {limit} 百万像素。请缩小后重新添加；问题尚未发送。",
    },
    "image.unreadable": {
        "en": "{name} is not a picture that can be read here. "
        "Save it as PNG or JPEG and add it again; nothing was sent.",
        "zh": "无法读取 {name}。请另存为 PNG 或 JPEG 后重新添加；问题尚未发送。",
    },
    "image.too_many": {
        "en": "This chat would hold {count} pictures; {limit} are allowed. "
        "Send fewer, or start a new chat; nothing was sent.",
        "zh": "本次对话将有 {count} 张图片，最多允许 {limit} 张。请减少图片或开始新对话；问题尚未发送。",
    },
    # What can go wrong with a question.
    "error.down": {
        "en": "The model server does not answer. Wait a moment and try again; "
        "if this continues, look at the console page or ask the operator.",
        "zh": "模型服务没有响应。请稍后重试；如果一直如此，请查看控制台页面或联系管理员。",
    },
    "error.silent": {
        "en": "The model server took the question but has gone quiet. "
        "Try again; if this continues, ask the operator to look into it.",
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
    "error.key_limit": {
        "en": "All visitors of this page share one key, and that key has reached its limit of questions. "
        "Wait up to a minute and try again; if this continues, ask the operator.",
        "zh": "本页面的所有访客共用一个密钥，该密钥已达到提问数量上限。请等待至多一分钟再重试；如果一直如此，请联系管理员。",
    },
    "error.draining": {
        "en": "The model server is being restarted. Try again in a minute.",
        "zh": "模型服务正在重启。请一分钟后重试。",
    },
    "error.unavailable": {
        "en": "The model server is not accepting questions right now. Try again in a minute; "
        "if this continues, ask the operator to look into it.",
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
    "error.too_slow": {
        "en": "The answer took longer than the model server allows. Ask for a shorter one, or try again later.",
        "zh": "回答超出了模型服务允许的时间。请缩短要求，或稍后重试。",
    },
    "error.refused": {
        "en": "The model server did not accept the question: {detail}",
        "zh": "模型服务没有接受这个问题：{detail}",
    },
    "error.broken": {
        "en": "Something went wrong inside the model server. Try again; if this continues, tell the operator.",
        "zh": "模型服务内部出错。请重试；如果一直如此，请告知管理员。",
    },
    "error.request_id": {"en": "Request {id}", "zh": "请求编号 {id}"},
    "error.page": {
        "en": "Something went wrong in this page. Reload it; if this continues, give the operator the number {id}.",
        "zh": "页面出错了。请刷新；如果一直如此，请把编号 {id} 告知管理员。",
    },
    # The login page.
    "login.title": {"en": "This page is private", "zh": "此页面需要访问令牌"},
    "login.how": {
        "en": "Ask the operator for the link with the token, or enter the token here.",
        "zh": "请向管理员索取带令牌的链接，或在此输入令牌。",
    },
    "login.token": {"en": "Token", "zh": "令牌"},
    "login.open": {"en": "Open", "zh": "进入"},
    "login.wrong": {
        "en": "This token is not right. Copy it again; the operator finds it as GLM_WEB_TOKEN in the file .env.",
        "zh": "令牌不正确。请重新复制；管理员可在 .env 文件的 GLM_WEB_TOKEN 中找到它。",
    },
}
TABLE |= strings_console.TABLE


class Texts:
    """The table in one language: `texts("side.new")` is the text of a key, with its placeholders filled in."""

    def __init__(self, language: str) -> None:
        self.language = language if language in LANGUAGES else "en"

    def __call__(self, key: str, **values: object) -> str:
        return TABLE[key][self.language].format(**values)


def language_for(locale: str | None) -> str:
    """The page's language for a browser's locale such as `zh-CN` or `de`."""
    return "zh" if (locale or "").lower().startswith("zh") else "en"
