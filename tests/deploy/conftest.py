"""Leaves out what needs a program that is not part of this project: a test that is not collected is not skipped either."""

from __future__ import annotations

import shutil

collect_ignore = [] if shutil.which("vllm-router") else ["test_model_router.py"]
