"""Weights & Biases beside a run: a process of its own that reads metrics.jsonl.

Nothing of wandb runs in the trainer. The trainer starts the process, keeps a pipe to it that it never waits on, and
closes that pipe at the end; the file is the queue between them. So wandb may be slow, hang, raise, crash or be absent:
the worst it can do is to make the end of a run wait for `wandb.timeout_seconds`.
"""

from __future__ import annotations

import contextlib
import json
import netrc
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from megatron_mixcpt.config import WandbConfig
from megatron_mixcpt.observe.wandb_writer import LOG, SAYS

FOLDER, RUN_ID = "wandb", "run_id"
SERVERS = ("https://api.wandb.ai", "https://api.forge.coreweave.com")  # of wandb before and after it moved
Ending = Literal["finished", "stopped", "failed"]


def choose_mode(config: WandbConfig, environment: Mapping[str, str] = os.environ) -> str:
    """`online`, `offline` or `disabled`: what is configured, else what WANDB_MODE says, else online when logged in."""
    if config.mode != "auto":
        return config.mode
    if environment.get("WANDB_MODE"):
        word = environment["WANDB_MODE"].lower()
        return {"dryrun": "offline", "run": "online"}.get(word, word)
    return "online" if _logged_in(environment) else "offline"


def _logged_in(environment: Mapping[str, str]) -> bool:
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    own = environment.get("WANDB_BASE_URL")
    hosts = [urlparse(server).hostname or "" for server in ([own] if own else SERVERS)]
    for path in (environment.get("NETRC"), "~/.netrc", "~/_netrc"):
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if path and not netrc.netrc(os.path.expanduser(path)).hosts.keys().isdisjoint(hosts):
                return True
    return False


def run_id_of(run_dir: Path, saved: str | None) -> str:
    """The id under which wandb knows this run: of its directory, else of the checkpoint that is resumed, else new."""
    path = run_dir / FOLDER / RUN_ID
    with contextlib.suppress(OSError):
        known = path.read_text().strip()
        if known:
            return known
    number = saved or uuid.uuid4().hex[:8]
    with contextlib.suppress(OSError):  # a full disk: the checkpoint will hold it
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{number}\n")
    return number


class WandbProcess:
    """The writer of one run; rank 0 alone has one.

    Args:
        mode: `online` or `offline`.
        run_id: of `run_id_of`.
        values: the resolved configuration.
        timeout: seconds that `close` waits at most.
    """

    def __init__(
        self, config: WandbConfig, run_dir: Path, *, mode: str, run_id: str, values: dict[str, Any], timeout: float
    ) -> None:
        self._run_dir, self._timeout = run_dir, timeout
        self._process: subprocess.Popen[bytes] | None = None
        metrics = run_dir / "metrics.jsonl"
        settings = {
            "run_dir": str(run_dir),
            "offset": metrics.stat().st_size,  # rows before it were written by an earlier process
            "timeout": self._timeout,
            "config": values,
            "init": {
                "project": config.project,
                "entity": config.entity,
                "name": config.name or run_dir.absolute().name,
                "id": run_id,
                "mode": mode,
            },
        }
        try:
            (run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
            with (run_dir / FOLDER / LOG).open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "megatron_mixcpt.observe.wandb_writer", json.dumps(settings)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # signals to the run are the run's
                    env={
                        "WANDB_ERROR_REPORTING": "false",
                        "WANDB_DATA_DIR": str((run_dir / FOLDER / "data").absolute()),
                        "WANDB_CACHE_DIR": str((run_dir / FOLDER / "cache").absolute()),
                        **os.environ,
                    },
                )
        except OSError as error:
            self._error = str(error)

    def close(self, ending: Ending) -> str:
        """Let the writer finish, `wandb.timeout_seconds` at most; returns what the user should know.

        Args:
            ending: how the run came to its end; wandb shows `failed` as such.
        """
        process = self._process
        if process is None:
            return f"warning: wandb was not started, nothing else is affected: {self._error}"
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended already
            process.stdin.write(f"{ending}\n".encode())
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            code = process.wait(self._timeout)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return (
                f"warning: wandb did not finish within {self._timeout:g} s (wandb.timeout_seconds) and was ended; "
                f"metrics.jsonl is whole, and what wandb had written is in {self._run_dir / FOLDER}"
            )
        said = self._said()
        if code != 0:
            return f"warning: wandb failed, metrics.jsonl is whole: {said} ({self._run_dir / FOLDER / LOG})"
        return f"wandb: {said}"

    def _said(self) -> str:
        """The writer's last words for the user."""
        try:
            lines = (self._run_dir / FOLDER / LOG).read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return next((line.removeprefix(SAYS) for line in reversed(lines) if line.startswith(SAYS)), "it said nothing")
