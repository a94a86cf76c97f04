"""Pictures of web pages, by a browser without a window."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from pathlib import Path

OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)


def screenshot(
    browser: str, url: str, path: Path, *, size: tuple[int, int] = (1600, 1200), seconds: int = 25, timeout: int = 180
) -> Path:
    """Save what a page looks like some seconds of its own time after it was opened; end the browser in any case."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [browser, *OPTIONS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"]
        command += [f"--virtual-time-budget={1000 * seconds}", f"--screenshot={path}", url]
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "no_proxy": "*"},
        )
        try:
            _, messages = process.communicate(timeout=timeout)
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    if not path.exists():
        raise RuntimeError(f"The browser made no picture of {url}:\n{messages.decode()[-2000:]}")
    return path
