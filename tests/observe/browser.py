"""A headless Chromium that opens one page from disk: what its console says, what the page looks like."""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
# Says nothing of the page but of a machine without a session bus, a GPU or a network.
CONSOLE = re.compile(r':CONSOLE[:(]\d*\)?\] "?(.*)')


def chromium():
    """Its path; skips the test where there is none."""
    found = next((shutil.which(name) for name in NAMES if shutil.which(name)), None)
    if found is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    return found


def open_page(page: Path, *, screenshot: Path | None = None, size=(1280, 900), dark=False):
    """`(document after its scripts ran, console lines)`."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            chromium(),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--host-resolver-rules=MAP * ~NOTFOUND",  # nothing from elsewhere
            f"--user-data-dir={profile}",
            f"--window-size={size[0]},{size[1]}",
            "--enable-logging=stderr",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--virtual-time-budget=2000",
        ]
        command += [f"--screenshot={screenshot}"] if screenshot else ["--dump-dom"]
        result = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr
    return result.stdout, CONSOLE.findall(result.stderr)
