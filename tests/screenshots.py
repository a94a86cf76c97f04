"""Pictures of web pages, by a browser without a window."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from pathlib import Path

OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)


def browse(browser: str, url: str, *options: str, seconds: int = 25, timeout: int = 240) -> str:
    """Open a page, wait some seconds of its own time, and end the browser in any case; return what it printed."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [browser, *OPTIONS, f"--user-data-dir={profile}", f"--virtual-time-budget={1000 * seconds}"]
        process = subprocess.Popen(
            [*command, *options, url],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | {"no_proxy": "*"},
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return output.decode()


def screenshot(browser: str, url: str, path: Path, *, size: tuple[int, int] = (1600, 1200)) -> Path:
    """Save what a page looks like."""
    browse(browser, url, f"--window-size={size[0]},{size[1]}", f"--screenshot={path}")
    if not path.exists():
        raise RuntimeError(f"The browser made no picture of {url}.")
    return path
