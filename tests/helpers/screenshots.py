"""Pictures of web pages, by a browser without a window."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome") or ""
"""Empty where there is none."""
needs_browser = pytest.mark.skipif(
    not BROWSER, reason="there is no chromium on this machine (Debian: apt-get install chromium)"
)

OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)


def browse(browser: str, url: str, *options: str, seconds: int = 60, timeout: int = 240) -> str:
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


def main() -> None:
    """Take a picture of a page of TensorBoard on logs: ``python tests/screenshots.py logs '#hparams' hparams.png``."""
    from helpers.tensorboard_server import tensorboard

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("logs", type=Path)
    parser.add_argument("page", help="what follows the address, e.g. '#custom_scalars'")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--size", type=int, nargs=2, default=[1600, 1200], metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--browser", default="chromium")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, tensorboard(args.logs, Path(folder, "log")) as server:
        server.wait_for(lambda: server.get("data/plugin/scalars/tags"))
        screenshot(args.browser, f"{server.url}/{args.page}", args.picture.resolve(), size=tuple(args.size))


if __name__ == "__main__":
    main()
