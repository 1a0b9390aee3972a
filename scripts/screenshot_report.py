"""Photograph a report as a browser shows it: ``python scripts/screenshot_report.py report.html shot.png``.

Needs headless Chromium on PATH; says so and exits 2 where there is none.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_browser() -> str | None:
    """Path of the first known browser, or None."""
    return next((path for path in map(shutil.which, BROWSERS) if path), None)


def screenshot(browser: str, page: Path, image: Path, width: int, height: int, dark: bool) -> None:
    """Write a PNG of the top `height` CSS pixels of `page`, laid out `width` CSS pixels wide.

    Chromium's windows can't be narrower than 500 pixels, so narrower pages are shown in a frame.
    """
    with tempfile.TemporaryDirectory() as directory:
        address, window = page.resolve().as_uri(), width
        if width < 500:
            frame = Path(directory) / "frame.html"
            frame.write_text(
                f'<body style="margin:0"><iframe src="{address}" '
                f'style="border:0;width:{width}px;height:{height}px">'
            )
            address, window = frame.as_uri(), 500
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--force-device-scale-factor=2" if width >= 500 else "--force-device-scale-factor=1",
            f"--user-data-dir={directory}/profile",
            f"--window-size={window},{height}",
            f"--screenshot={image.resolve()}",
        ]
        if dark:
            command.append("--blink-settings=preferredColorScheme=0")
        else:
            command.append("--blink-settings=preferredColorScheme=1")
        subprocess.run([*command, address], check=True, capture_output=True, timeout=120)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path, help="the page, as written by `tailorbird fit`")
    parser.add_argument("image", type=Path, help="the PNG to write")
    parser.add_argument("--width", type=int, default=1100, help="of the page in CSS pixels")
    parser.add_argument("--height", type=int, default=1400, help="of the picture in CSS pixels")
    parser.add_argument("--dark", action="store_true", help="as a browser set to dark colours shows it")
    arguments = parser.parse_args()
    if not arguments.report.is_file():
        print(
            f"no page at {arguments.report}; give the report.html that `tailorbird fit` wrote",
            file=sys.stderr,
        )
        return 2
    browser = find_browser()
    if browser is None:
        print(f"no browser on PATH (looked for {', '.join(BROWSERS)}); install Chromium", file=sys.stderr)
        return 2
    screenshot(browser, arguments.report, arguments.image, arguments.width, arguments.height, arguments.dark)
    return 0


if __name__ == "__main__":
    sys.exit(main())
