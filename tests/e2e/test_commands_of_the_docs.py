"""The shell commands of README.md and docs/ are run as they are printed, on a started copy, or are named here with a reason.

A command of a fenced block that is in neither table fails the first test.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ports import free_port

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LIMIT_S = 600
SHELLS = ("bash", "sh", "shell", "console")
MEASURES = "measures for minutes, and needs a machine of its own; tests/bench runs it small"
CARD = "needs a GPU"
RESTORED = "tests/e2e/test_restore.py backs up and restores a running service"
RAY = "installs Ray and needs the ports of the whole machine; tests/deploy/test_ray_serve.py runs a cluster"

# Those that can run anywhere, and their exit codes.
RUN: dict[str, tuple[int, ...]] = {
    "./start.sh": (0,),
    "export OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_API_KEY=$(sed -n 's/^GLM_API_KEY=//p' .env)": (0,),
    "python health_check.py": (0,),
    "python health_check.py status": (0,),
    "python health_check.py backup": (0,),
    ".venv/bin/python health_check.py install --show --servers": (0,),
    "./start.sh --restart": (0,),
    "python health_check.py report": (0, 1),  # 1: there was no incident
    "python health_check.py doctor": (0, 1),  # 1: no schedule is installed here
    "for i in $(seq 25); do /usr/bin/time -f '%e s %M KiB' .venv/bin/python health_check.py run --quiet; done": (0,),
    "python -m bench.fleet_sums": (0,),
    "python -m api.server --plan": (0,),
    "python -m api.server --plan --gpu-memory 12GiB": (0,),
    'python -m api.server --plan --gpu-memory 24GiB --gpu "RTX 4090"': (0,),
    "python -m api.server --plan --gpu-memory 24GiB --weights nf4": (0,),
    'echo "GLM_METRICS_KEY=$(head -c 24 /dev/urandom | base64)" >> .env && ./start.sh --restart api': (0,),
    "printf 'GLM_METRICS_KEY=%s\\nGRAFANA_PASSWORD=%s\\n' \"$(openssl rand -hex 24)\" \"$(openssl rand -hex 12)\" >> .env": (0,),
}
SHORTENED = {"seq 25": "seq 1"}

CANNOT_RUN = {
    "./test.sh": "runs this test",
    "python health_check.py install": "writes the schedule of this machine's user; tests/monitor/test_schedule.py runs it on stand-ins",
    "python -m pip install -r bench/requirements.txt": "needs the network, and would change the environment of the tests",
    "python -m bench.serve --plot docs/performance.png": MEASURES,
    "python -m bench.steps": MEASURES,
    "python -m bench.edge --step-ms 5 --queued": MEASURES,
    "python -m bench.latency pictures": MEASURES,
    "python -m bench.latency probe": MEASURES,
    "python -m bench.memory": MEASURES,
    "python -m bench.page_memory": MEASURES,
    "python -m bench.pictures turns": MEASURES,
    "python -m bench.pictures memory": MEASURES,
    "python -m bench.serve --without a --together --rounds 3 --url vllm=http://127.0.0.1:8101 --url llama.cpp=http://127.0.0.1:8102": MEASURES,
    "python -m bench.serve --without a --without b --workloads A B --parallel 1 16 --url ray=http://127.0.0.1:8000 --url-key KEY --url-model glm-shapes-demo": MEASURES,
    "python -m bench.replicas": MEASURES,
    "./start.sh --gpus 0,1,2,3": CARD,
    "./start.sh --replicas 2": "another set than the one that runs is refused; tests/e2e/test_several_replicas.py starts it",
    "python -m bench.gpu": CARD,
    "python -m bench.graphs_gpu": CARD,
    "./stop.sh": "ends the copy that the other commands ask; it is run at the end",
    "git pull": "there is nothing to pull from",
    "python health_check.py backup --to /mnt/nas/glm --keep 14": f"names another disk; {RESTORED}",
    "python health_check.py restore FILE --check": f"FILE is a file of the reader's; {RESTORED}",
    "python health_check.py restore FILE --replace": f"FILE is a file of the reader's; {RESTORED}",
    "python health_check.py restore FILE --into /srv/new": f"FILE is a file of the reader's; {RESTORED}",
    "deploy/ray/run.sh ray start --head": RAY,
    "deploy/ray/run.sh ray start --address=FIRST:6379": RAY,
    "deploy/ray/run.sh serve deploy deploy/ray/serve.yaml": RAY,
    "deploy/ray/run.sh serve status": RAY,
    "deploy/ray/run.sh ray stop": RAY,
    "python -m deploy.proxy --certificate /etc/ssl/fullchain.pem --certificate-key /etc/ssl/key.pem --output /etc/nginx/conf.d/glm.conf":
        "writes to /etc/nginx and needs a certificate",
}  # fmt: skip

# Programs that no test may run on this machine, whatever their arguments.
PROGRAMS = {
    "docker": "needs a Docker engine",
    "conda": "needs the network",
    "apt-get": "needs root and the network",
    "systemctl": "needs a machine that boots with systemd",
    "install": "writes to /etc",
    "nginx": "is nginx of the whole machine",
    "VLLM_CPU_NUM_OF_RESERVED_CPU=0": "needs vLLM",
    "llama-server": "needs llama.cpp",
    "sudo": "needs root",
    "vllm-router": "needs the vLLM router; tests/deploy/test_model_router.py runs it where it is",
    "kubectl": "needs a cluster",
}
WRITES_ELSEWHERE = re.compile(r">\s*/etc/")
# In a block without a language: what begins like a command of a shell.
BEGINS = re.compile(rf"^(\./|\.venv/|\(|(python3?|pip|curl|git|bash|export|printf|echo|for|cp|kill|crontab|{'|'.join(PROGRAMS)})\s)")


def commands(page: str) -> list[str]:
    """The commands in a page's fenced blocks, without comments, each on one line."""
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        if language and language not in SHELLS:
            continue
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            command = " ".join(re.sub(r"(^|\s+)#\s.*$", "", line).split())
            if command and (language or BEGINS.match(command)):
                found.append(command)
    return found


