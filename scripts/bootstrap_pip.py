"""Install pip into the running interpreter's environment, for Python builds that come without ensurepip.

Takes the newest pip wheel that fits this Python from PyPI (or from PIP_INDEX_URL), checks its sha256 and lets it
install itself. Standard library only; Python 3.10 or newer.

Usage: .venv/bin/python scripts/bootstrap_pip.py
"""

import hashlib
import html
import os
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urldefrag, urljoin

INDEX = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/") + "/pip/"
LINK = re.compile(r"<a\s([^>]*)>\s*(pip-([0-9.]+)-py3-none-any\.whl)\s*</a>")


def fetch(url):
    """The body of an https page, as bytes."""
    if not url.startswith("https://"):
        raise ValueError(f"pip is fetched over https only, got {url!r}")
    with urllib.request.urlopen(url, timeout=60) as response:
        return response.read()


def fits_this_python(requires_python):
    """Whether the lower bound of a requires-python text, such as ">=3.10", admits this interpreter."""
    bound = re.search(r">=\s*3\.([0-9]+)", requires_python)
    return bound is None or sys.version_info >= (3, int(bound[1]))


def newest_wheel(page):
    """(file name, address, sha256) of the newest final pip release on an index page that fits this Python."""
    wheels = []
    for attributes, name, version in LINK.findall(page):
        fields = {key: html.unescape(value) for key, value in re.findall(r'([\w-]+)="([^"]*)"', attributes)}
        address, fragment = urldefrag(fields.get("href", ""))
        usable = fragment.startswith("sha256=") and "data-yanked" not in attributes
        if usable and fits_this_python(fields.get("data-requires-python", "")):
            key = tuple(int(part) for part in version.split("."))
            wheels.append((key, name, urljoin(INDEX, address), fragment.removeprefix("sha256=")))
    if not wheels:
        raise ValueError(f"{INDEX} lists no pip wheel for Python {sys.version_info.major}.{sys.version_info.minor}")
    return max(wheels)[1:]


def main():
    """Fetch, check, install."""
    name, address, sha256 = newest_wheel(fetch(INDEX).decode())
    wheel = fetch(address)
    received = hashlib.sha256(wheel).hexdigest()
    if received != sha256:
        raise ValueError(f"{name} must have sha256 {sha256}, got {received}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(wheel)
        # A wheel is a zip file, so Python can run the pip inside it.
        subprocess.run([sys.executable, f"{path}/pip", "install", "--no-index", "--no-deps", str(path)], check=True)


if __name__ == "__main__":
    if sys.prefix == sys.base_prefix:
        sys.exit("error: bootstrap_pip.py installs into a virtual environment; run it with .venv/bin/python")
    try:
        main()
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: could not install pip from {INDEX}: {error}")
