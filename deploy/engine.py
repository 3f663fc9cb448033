"""python -m deploy.engine: runs GLM_ENGINE_COMMAND, and ends when it ends, with its exit code.

start.sh records this process for the engine behind the API. It leads the session of everything that the command starts, so
that all of it is found and ended together, whatever the engine calls its processes.
"""

from __future__ import annotations

import signal
import subprocess
import sys

from settings import ROOT, SettingsError, load


def main() -> int:
    try:
        settings = load()
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    if not settings.engine_command:
        print("GLM_ENGINE_COMMAND is not set", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # the whole group gets it: this process waits for the engine to end
    print("event=engine_command_started", flush=True)
    code = subprocess.Popen(["/bin/sh", "-c", settings.engine_command], cwd=ROOT, stdin=subprocess.DEVNULL).wait()
    print(f"event=engine_ended code={code}", flush=True)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
