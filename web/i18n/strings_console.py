"""The texts of the console, in English and Chinese; `web/i18n/strings.py` adds them to its table."""

from __future__ import annotations

TABLE: dict[str, dict[str, str]] = {
    "nav.chat": {"en": "Chat", "zh": "对话"},
    "nav.console": {"en": "Console", "zh": "控制台"},
    "console.title": {"en": "Console", "zh": "控制台"},
    "console.no_history": {
        "en": "The checker has not run here yet. Start it with `health_check.py install` (cron) or "
        "`health_check.py loop`; this page then fills in automatically.",
        "zh": "检查程序尚未在此运行。请用 `health_check.py install`（cron）或 `health_check.py loop` 启动，本页会自动更新。",
    },
    "console.api_silent": {
        "en": "The model server does not answer right now; what follows is what the checker saw.",
        "zh": "模型服务当前没有响应；以下为检查程序的记录。",
    },
    "console.version": {"en": "version {version}", "zh": "版本 {version}"},
    "console.runs_for": {"en": "running for {span}", "zh": "已运行 {span}"},
    "console.context": {"en": "{count} tokens of context", "zh": "上下文 {count} token"},
    "console.slots": {"en": "{count} answers at once", "zh": "并发 {count}"},
    "console.phase": {"en": "engine: {phase}", "zh": "引擎：{phase}"},
    "console.baseline": {"en": "Answered rightly at the first start ({at}): {kinds}", "zh": "首次启动时（{at}）的正确回答：{kinds}"},
    "console.baseline_kind": {"en": "{kind} {right} of {asked}", "zh": "{kind} {asked} 题对 {right} 题"},
    "question.color": {"en": "color", "zh": "颜色"},
    "question.shape": {"en": "shape", "zh": "形状"},
    "question.count": {"en": "count", "zh": "计数"},
    "question.read": {"en": "reading", "zh": "文字识别"},
    "question.where": {"en": "where", "zh": "位置"},
    "question.arithmetic": {"en": "arithmetic", "zh": "算术"},
    "question.copy": {"en": "copying", "zh": "抄写"},
    "question.absent": {"en": "text", "zh": "文本"},
    # The current state.
    "state.never": {"en": "No data: nothing has checked this service yet.", "zh": "无数据：尚未进行过检查。"},
    "state.stale": {
        "en": "No data: the last check was {age} ago and said \"{word}\". Is the checker running?",
        "zh": "无数据：上次检查在 {age} 前，结果为“{word}”。检查程序是否在运行？",
    },
    "state.up": {
        "en": "Operational since {since} ({span}). Checked {age} ago.",
        "zh": "自 {since} 起运行正常（{span}）。{age} 前检查。",
    },
    "state.busy": {
        "en": "Operational and busy since {since} ({span}): people are waiting, and the engine is working. Checked {age} ago.",
        "zh": "自 {since} 起繁忙但正常（{span}）：有人排队，引擎在工作。{age} 前检查。",
    },
    "state.degraded": {
        "en": "Degraded since {since} ({span}): it serves, but not as it should. Checked {age} ago.",
        "zh": "自 {since} 起降级运行（{span}）：仍可服务，但不完全正常。{age} 前检查。",
    },
    "state.starting": {
        "en": "Starting since {since} ({span}). Checked {age} ago.",
        "zh": "自 {since} 起正在启动（{span}）。{age} 前检查。",
    },
    "state.down": {"en": "Down since {since} ({span}). Checked {age} ago.", "zh": "自 {since} 起故障（{span}）。{age} 前检查。"},
    "state.unknown": {
        "en": "Unknown since {since} ({span}): the checks were inconclusive. Checked {age} ago.",
        "zh": "自 {since} 起状态未知（{span}）：检查程序无法判断。{age} 前检查。",
    },
    "target.api": {"en": "Model server", "zh": "模型服务"},
    "target.page": {"en": "Page", "zh": "页面"},
    "target.front": {"en": "nginx", "zh": "入口 nginx"},
    "target.replica": {"en": "Replica {number}", "zh": "副本 {number}"},
    "target.other": {"en": "Service", "zh": "服务"},
    "word.healthy": {"en": "healthy", "zh": "正常"},
    "word.busy": {"en": "busy", "zh": "繁忙"},
    "word.starting": {"en": "starting", "zh": "启动中"},
    "word.degraded": {"en": "degraded", "zh": "降级"},
    "word.broken": {"en": "broken", "zh": "出错"},
    "word.wedged": {"en": "wedged (no progress)", "zh": "卡死（无进展）"},
    "word.zombie": {"en": "zombie (accepts, never answers)", "zh": "僵死（只接收不响应）"},
    "word.hardware": {"en": "hardware fault", "zh": "硬件故障"},
    "word.dead": {"en": "dead", "zh": "已停止"},
    "word.corrupt": {"en": "corrupt (computes wrongly)", "zh": "计算错误"},
    "word.unknown": {"en": "unknown", "zh": "未知"},
    # Key figures.
    "figure.uptime_24h": {"en": "Up, 24 h", "zh": "可用率 24 小时"},
    "figure.uptime_7d": {"en": "Up, 7 days", "zh": "可用率 7 天"},
    "figure.uptime_30d": {"en": "Up, 30 days", "zh": "可用率 30 天"},
    "figure.seen": {"en": "{share} % of it seen", "zh": "所见时段 {share}%"},
    "figure.coverage": {
        "en": "Share of the conclusive checks. {share} % of this time ({span}) was checked at all.",
        "zh": "按能够判断的检查计算；此时间段内有 {share}%（{span}）被检查过。",
    },
    "figure.first_word": {"en": "First word, p95", "zh": "首字 p95"},
    "figure.first_word_help": {
        "en": "Of the checker's own picture questions in the last 24 h.",
        "zh": "最近 24 小时检查程序自身的图片提问。",
    },
    "figure.load": {"en": "Running / waiting", "zh": "运行 / 排队"},
    "figure.load_help": {"en": "Requests in the model server right now.", "zh": "模型服务当前的请求数。"},
    "figure.speed": {"en": "Answer speed", "zh": "生成速度"},
    "figure.speed_help": {
        "en": "For one user, after the first word; mean since the model server started.",
        "zh": "首字之后每个用户的生成速度；自模型服务启动以来的平均值。",
    },
    "figure.reused": {
        "en": "{share} % of the questions' tokens came from the cache.",
        "zh": "{share}% 的提问 token 来自缓存，无需重算。",
    },
    "figure.kv": {"en": "KV cache used", "zh": "KV 缓存占用"},
    "figure.gpu": {"en": "GPU memory", "zh": "显存"},
    "figure.gpu_of": {"en": "of {total} GiB, {name}", "zh": "共 {total} GiB，{name}"},
    "figure.no_gpu": {"en": "no GPU", "zh": "无显卡"},
    "figure.failed": {"en": "Failed checks, 1 h", "zh": "1 小时内失败检查"},
    # Replicas.
    "replicas.title": {"en": "Replicas", "zh": "副本"},
    "replicas.replica": {"en": "Replica", "zh": "副本"},
    "replicas.place": {"en": "Where", "zh": "位置"},
    "replicas.card": {"en": "card {card}, port {port}", "zh": "显卡 {card}，端口 {port}"},
    "replicas.port": {"en": "port {port}", "zh": "端口 {port}"},
    "replicas.state": {"en": "State", "zh": "状态"},
    "replicas.since": {"en": "Since", "zh": "开始于"},
    "replicas.restarts": {"en": "Restarts, 24 h", "zh": "24 小时内重启"},
    "replicas.why": {"en": "What the last check found", "zh": "最近一次检查的结果"},
    # Bars and trends.
    "bars.title": {"en": "Last 24 hours", "zh": "最近 24 小时"},
    "bars.alt": {
        "en": "{target}: trouble in {bad} of {count} quarter-hours, {none} without data",
        "zh": "{target}：{count} 个一刻钟中 {bad} 个有问题，{none} 个无数据",
    },
    "bars.legend": {
        "en": "Each bar covers 15 minutes and shows the worst state in it. Grey: no data. ! degraded, … starting, "
        "✕ down, ? unknown.",
        "zh": "每格 15 分钟，显示期间最差状态。灰色：无数据。! 降级，… 启动中，✕ 故障，? 未知。",
    },
    "bars.answered": {"en": "{word}, picture question answered in {seconds} s", "zh": "{word}，图片提问用时 {seconds} 秒"},
    "bars.none": {"en": "no data", "zh": "无数据"},
    "trend.title": {"en": "Trends", "zh": "趋势"},
    "trend.span": {"en": "Time", "zh": "时间范围"},
    "trend.none": {"en": "No readings in this time.", "zh": "此时间段内没有读数。"},
    "trend.limit": {"en": "limit {limit}", "zh": "阈值 {limit}"},
    "span.1h": {"en": "1 hour", "zh": "1 小时"},
    "span.24h": {"en": "24 hours", "zh": "24 小时"},
    "span.7d": {"en": "7 days", "zh": "7 天"},
    "trend.picture_s": {"en": "Answer to a picture question", "zh": "图片提问用时"},
    "trend.first_token_s": {"en": "First word of that answer", "zh": "首字用时"},
    "trend.pending": {"en": "Requests in the server", "zh": "服务中的请求"},
    "trend.gpu_load": {"en": "GPU load", "zh": "显卡负载"},
    "trend.gpu_memory_used": {"en": "GPU memory", "zh": "显存占用"},
    "trend.gpu_memory_used_percent": {"en": "GPU memory, share", "zh": "显存占用率"},
    "trend.cpu_percent": {"en": "Processor load", "zh": "处理器负载"},
    "trend.memory_used_percent": {"en": "Memory used", "zh": "内存占用"},
    "trend.page_s": {"en": "Response of the page", "zh": "页面响应用时"},
    # Incidents.
    "incident.title": {"en": "Incidents", "zh": "事件"},
    "incident.none": {"en": "None in the last 30 days.", "zh": "最近 30 天没有事件。"},
    "incident.line": {"en": "{at} · {target}: {word}, for {span}", "zh": "{at} · {target}：{word}，持续 {span}"},
    "incident.open_line": {
        "en": "{at} · {target}: {word}, open for {span}",
        "zh": "{at} · {target}：{word}，已持续 {span}（未关闭）",
    },
    "incident.watched_line": {
        "en": "{at} · {target}: {word}, for {span}; good again, still watched",
        "zh": "{at} · {target}：{word}，持续 {span}；已恢复，观察中",
    },
    "incident.facts": {
        "en": "Rule {rule} · restarts: {restarts} · incident {id}",
        "zh": "规则 {rule} · 重启 {restarts} 次 · 事件 {id}",
    },
    "incident.evidence": {"en": "Evidence that was saved", "zh": "已保存的证据"},
    "timeline.began": {"en": "began:", "zh": "开始："},
    "timeline.flip": {"en": "changed:", "zh": "变化："},
    "timeline.action": {"en": "acted:", "zh": "操作："},
    "timeline.alert_sent": {"en": "alert sent:", "zh": "告警已发送："},
    "timeline.alert_waits": {"en": "alert not delivered yet:", "zh": "告警尚未送达："},
    "timeline.recovered": {"en": "good again", "zh": "恢复正常"},
    "timeline.closed": {"en": "closed", "zh": "已关闭"},
    # Requests of operators.
    "request.title": {"en": "Operators' requests", "zh": "操作请求"},
    "request.no_checker": {
        "en": "The checker is not running: requests wait until it runs again.",
        "zh": "检查程序没有运行：请求将等到它恢复后执行。",
    },
    "request.at": {"en": "When", "zh": "时间"},
    "request.actor": {"en": "Who", "zh": "操作者"},
    "request.what": {"en": "What", "zh": "内容"},
    "request.state": {"en": "State", "zh": "状态"},
    "request.outcome": {"en": "Outcome", "zh": "结果"},
    "request.waiting": {"en": "waits for the checker", "zh": "等待检查程序"},
    "request.running": {"en": "under way", "zh": "执行中"},
    "request.done": {"en": "done", "zh": "已完成"},
    "request.refused": {"en": "refused", "zh": "已拒绝"},
    "request.failed": {"en": "failed", "zh": "失败"},
    # Actions.
    "act.title": {"en": "Actions", "zh": "操作"},
    "act.how": {
        "en": "The checker carries these out on its next run and writes them into its audit log.",
        "zh": "检查程序会在下次运行时执行，并写入审计日志。",
    },
    "act.locked": {"en": "For operators: enter the operator token.", "zh": "仅限管理员：请输入操作令牌。"},
    "act.token": {"en": "Operator token", "zh": "操作令牌"},
    "act.open": {"en": "Unlock", "zh": "解锁"},
    "act.leave": {"en": "Lock again", "zh": "重新锁定"},
    "act.wrong": {"en": "This operator token is not right.", "zh": "操作令牌不正确。"},
    "act.slowed": {
        "en": "Too many wrong operator tokens. This one was not compared; try again in {seconds} s.",
        "zh": "操作令牌错误次数过多。本次输入未经核对，请在 {seconds} 秒后重试。",
    },
    "act.probe": {"en": "Check now", "zh": "立即检查"},
    "act.probe_what": {
        "en": "On its next run the checker asks all its own questions, even where answers to users could replace them.",
        "zh": "检查程序下次运行时进行真实提问，不以用户回答代替。",
    },
    "act.restart_api": {"en": "Restart the model server", "zh": "重启模型服务"},
    "act.restart_api_what": {
        "en": "Saves evidence, lets running answers finish for a while, stops and starts the model server. "
        "**Answers that are still running then are lost, and nobody is served while the model loads.**",
        "zh": "保存证据，等待当前回答片刻，然后停止并重新启动模型服务。**未完成的回答会丢失，模型加载期间无法服务。**",
    },
    "act.restart_replica": {"en": "Restart replica {number}", "zh": "重启副本 {number}"},
    "act.restart_replica_what": {
        "en": "Answers that replica {number} is writing are cut off. The others go on; new questions are sent to them meanwhile.",
        "zh": "副本 {number} 正在生成的回答会中断，其他副本继续工作，期间的新提问由它们回答。",
    },
    "act.restart_front": {"en": "Restart nginx", "zh": "重启 nginx"},
    "act.restart_front_what": {
        "en": "All answers that are being written are cut off, and nobody reaches a replica until nginx runs again, after about a second.",
        "zh": "所有正在生成的回答会中断；nginx 恢复运行之前（约一秒）无法访问任何副本。",
    },
    "act.restart_page": {"en": "Restart the page", "zh": "重启页面"},
    "act.restart_page_what": {
        "en": "Stops and starts this page. **Answers that are still running are cut off;** chats are kept, and open tabs "
        "reconnect automatically.",
        "zh": "停止并重新启动本页面。**正在生成的回答会中断；**对话会保留，打开的标签页会自动重连。",
    },
    "act.drain": {"en": "Drain", "zh": "停止接收"},
    "act.drain_what": {
        "en": "Lets running answers finish and stops the model server. **It stays stopped until a restart is asked for.**",
        "zh": "等待当前回答结束后停止模型服务。**在请求重启之前保持停止。**",
    },
    "act.pause": {"en": "Pause the cure", "zh": "暂停自动修复"},
    "act.pause_what": {
        "en": "Checks and alerts go on, but nothing is restarted until the time is over.",
        "zh": "检查与告警照常，但到期前不会自动重启。",
    },
    "act.silence": {"en": "Silence alerts", "zh": "静默告警"},
    "act.silence_what": {
        "en": "Checks and cures go on, but no message is sent until the time is over.",
        "zh": "检查与修复照常，但到期前不发送消息。",
    },
    "act.maintenance": {"en": "Maintenance", "zh": "维护时段"},
    "act.maintenance_what": {
        "en": "From now until the time is over: no restarts and no messages. Checks go on.",
        "zh": "从现在起至到期：不重启、不发消息，检查照常。",
    },
    "act.resume": {"en": "Resume", "zh": "恢复"},
    "act.resume_what": {
        "en": "Ends pause, silence and maintenance.",
        "zh": "结束暂停、静默与维护时段。",
    },
    "act.reset": {"en": "Reset the circuit", "zh": "重置熔断"},
    "act.reset_what": {
        "en": "Lets the checker restart again after it gave up. Do it when the cause is gone.",
        "zh": "检查程序放弃后，允许其再次重启。请在原因消除后使用。",
    },
    "act.actor": {"en": "Your name, for the audit log", "zh": "您的姓名（写入审计日志）"},
    "act.hours": {"en": "For how many hours", "zh": "持续小时数"},
    "act.type": {"en": "Type {word} to confirm", "zh": "输入 {word} 以确认"},
    "act.confirm": {"en": "Ask the checker to do it", "zh": "提交请求"},
    "act.no_actor": {"en": "Say who you are: the audit log needs a name.", "zh": "请填写姓名：审计日志需要。"},
    "act.mistyped": {"en": "This does not match the word above: {word}", "zh": "与要求不符：{word}"},
    "act.asked": {
        "en": "Request {number} is recorded. The checker carries it out on its next run; its state is shown below.",
        "zh": "请求 {number} 已记录，检查程序将在下次运行时执行；状态见下方。",
    },
    "act.failed": {
        "en": "The request could not be recorded: {why}. Is the disk full?",
        "zh": "请求未能记录：{why}。磁盘是否已满？",
    },
    # Right size.
    "size.title": {"en": "Is the machine the right size?", "zh": "实例规格是否合适"},
    "size.too_early": {
        "en": "Too early to say: {hours} of the {enough} hours that are needed have been observed.",
        "zh": "尚早：已观察 {hours} 小时，至少需要 {enough} 小时。",
    },
    "size.no_gpu": {
        "en": "No GPU was seen. Memory peaked at {memory} % in the last week.",
        "zh": "未发现显卡。最近一周内存峰值 {memory}%。",
    },
    "size.memory_tight": {
        "en": "GPU memory peaked at {peak} of {total} GiB: little headroom. A longer context or more people may fail; "
        "take a larger card or fewer slots.",
        "zh": "显存峰值 {peak}/{total} GiB：余量很小。更长的上下文或更多用户可能失败；请换更大的显卡或减少并发。",
    },
    "size.memory_loose": {
        "en": "GPU memory peaked at {peak} of {total} GiB: a card with {smaller} GiB would do.",
        "zh": "显存峰值 {peak}/{total} GiB：{smaller} GiB 的显卡即可满足。",
    },
    "size.memory_fits": {
        "en": "GPU memory peaked at {peak} of {total} GiB: it fits.",
        "zh": "显存峰值 {peak}/{total} GiB：规格合适。",
    },
    "size.class": {
        "en": "The last week needed a card of {gib} GiB: {peak} tokens of KV cache at most ({tokens} with a fifth to spare) and {requests} "
        "requests at once in 95 % of the hours. By the memory plan such a card holds {kv} tokens and {slots} requests, with {weights} weights. "
        "Its speed is not part of this.",
        "zh": "最近一周所需的显卡规格为 {gib} GiB：KV 缓存最多 {peak} 个 token（留两成余量为 {tokens}），95% 的小时内并发不超过 {requests} 个请求。"
        "按显存规划，该规格可容纳 {kv} 个 token、{slots} 个并发，权重格式 {weights}。此处未考虑速度。",
    },
    "size.class_same": {
        "en": "With the {weights} weights that are in use now the smallest is {gib} GiB: {kv} tokens, {slots} requests.",
        "zh": "若保持当前的 {weights} 权重，最小规格为 {gib} GiB：{kv} 个 token、{slots} 个并发。",
    },
    "size.class_none": {
        "en": "No single card serves what the last week needed ({tokens} tokens of KV cache with a fifth to spare, {requests} requests at once), "
        "not even {largest} GiB: take a second machine.",
        "zh": "没有单卡规格能满足最近一周的需求（含余量 KV 缓存 {tokens} 个 token、{requests} 个并发），{largest} GiB 也不够：请增加一台机器。",
    },
    "size.idle": {
        "en": "The load was {load} % on average: mostly idle. A smaller machine, or stopping it in the quiet hours, saves money.",
        "zh": "平均负载 {load}%：大部分时间空闲。换小规格或在空闲时段关机可节省费用。",
    },
    "size.loaded": {
        "en": "The load was {load} % on average: there is little room for more people.",
        "zh": "平均负载 {load}%：可再容纳的用户不多。",
    },
    "size.load_fits": {"en": "The load was {load} % on average: room for more.", "zh": "平均负载 {load}%：仍有余量。"},
    "size.waiting": {
        "en": "People had to wait in {share} % of the hours: more slots, a faster card or a second machine would help.",
        "zh": "{share}% 的小时内出现排队：增加并发、换更快的显卡或增加一台机器会有帮助。",
    },
    "size.busiest": {"en": "The busiest hour of the day begins at {hour}.", "zh": "一天中最繁忙的时段从 {hour} 开始。"},
    "size.quiet": {
        "en": "The quiet hours are {first} to {last}: the time for restarts and updates.",
        "zh": "空闲时段为 {first} 至 {last}：适合重启与更新。",
    },
    # Logs and settings.
    "log.title": {"en": "Log", "zh": "日志"},
    "log.file": {"en": "File", "zh": "文件"},
    "log.level": {"en": "Level and above", "zh": "最低级别"},
    "log.search": {"en": "Contains (such as a request id)", "zh": "包含（如请求编号）"},
    "log.again": {"en": "Reload", "zh": "刷新"},
    "log.missing": {"en": "There is no {name} yet.", "zh": "尚无 {name}。"},
    "log.empty": {"en": "No line matches.", "zh": "没有匹配的行。"},
    "log.save": {"en": "Save", "zh": "保存"},
    "set.title": {"en": "Settings in force", "zh": "当前设置"},
    "set.chosen": {"en": "What the model server chose automatically, and why", "zh": "模型服务的自动选择及原因"},
    "set.given": {"en": "Every setting; those marked were changed from the default", "zh": "全部设置；有标记的为已修改项"},
    "set.value": {"en": "Value", "zh": "值"},
    "set.why": {"en": "Why", "zh": "原因"},
    "set.plan": {"en": "Memory as planned: {card}", "zh": "显存规划：{card}"},
    "set.changed": {"en": "changed", "zh": "已修改"},
    "unit.day": {"en": "{count} d", "zh": "{count} 天"},
    "unit.hour": {"en": "{count} h", "zh": "{count} 小时"},
    "unit.minute": {"en": "{count} min", "zh": "{count} 分"},
    "unit.second": {"en": "{count} s", "zh": "{count} 秒"},
}