def reason(command: str) -> str | None:
    """Why it cannot run here."""
    if WRITES_ELSEWHERE.search(command):
        return "writes to /etc"
    return CANNOT_RUN.get(command) or PROGRAMS.get(command.split()[0])


def unknown(page: str) -> list[str]:
    return [command for command in commands(page) if command not in RUN and reason(command) is None]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_run_or_has_a_reason(page: Path) -> None:
    assert unknown(page.read_text(encoding="utf-8")) == [], "run it below, or say in CANNOT_RUN why it cannot run here"


def test_a_new_command_is_noticed() -> None:
    assert unknown("```bash\n./new.sh \\\n  --all   # does it\n```\n```\n./other.sh\nwords\n```\n```json\n{}\n```\n") == ["./new.sh --all", "./other.sh"]
    assert unknown("```bash\ndocker run x\n./start.sh    # all of it\n```\n") == []


class Copy:
    """The project's files in a folder of their own, with other ports, and a shell in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "project"
        listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
        for name in listed.stdout.splitlines():
            if (ROOT / name).is_file() and not name.startswith("tests/"):
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.folder / name)
        (self.folder / ".venv").symlink_to(sys.prefix)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("GLM_", "CONDA", "PYTHON"))}
        self.env = {
            **kept, "CONDA_PREFIX": sys.prefix, "CONDA_DEFAULT_ENV": "tests", "PIP_NO_INDEX": "1",  # nothing is installed
            "PATH": f"{self.folder / '.venv/bin'}:{kept['PATH']}", "PYTHONDONTWRITEBYTECODE": "1",
            "GLM_API_PORT": str(free_port()), "GLM_WEB_PORT": str(free_port()), "GLM_API_HOST": "127.0.0.1", "GLM_WEB_HOST": "127.0.0.1",
            # A machine that runs other tests at the same time is slow.
            "GLM_START_TIMEOUT_S": "400", "GLM_CHECK_BUDGET_S": "400", "GLM_PROBE_TIMEOUT_S": "100",
        }  # fmt: skip

    def run(self, command: str) -> tuple[int, str]:
        """(exit code, output). Into a file, not a pipe, which a server could keep open."""
        for printed, short in SHORTENED.items():
            command = command.replace(printed, short)
        number = len(list(self.folder.parent.glob("*.out")))
        with (self.folder.parent / f"{number}-{abs(hash(command))}.out").open("w+") as out:
            done = subprocess.run(
                ["bash", "-ec", command], cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=LIMIT_S,
            )  # fmt: skip
            out.seek(0)
            return done.returncode, out.read()


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copy]:
    copy = Copy(tmp_path_factory.mktemp("docs"))
    code, output = copy.run("./start.sh")
    try:
        assert code == 0, output
        yield copy
    finally:
        copy.run("./stop.sh")


def test_the_commands_do_what_their_exit_code_says(started: Copy) -> None:
    printed = [command for page in PAGES for command in commands(page.read_text(encoding="utf-8"))]
    to_run = [command for command in dict.fromkeys(printed) if command in RUN]
    assert len(to_run) >= 10
    apart = [command for command in to_run if "--plan" in command]  # they touch nothing that the others use

    with ThreadPoolExecutor(2) as pool:
        planned = {command: pool.submit(started.run, command) for command in apart}
        results = {command: started.run(command) for command in to_run if command not in apart}
        results |= {command: result.result() for command, result in planned.items()}

    wrong = [f"{command}: exit code {code}\n{out}" for command, (code, out) in results.items() if code not in RUN[command] or "Traceback" in out]
    assert not wrong, "\n\n".join(wrong)
    assert all(out.strip() for command, (_, out) in results.items() if "health_check" in command and "--quiet" not in command)
