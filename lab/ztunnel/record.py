"""What a stand-in saw and did: a JSON object a line, with the monotonic time, which is that of every process here."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


class Recorder:
    """Appends to the file at `path`, and keeps the records for its own process; no file when `path` is empty."""

    def __init__(self, path: str = "") -> None:
        self.records: list[dict[str, Any]] = []
        self._file = open(path, "a", buffering=1) if path else None  # noqa: SIM115  # lives as long as the recorder

    def __call__(self, event: str, **values: Any) -> None:  # noqa: ANN401
        """Record an event."""
        record = {"at": time.monotonic(), "event": event} | values
        self.records.append(record)
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def read_records(path: Path | str, event: str = "") -> list[dict[str, Any]]:
    """The records in a file so far, of one event when it is named."""
    file = Path(path)
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if event in ("", record["event"])]
