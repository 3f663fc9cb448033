"""Downloads from a hub on this machine, which stalls, cuts, lies and refuses."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_stand_in import COMMIT, SCOPE_COMMIT, Fault, HubStandIn

from api.engine.config import EngineConfig
from api.engine.loaded_model import LoadError
from api.engine.loading import download as downloads
from api.engine.loading import hub as hubs
from api.engine.loading import loader, transfer
from api.engine.loading.download import download
from api.engine.loading.hub_cache import HubCache
from api.engine.loading.progress import DownloadMeter
from api.engine.stats import Download

ROOT = Path(__file__).resolve().parents[4]
HUBS = ("huggingface", "modelscope")


def safetensors(size: int) -> bytes:
    """A well-formed file of this many bytes of weights, no two of which are alike in a row."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + b"".join(struct.pack("<I", n) for n in range(size // 4))


WEIGHTS = safetensors(3_000_000)
FILES = {
    "config.json": b'{"model_type": "glm4v"}',
    "tokenizer.json": b"{}" * 500,
    "tokenizer_config.json": b"{}",
    "preprocessor_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": WEIGHTS,
    "README.md": b"# not needed",
    "modeling_evil.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    ".hidden.json": b"{}",
    "onnx/model.safetensors": b"other weights",
    "../outside.json": b"{}",
}
WANTED = {
    name for name in FILES if name.endswith((".json", ".jinja", ".safetensors")) and "/" not in name and name[0] != "."
}
TOTAL = sum(map(len, {FILES[name] for name in WANTED}))  # two of them have the same content


class Reports:
    """What the engine would be told."""

    def __init__(self) -> None:
        self.fractions: list[float] = []
        self.read: Callable[[], Download] | None = None
        self.downloads: list[Download] = []

    def __call__(self, fraction: float, read: Callable[[], Download] | None = None) -> None:
        self.fractions.append(fraction)
        self.read = read
        if read is not None:
            self.downloads.append(read())

    @property
    def last(self) -> Download:
        assert self.read is not None
        return self.read()


