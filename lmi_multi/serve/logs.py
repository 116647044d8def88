"""What is logged, to standard error: lines for people, or JSON objects for what collects them."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


class TextFormatter(logging.Formatter):
    """A record as a line, its `fields`, if it has some, as NAME=VALUE behind the message; values
    that are no plain words are JSON strings."""

    def __init__(self) -> None:
        super().__init__(TEXT)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """See `logging.Formatter`."""
        fields: dict[str, object] = getattr(record, "fields", {})
        told = (f" {name}={_plain(value)}" for name, value in fields.items())
        return super().formatMessage(record) + "".join(told)


def _plain(value: object) -> str:
    text = str(value)
    return text if text.isascii() and text.isprintable() and " " not in text else json.dumps(text)


class JsonFormatter(logging.Formatter):
    """A record as one JSON object a line: `time` (UTC), `level`, `logger`, `message`, `process`,
    the record's `fields`, if it has some, and a `traceback` where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        entry = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "process": record.process,
        }
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def set_up(form: str, level: int = logging.INFO) -> None:
    """Log in the form "text" or "json", in place of what was set up before. Below `INFO`, only what
    this package says: other libraries' lines show what they send, keys included."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=max(level, logging.INFO), handlers=[handler], force=True)
    logging.getLogger("lmi_multi").setLevel(level)
