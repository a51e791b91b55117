"""Small wheels, and a folder of them as the only index that pip sees."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path

# What makes pip use the folder `index` and nothing else.
INDEX_VARIABLES = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "{index}", "PIP_NO_CACHE_DIR": "1"}


def make_wheel(folder: Path, name: str, version: str, tag: str) -> Path:
    """Write a wheel with one module."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": f"TAG = {tag!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    record = ""
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(text)}\n"
    path = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in {**files, f"{info}/RECORD": record + f"{info}/RECORD,,\n"}.items():
            archive.writestr(zipfile.ZipInfo(member), text)
    return path


def requirement(*paths: Path) -> str:
    """The entry of a requirements file with hashes that allows these files of one version."""
    name, version = paths[0].name.split("-")[:2]
    hashes = [f"--hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" for path in paths]
    return f"{name}=={version} ; python_version >= '3' \\\n    " + " \\\n    ".join(hashes) + "\n    # via something\n"