@pytest.fixture
def reports() -> Reports:
    return Reports()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """Both hubs at once, with empty caches."""
    stand_in = HubStandIn(dict(FILES))
    for name in (
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "HF_TOKEN",
        "MODELSCOPE_API_TOKEN",
        "MODELSCOPE_DOMAIN",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    monkeypatch.setenv("HF_ENDPOINT", stand_in.url)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", stand_in.url)
    monkeypatch.setattr(transfer, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(downloads, "ROUND_WAIT_S", 0.05)
    yield stand_in
    stand_in.close()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def expected() -> dict[str, bytes]:
    return {name: FILES[name] for name in WANTED}


@pytest.mark.parametrize("name", HUBS)
def test_a_download_reports_its_bytes_and_takes_only_what_a_model_needs(
    hub: HubStandIn, reports: Reports, name: str
) -> None:
    hub.rate = 4e6

    folder = download("owner/name", name, reports)

    assert content(folder) == expected()
    assert folder.name == {"huggingface": COMMIT, "modelscope": SCOPE_COMMIT}[name]
    assert folder.parent.name == "snapshots"
    assert not any("README" in path or ".py" in path or ".bin" in path or "onnx" in path for _, path, _ in hub.asked)
    middle = [d for d in reports.downloads if TOTAL / 4 < d.downloaded_bytes < TOTAL / 2]
    assert len(middle) >= 3
    for seen in middle:
        assert seen.total_bytes == TOTAL and seen.file == "model.safetensors"
        assert seen.hub.startswith(
            {"huggingface": "Hugging Face (127.0.0.1:", "modelscope": "ModelScope (127.0.0.1:"}[name]
        )
        assert 1e6 < seen.bytes_per_s < 8e6
        assert seen.remaining_s == pytest.approx((TOTAL - seen.downloaded_bytes) / seen.bytes_per_s, abs=0.06)
    assert reports.last.downloaded_bytes == TOTAL and reports.fractions[-1] == 1.0
    assert sorted(reports.fractions) == reports.fractions


@pytest.mark.parametrize("name", HUBS)
def test_a_whole_copy_needs_no_network(hub: HubStandIn, reports: Reports, name: str) -> None:
    folder = download("owner/name", name, reports)
    hub.close()

    assert download("owner/name", name, reports) == folder
    assert download(f"owner/name@{folder.name}", name, reports) == folder


@pytest.mark.parametrize("name", HUBS)
@pytest.mark.parametrize("kind", ["cut", "stall"])
def test_what_was_cut_goes_on_where_it_was(
    hub: HubStandIn, reports: Reports, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hubs, "SILENCE_S", 0.3)
    hub.faults = [Fault(kind, after=1_000_000), Fault(kind, after=500_000)]

    assert content(download("owner/name", name, reports)) == expected()

    ranges = [headers.get("Range") for headers in hub.requests_of("model.safetensors")]
    assert ranges == [None, "bytes=1000000-", "bytes=1500000-"]
    assert hub.sent == TOTAL, "no byte came twice"


def test_a_connection_without_a_byte_is_given_up_after_a_minute() -> None:
    assert hubs.SILENCE_S == 60.0


def test_a_cut_is_told_while_it_lasts(hub: HubStandIn, reports: Reports, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "FIRST_WAIT_S", 1.0)
    hub.faults = [Fault("cut", after=1_000_000)]
    thread = threading.Thread(target=download, args=("owner/name", "huggingface", reports))
    thread.start()
    deadline = time.monotonic() + 10
    while not (reports.read and reports.last.trouble):
        assert time.monotonic() < deadline
        time.sleep(0.01)

    trouble = reports.last.trouble
    thread.join()

    assert "Hugging Face" in trouble and "model.safetensors" in trouble and "next attempt in 1 s" in trouble
    assert reports.last.trouble == ""


def test_a_hub_that_ignores_the_range_is_read_from_the_start(hub: HubStandIn, reports: Reports) -> None:
    hub.faults = [Fault("cut", after=1_000_000), Fault("whole")]

    assert content(download("owner/name", "huggingface", reports)) == expected()
    assert reports.last.downloaded_bytes == TOTAL


@pytest.mark.parametrize("name", HUBS)
def test_a_flipped_bit_is_found_and_the_file_fetched_again(hub: HubStandIn, reports: Reports, name: str) -> None:
    hub.faults = [Fault("flip", after=1234)]

    assert content(download("owner/name", name, reports)) == expected()
    assert len(hub.requests_of("model.safetensors")) == 2


def test_a_flipped_bit_of_a_small_file_is_found_by_the_checksum_of_git(hub: HubStandIn, reports: Reports) -> None:
    hub.faults = [Fault("flip", after=3, name="config.json", times=9)]

    with pytest.raises(LoadError, match=r"config.json with the git checksum \w+ and announces \w+"):
        download("owner/name", "huggingface", reports)


@pytest.mark.parametrize("name", HUBS)
def test_a_hub_that_keeps_sending_something_else_is_refused(hub: HubStandIn, reports: Reports, name: str) -> None:
    hub.faults = [Fault("flip", after=1234, times=99)]

    with pytest.raises(LoadError, match=r"model.safetensors with the sha256 checksum"):
        download("owner/name", name, reports)

    assert len(hub.requests_of("model.safetensors")) == 2
    assert not list(hubs.HUBS[name]().folder("owner/name").glob("snapshots/*/*"))


@pytest.mark.parametrize("listed", [len(WEIGHTS) + 5, len(WEIGHTS) - 5])
def test_a_list_that_lies_about_a_size_is_refused(hub: HubStandIn, reports: Reports, listed: int) -> None:
    hub.listed["model.safetensors"] = {"size": listed}

    with pytest.raises(LoadError, match=f"announces {listed} bytes of model.safetensors and sends {len(WEIGHTS)}"):
        download("owner/name", "huggingface", reports)


def test_a_shorter_file_than_announced_is_refused(hub: HubStandIn, reports: Reports) -> None:
    hub.faults = [Fault("short", times=99)]

    with pytest.raises(
        LoadError, match=f"announces {len(WEIGHTS)} bytes of model.safetensors and sends {len(WEIGHTS) - 1}"
    ):
        download("owner/name", "huggingface", reports)


@pytest.mark.parametrize(("name", "setting"), [("huggingface", "HF_TOKEN"), ("modelscope", "MODELSCOPE_API_TOKEN")])
def test_a_closed_model_needs_a_token_which_no_other_host_gets(
    hub: HubStandIn, reports: Reports, name: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "hub-token"
    with pytest.raises(LoadError, match=f"refuses owner/name with status 401: .*set {setting}"):
        download("owner/name", name, reports)

    monkeypatch.setenv(setting, "hub-token")
    assert content(download("owner/name", name, reports)) == expected()

    hosts = {headers["Host"].partition(":")[0]: headers.get("Authorization") for _, _, headers in hub.asked}
    assert hosts == {"127.0.0.1": "Bearer hub-token", "localhost": None}


def test_an_unknown_model_is_named_and_not_looked_for_elsewhere(hub: HubStandIn, reports: Reports) -> None:
    hub.files.clear()
    with pytest.raises(
        LoadError, match=r"Hugging Face \(127.0.0.1:\d+\) refuses zai-org/Nothing with status 404: .*revision"
    ):
        download("zai-org/Nothing@v9", "huggingface", reports)
    with pytest.raises(LoadError, match=r"no \*.safetensors in zai-org/Nothing"):
        download("zai-org/Nothing", "huggingface", reports)

    assert not any("modelscope" in path or "/v1/" in path for _, path, _ in hub.asked)


@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_is_busy_is_asked_again_when_it_says(hub: HubStandIn, reports: Reports, status: int) -> None:
    hub.faults = [Fault("status", status=status, headers={"Retry-After": "1"})]
    began = time.monotonic()

    assert content(download("owner/name", "huggingface", reports)) == expected()
    assert 1.0 <= time.monotonic() - began < 5.0


def test_the_publishers_other_hub_goes_on_where_the_first_was_cut_off(
    hub: HubStandIn, reports: Reports, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = HubStandIn(dict(FILES))
    monkeypatch.setenv("HF_ENDPOINT", first.url)
    first.faults = [Fault("cut", after=2_000_000), Fault("status", status=503, times=99)]

    with caplog.at_level(logging.INFO, "api.engine.loading.download"):
        folder = download("zai-org/GLM-4.6V-Flash", "huggingface", reports)
    first.close()

    assert content(folder) == expected()
    assert folder.parent.parent == hubs.ModelScope().folder("ZhipuAI/GLM-4.6V-Flash")
    assert [headers.get("Range") for headers in hub.requests_of("model.safetensors")] == ["bytes=2000000-"]
    said = reports.last.trouble
    assert "Hugging Face" in said and "503" in said and "trying ModelScope" in said
    assert "event=download_elsewhere hub=modelscope model=ZhipuAI/GLM-4.6V-Flash" in caplog.text


@pytest.mark.parametrize(
    ("name", "model", "other"),
    [("huggingface", "zai-org/GLM-4.6V-Flash", "ModelScope"), ("modelscope", "ZhipuAI/GLM-4.6V-Flash", "Hugging Face")],
)
def test_the_other_hub_is_tried_when_one_cannot_be_reached(
    hub: HubStandIn, reports: Reports, name: str, model: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv({"huggingface": "HF_ENDPOINT", "modelscope": "MODELSCOPE_ENDPOINT"}[name], "http://127.0.0.1:9")

    assert content(download(model, name, reports)) == expected()

    assert reports.last.hub.startswith(other)
    assert all(d.downloaded_bytes == 0 or d.hub.startswith(other) for d in reports.downloads)
    hub.close()
    assert content(download(model, name, reports)) == expected(), (
        "the copy is found although it came from the other hub"
    )


def test_the_model_of_someone_else_is_not_taken_from_another_hub(
    hub: HubStandIn, reports: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")

    for model in ("someone/model", "zai-org/GLM-4.6V-Flash@v1"):
        with pytest.raises(
            LoadError, match=r"Hugging Face \(127.0.0.1:9\) cannot be reached: .*refused.* GLM_HUB to another hub"
        ):
            download(model, "huggingface", reports)

    assert hub.asked == []


@pytest.mark.parametrize("name", HUBS)
@pytest.mark.parametrize(
    "answer",
    [
        '{"sha": "abc", "siblings": ["model.safetensors"], "Data": {"Files": ["model.safetensors"]}}',
        '{"sha": "abc", "siblings": [{"rfilename": "config.json", "size": -1}], "Data": {"Files": [{"Path": "config.json", "Size": -1}]}}',
        '{"sha": "../up", "siblings": [], "Data": {"Files": 5}}',
        '{"sha": 5, "Data": 5}',
        "[]",
    ],
)
def test_an_answer_of_another_form_is_no_list(hub: HubStandIn, reports: Reports, name: str, answer: str) -> None:
    hub.page = answer.encode()

    with pytest.raises(LoadError, match=r"something else than|cannot be read"):
        download("owner/name", name, reports)


def test_a_login_page_is_not_taken_for_a_hub(hub: HubStandIn, reports: Reports) -> None:
    hub.page = b"<html>Please log in to the network</html>"

    with pytest.raises(LoadError, match="something else than JSON; is there a login page"):
        download("owner/name", "huggingface", reports)


def test_a_line_that_goes_away_in_the_middle_is_waited_for(
    hub: HubStandIn, reports: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.faults = [
        Fault("cut", after=1_000_000),
        Fault("status", status=502, times=12),
    ]  # more than two rounds of attempts

    assert content(download("owner/name", "huggingface", reports)) == expected()
    assert hub.sent == TOTAL


@pytest.mark.parametrize("name", HUBS)
def test_a_revision_can_be_pinned(hub: HubStandIn, reports: Reports, name: str) -> None:
    commit = {"huggingface": COMMIT, "modelscope": SCOPE_COMMIT}[name]

    assert download(f"owner/name@{commit}", name, reports).name == commit
    assert download("owner/name@v1", name, reports).name == commit
    with pytest.raises(LoadError, match=r"owner/name.*(v2|revision)"):
        download("owner/name@v2", name, reports)
    for wrong in ("../x", "a b", "", "/x", "a/../b"):
        with pytest.raises(LoadError, match="GLM_MODEL"):
            loader.load(EngineConfig(model=f"owner/name@{wrong}", hub=name, device="cpu", threads=1), reports)


def test_a_mirror_that_lists_names_only_is_asked_for_sizes(hub: HubStandIn, reports: Reports) -> None:
    hub.names_only = True
    hub.faults = [Fault("flip", after=1234)]

    assert content(download("owner/name", "huggingface", reports)) == expected()
    assert reports.last.total_bytes == TOTAL
    assert len(hub.requests_of("model.safetensors")) == 2, "the checksum is known as well"


def test_a_disk_that_is_too_small_is_told_before_the_first_byte(
    hub: HubStandIn, reports: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**12, used=0, free=539 * 10**6))

    with pytest.raises(
        LoadError,
        match=r"0.003 GB|0\.0 GB are still to be downloaded and 0.5 GB must stay free, but 0.5 GB are free in .*HF_HOME",
    ):
        download("owner/name", "huggingface", reports)

    assert hub.sent == 0


@pytest.mark.parametrize(
    ("spare", "message"), [("2**29", "Not enough disk for owner/name"), ("-2**40", "the disk is full")]
)
def test_a_small_disk(hub: HubStandIn, tmp_path: Path, spare: str, message: str) -> None:
    """On a real file system of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (
        "from api.engine.loading import download\n"
        "from api.engine.loaded_model import LoadError\n"
        f"download.SPARE_BYTES = {spare}\n"
        "try: download.download('owner/name', 'huggingface', lambda *_: None)\n"
        "except LoadError as error: print(error)\n"
    )
    command = [
        "unshare",
        "-m",
        "sh",
        "-c",
        f'mount -t tmpfs -o size=2m none {disk} && exec "$0" -c "$1"',
        sys.executable,
        script,
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "HF_HOME": str(disk), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"file systems cannot be mounted here: {done.stderr}")

    assert message in done.stdout, done.stderr


CLIENT = """
import sys
from api.engine.loading.download import download
print(download("owner/name", sys.argv[1], lambda *_: None), flush=True)
"""


def client(name: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, name],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


def until_sent(hub: HubStandIn, size: int) -> None:
    deadline = time.monotonic() + 60
    while hub.sent < size:
        assert time.monotonic() < deadline, hub.sent
        time.sleep(0.01)


@pytest.mark.parametrize("name", HUBS)
def test_a_killed_download_is_resumed(hub: HubStandIn, reports: Reports, name: str) -> None:
    hub.rate = 3e6
    killed = client(name)
    until_sent(hub, 1_500_000)
    killed.send_signal(signal.SIGKILL)
    killed.wait()

    cache = HubCache(hubs.HUBS[name](), "owner/name")
    assert cache.find("") is None, "half of it is not taken for all of it"
    parts = list(cache.blobs.glob("*.part"))
    assert len(parts) == 1 and parts[0].stat().st_size > 1_000_000

    hub.rate = 0.0
    assert content(download("owner/name", name, reports)) == expected()
    assert hub.requests_of("model.safetensors")[-1]["Range"].startswith("bytes=1")
    assert hub.sent < TOTAL + 300_000  # what was on its way
    assert not list(cache.blobs.glob("*.part"))


def test_what_a_crash_of_the_machine_has_left_is_checked(hub: HubStandIn, reports: Reports) -> None:
    cache = HubCache(hubs.HuggingFace(), "owner/name")
    file = next(f for f in hubs.HuggingFace().files("owner/name", "main").files if f.name == "model.safetensors")
    cache.blobs.mkdir(parents=True)
    cache.part(file).write_bytes(WEIGHTS[:1_000_000] + bytes(500_000))  # blocks that were never written

    assert content(download("owner/name", "huggingface", reports)) == expected()


def test_two_processes_download_once(hub: HubStandIn, reports: Reports) -> None:
    hub.rate = 2e6
    first = client("huggingface")
    until_sent(hub, 500_000)

    folder = download("owner/name", "huggingface", reports)

    assert content(folder) == expected()
    assert first.communicate()[0].strip() == str(folder) and first.returncode == 0
    assert hub.sent == TOTAL
    assert any(
        d.trouble == "another process downloads it" and 0 < d.downloaded_bytes < TOTAL for d in reports.downloads
    )


def test_a_download_ends_with_its_process(hub: HubStandIn) -> None:
    """Threads that wait for a byte do not keep a server from ending."""
    hub.faults = [Fault("stall", after=1000, times=9)]
    code = (
        "import threading, time\nfrom api.engine.loading.download import download\n"
        "threading.Thread(target=download, args=('owner/name', 'huggingface', lambda *_: None), daemon=True).start()\ntime.sleep(2)\n"
    )
    began = time.monotonic()

    subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=50
    )

    assert time.monotonic() - began < 50


def test_huggingface_hub_and_this_program_use_each_others_copies(hub: HubStandIn, reports: Reports) -> None:
    environment = {**os.environ, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    code = "import sys, huggingface_hub as h; print(h.snapshot_download(sys.argv[1], allow_patterns=['*.json', '*.jinja', '*.safetensors'], local_files_only=len(sys.argv) > 2))"
    del hub.files["../outside.json"], hub.files["onnx/model.safetensors"], hub.files[".hidden.json"]
    theirs = subprocess.run(
        [sys.executable, "-c", code, "owner/theirs"], env=environment, capture_output=True, text=True
    )
    assert theirs.returncode == 0, theirs.stderr
    hub.asked.clear()

    assert download("owner/theirs", "huggingface", reports) == Path(theirs.stdout.strip())
    assert hub.asked == []

    ours = download("owner/ours", "huggingface", reports)
    read = subprocess.run(
        [sys.executable, "-c", code, "owner/ours", "offline"], env=environment, capture_output=True, text=True
    )
    assert read.stdout.strip() == str(ours), read.stderr


@pytest.mark.parametrize(
    "place",
    [
        "models/owner/na___me-1___5",
        "hub/models/owner/na___me-1___5",
        "hub/owner/na___me-1___5",
        "models/owner--na.me-1.5/snapshots/master",
    ],
)
def test_what_modelscope_has_downloaded_is_used(hub: HubStandIn, reports: Reports, tmp_path: Path, place: str) -> None:
    folder = tmp_path / "ms" / place
    folder.mkdir(parents=True)
    for name in WANTED:
        (folder / name).write_bytes(FILES[name])

    assert download("owner/na.me-1.5", "modelscope", reports) == folder
    assert hub.asked == []


@pytest.mark.parametrize("damage", ["weights cut", "no tokenizer", "a shard is missing"])
def test_a_copy_that_is_not_whole_is_completed(hub: HubStandIn, reports: Reports, damage: str) -> None:
    folder = download("owner/name", "huggingface", reports)
    shutil.rmtree(folder.parents[1] / "files")  # as huggingface_hub leaves it
    if damage == "weights cut":
        blob = (folder / "model.safetensors").resolve()
        blob.write_bytes(blob.read_bytes()[:-1])
    elif damage == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    else:
        (folder / "model.safetensors.index.json").write_text(
            '{"weight_map": {"w": "model.safetensors", "v": "second.safetensors"}}'
        )
    hub.asked.clear()

    again = download("owner/name", "huggingface", reports)

    assert hub.asked and {name: content(again)[name] for name in WANTED} == expected()


def test_without_the_network_by_order(hub: HubStandIn, reports: Reports, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    with pytest.raises(LoadError, match="HF_HUB_OFFLINE forbids"):
        download("owner/name", "huggingface", reports)

    assert hub.asked == []


def test_the_rate_is_that_of_the_last_seconds_and_falls_when_nothing_comes() -> None:
    now = 1000.0
    reports = Reports()
    meter = DownloadMeter(reports, lambda: now)
    meter.begin("Hub", 100, 20_000_100)
    for _ in range(10):
        now += 1.0
        meter.add(1_000_000, "a")

    running = meter.read()
    now += 10.0
    slower = meter.read()
    now += 10.0
    still = meter.read()

    assert running.bytes_per_s == pytest.approx(1e6, rel=0.15)
    assert running.remaining_s == pytest.approx(10.0, rel=0.15)
    assert slower.bytes_per_s < 0.6e6
    assert (still.bytes_per_s, still.remaining_s, still.downloaded_bytes) == (0.0, None, 10_000_100)


def test_only_bytes_are_progress() -> None:
    """So that the checker sees a download that stands still, however often it is tried again."""
    reports = Reports()
    meter = DownloadMeter(reports)
    meter.connect("Hub")
    before = len(reports.fractions)

    meter.connect("Other", "the hub cannot be reached")
    meter.begin("Other", 0, 100)
    meter.say("next attempt in 30 s")

    assert len(reports.fractions) == before
    assert (reports.last.hub, reports.last.trouble) == ("Other", "next attempt in 30 s")
    meter.say("")
    assert reports.last.trouble == "the hub cannot be reached", "it is still said where the files come from"
