"""The image, built from the Dockerfile by buildah on a Debian that debootstrap makes, and containers of it.

Neither Docker nor a registry of images is needed. What is built is kept in ~/.cache, so that a second run builds only what
has changed. The packages come from where this machine's pip and apt get theirs.
"""

from __future__ import annotations

import ast
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[2]
KEPT = Path.home() / ".cache" / "glm-web-tests"
USER = 10001
BUILD_LIMIT_S = 1500.0


def buildah(*arguments: str, limit_s: float = 300.0) -> str:
    """Its output. `chroot` needs neither namespaces of its own nor a daemon."""
    command = [*buildah_command(), *arguments]
    done = subprocess.run(command, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=limit_s)
    assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def buildah_command() -> list[str]:
    return ["buildah", "--root", str(KEPT / "images"), "--runroot", str(KEPT / "run")]


def environment() -> dict[str, str]:
    return {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "HOME": str(Path.home()), "BUILDAH_ISOLATION": "chroot", "LC_ALL": "C.UTF-8"}


def base(scratch: Path) -> str:
    """An image of Debian, of the same release as this machine, so that wheels on its disk fit."""
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]
    name = f"localhost/base-{release}"
    if name not in buildah("images", "--format", "{{.Name}}"):
        folder, archive = scratch / "base", scratch / "base.tar"
        made = subprocess.run(["debootstrap", "--variant=minbase", release, str(folder)], env=environment(), capture_output=True, text=True,
                              timeout=BUILD_LIMIT_S)  # fmt: skip
        assert made.returncode == 0, made.stdout[-3000:] + made.stderr
        subprocess.run(["tar", "-C", str(folder), "-cf", str(archive), "."], check=True, timeout=300)
        (scratch / "Dockerfile").write_text(f"FROM scratch\nADD {archive.name} /\n")
        buildah("build", "--tag", name, str(scratch), limit_s=BUILD_LIMIT_S)
    return name


def build(name: str, scratch: Path) -> None:
    """Builds the CPU variant of this checkout under this name."""
    arguments = ["--build-arg", f"BASE={base(scratch)}", "--build-arg", "VARIANT=cpu"]
    buildah("build", "--format", "docker", "--layers", *mounts_for_pip(scratch), *arguments, "--tag", name, str(ROOT), limit_s=BUILD_LIMIT_S)
    buildah("rmi", "--prune")


def mounts_for_pip(scratch: Path) -> list[str]:
    """Gives pip in the build the configuration of pip here, with the files and folders that it names."""
    shown = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True, timeout=60).stdout
    options: dict[str, str] = {}
    mounts: dict[str, str] = {}
    for line in shown.splitlines():
        name, _, value = line.partition("=")
        options[name.rpartition(".")[2]] = ast.literal_eval(value)
    for name, value in options.items():
        for word in value.split():
            address = urlsplit(word)
            if address.scheme == "file":
                mounts[str(Path(address.path).parent)] = str(Path(address.path).parent)  # an index refers to files beside it
            elif word.startswith("/") and Path(word).is_dir():
                mounts[word] = word
            elif word.startswith("/") and Path(word).is_file():
                mounts[word] = f"/run/pip/{name}"  # not in the place of a file that a package brings
                options[name] = options[name].replace(word, mounts[word])
    config = scratch / "pip.conf"
    config.write_text("[global]\n" + "".join(f"{name} = {' '.join(value.split())}\n" for name, value in options.items()))
    mounts[str(config)] = "/etc/pip.conf"
    return [part for source, target in mounts.items() for part in ("--volume", f"{source}:{target}:ro")]


class Volumes:
    """Three folders that belong to the container's user, as named volumes do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("logs", "keys", "weights"):
            (folder / name).mkdir(parents=True)
            os.chown(folder / name, USER, USER)

    def arguments(self) -> list[str]:
        return [part for name in ("logs", "keys", "weights") for part in ("--volume", f"{self.folder / name}:/app/{name}")]

    def pid(self, part: str) -> int:
        return int(json.loads((self.folder / "logs" / f"{part}.pid.json").read_text())["pid"])


class Container:
    """`variables`: as for `docker run --env`."""

    def __init__(self, image: str, volumes: Volumes, **variables: str) -> None:
        self.volumes, self.variables = volumes, variables
        self.name = buildah("from", image).strip()
        self.config = json.loads(buildah("inspect", "--type", "image", image))["Docker"]["config"]
        self.url = f"http://127.0.0.1:{variables['GLM_API_PORT']}"
        self.log = volumes.folder / f"{self.name}.log"
        self.marker = volumes.folder / f"{self.name}.begins"
        self.marker.touch()
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                self._command(*self.config["Entrypoint"], *self.config["Cmd"]), env=environment(), stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )

    def _command(self, *inside: str) -> list[str]:
        variables = [part for name, value in self.variables.items() for part in ("--env", f"{name}={value}")]
        return [*buildah_command(), "run", *variables, *self.volumes.arguments(), self.name, "--", *inside]

    def execute(self, *inside: str) -> subprocess.CompletedProcess[str]:
        """As `docker exec` does."""
        return subprocess.run(self._command(*inside), env=environment(), capture_output=True, text=True, timeout=120)

    def health(self) -> str:
        """What Docker would show: `healthy` or why not, by the image's own HEALTHCHECK."""
        kind, *command = self.config["Healthcheck"]["Test"]
        assert kind == "CMD"
        done = self.execute(*command)
        return "healthy" if done.returncode == 0 else done.stdout + done.stderr

    def state(self) -> str:
        try:
            return str(httpx.get(f"{self.url}/health", timeout=5).json()["state"])
        except httpx.TransportError:
            return "down"

    def until(self, condition: Callable[[], bool], limit_s: float = 300.0) -> None:
        """Fails at once if the container ends."""
        deadline = time.monotonic() + limit_s
        while not condition():
            assert self.process.poll() is None, f"the container has ended\n{self.shown()}"
            assert time.monotonic() < deadline, self.shown()
            time.sleep(0.2)

    def shown(self) -> str:
        return self.log.read_text()[-6000:]

    def processes(self) -> list[psutil.Process]:
        """Those of the image's user that have this container's port in their environment."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.uids().real == USER and process.environ().get("GLM_API_PORT") == self.variables["GLM_API_PORT"]:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def stop(self) -> int:
        """As `docker stop` does: SIGTERM to the first process. Returns the exit code."""
        first = next(process for process in psutil.Process(self.process.pid).children(recursive=True) if process.name() == "tini")
        first.terminate()
        return self.process.wait(timeout=60)

    def written(self) -> list[str]:
        """Files that were written outside of the volumes and /tmp, which a read-only root would forbid."""
        root = buildah("mount", self.name).strip()
        made = f"{root}/etc/hosts {root}/etc/resolv.conf {root}/etc/hostname".split()  # by buildah, at each start
        places = [f"{root}/{place}" for place in ("tmp", "proc", "sys", "dev", "run", "app/logs", "app/keys", "app/weights")]
        pruned = [part for place in places for part in ("-path", place, "-prune", "-o")]
        newer = ["-newer", str(self.marker), "!", "-type", "d", "-print"]
        found = subprocess.run(["find", root, *pruned, *newer], capture_output=True, text=True, check=True, timeout=120).stdout.splitlines()
        buildah("umount", self.name)
        return sorted(set(found) - set(made))

    def remove(self) -> None:
        if self.process.poll() is None:
            for process in self.processes():
                process.kill()
            self.process.kill()
            self.process.wait()
        buildah("rm", self.name)
