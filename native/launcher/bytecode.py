"""Compiles each SOURCE below a folder to SOURCEc, as the file of an image: `bytecode.py FOLDER`.

A file `FOLDER/usr/lib/x.py` is compiled as `/usr/lib/x.py`. The bytecode is valid whatever the time of the source, and
is never compared with it: it is the image that cannot change.
"""

import py_compile
import sys
from pathlib import Path

folder = Path(sys.argv[1])
for path in sorted(folder.rglob("*.py")):
    py_compile.compile(
        str(path),
        cfile=f"{path}c",
        dfile=f"/{path.relative_to(folder)}",
        doraise=True,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
