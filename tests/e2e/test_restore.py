"""A backup of the running service, and another service that comes up from it in an empty folder on other ports."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, expect, sync_playwright
from ports import free_port

from monitor.store.store import Store
from web.history.chat_store import ChatStore
from web.history.conversation import Conversation

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 150.0
expect.set_options(timeout=WAIT_S * 1000)
KEY, TOKEN = "sk-of-before-the-move", "page-token-of-before-the-move"


class Service:
    """The API and the page as processes, with a folder of their own."""

    def __init__(self, folder: Path, env_file: Path) -> None:
        self.logs = folder / "logs"
        self.ports = {"api": free_port(), "web": free_port()}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("GLM_")}
        self.env = {
            **kept, "GLM_ENV_FILE": str(env_file), "GLM_LOG_DIR": str(self.logs), "GLM_API_PORT": str(self.ports["api"]),
            "GLM_WEB_PORT": str(self.ports["web"]), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self.logs.mkdir(parents=True, exist_ok=True)
        self.processes: list[subprocess.Popen] = []

    def start(self) -> None:
        for part in self.ports:
            with (self.logs / f"{part}.log").open("w") as log:
                self.processes.append(subprocess.Popen([sys.executable, "-m", f"{part}.server"], cwd=ROOT, env=self.env, stdout=log, stderr=log))
        deadline = time.monotonic() + WAIT_S
        while not all(self._answers(path) for path in (f":{self.ports['api']}/ping", f":{self.ports['web']}/_stcore/health")):
            assert time.monotonic() < deadline, (self.logs / "api.log").read_text() + (self.logs / "web.log").read_text()
            time.sleep(0.2)

    def _answers(self, path: str) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1{path}", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def check(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "health_check.py", *words], cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=WAIT_S)

    def ask(self, key: str) -> int:
        body = {"messages": [{"role": "user", "content": "What can you do?"}], "max_tokens": 8}
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.post(f"http://127.0.0.1:{self.ports['api']}/v1/chat/completions", json=body, headers=headers, timeout=WAIT_S).status_code

    def runs(self) -> list[int]:
        with closing(Store.read_only(self.logs)) as store:
            return [row["id"] for row in store.runs(0)]

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(30)


@pytest.fixture
def before(tmp_path: Path) -> Iterator[Service]:
    env = tmp_path / "before.env"
    env.write_text(f"GLM_MODEL=models/shapes\nGLM_API_KEY={KEY}\nGLM_WEB_TOKEN={TOKEN}\nGLM_API_HOST=127.0.0.1\nGLM_WEB_HOST=127.0.0.1\nGLM_CURE=off\n")
    service = Service(tmp_path / "before", env)
    with ExitStack() as stack:
        stack.callback(service.stop)
        service.start()
        yield service


def test_another_service_comes_up_from_a_backup_of_the_running_one(before: Service, tmp_path: Path) -> None:
    """A person's chat, a program's key and the checker's history, saved while all three go on."""
    with sync_playwright() as driver, driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"]) as browser:
        page = browser.new_context(locale="en-US").new_page()
        page.set_default_timeout(WAIT_S * 1000)
        page.goto(f"http://127.0.0.1:{before.ports['web']}/?token={TOKEN}")
        _ask(page, "What can you do on this machine?")
        checked = before.check("run", "--no-act", "--quiet")
        runs = before.runs()
        assert runs, checked.stdout + checked.stderr

        saved = _saved_in_use(before, tmp_path / "backups")
        assert saved.returncode == 0, saved.stderr
        (archive,) = (tmp_path / "backups").glob("*.zip")
        before.stop()
        restored = before.check("restore", str(archive), "--into", str(tmp_path / "after"))
        assert restored.returncode == 0, restored.stderr
        env_file, logs = re.search(r"GLM_ENV_FILE=(\S+) GLM_LOG_DIR=(\S+) ./start.sh", restored.stdout).groups()
        assert (env_file, logs) == (str(tmp_path / "after" / ".env"), str(tmp_path / "after" / "logs"))

        after = Service(tmp_path / "after", Path(env_file))
        try:
            after.start()
            assert (after.ask(KEY), after.ask("sk-another")) == (200, 401)
            page.goto(f"http://127.0.0.1:{after.ports['web']}/")  # by the cookie of before
            expect(page.get_by_role("button", name="What can you do on this machine?")).to_be_visible()
            page.get_by_role("button", name="What can you do on this machine?").click()
            expect(page.get_by_test_id("stChatMessage").last).to_contain_text("complete")
        finally:
            after.stop()
    assert runs == after.runs()


def _ask(page: Page, question: str) -> None:
    box = page.get_by_test_id("stChatInputTextArea")
    expect(box).to_be_enabled(timeout=WAIT_S * 1000)
    expect(page.get_by_test_id("stApp")).to_have_attribute("data-test-script-state", "notRunning")
    box.fill(question)
    page.get_by_test_id("stChatInputSubmitButton").click()
    expect(page.get_by_test_id("stChatMessage").last).to_contain_text("complete", timeout=WAIT_S * 1000)


def _saved_in_use(service: Service, folder: Path) -> subprocess.CompletedProcess[str]:
    """A backup, made while a program asks and the page's store is written."""
    stop, chats = threading.Event(), ChatStore(service.logs / "chats.db", 90)

    def use() -> None:
        while not stop.is_set():
            service.ask(KEY)
            conversation = Conversation()
            conversation.ask("meanwhile", [])
            chats.save("somebody-else-01234567", conversation)

    user = threading.Thread(target=use)
    user.start()
    try:
        return service.check("backup", "--to", str(folder))
    finally:
        stop.set()
        user.join()
