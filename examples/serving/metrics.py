"""Counters in the text format of Prometheus."""

import threading
import time
from collections import defaultdict

BOUNDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the buckets of a duration, in seconds."""
HELP = {
    "requests_total": ("counter", "Requests that ended, by reason."),
    "rejected_total": ("counter", "Requests that were sent away since too many were waiting."),
    "prompt_tokens_total": ("counter", "Tokens of prompts that were read."),
    "prefix_tokens_reused_total": ("counter", "Tokens of shared beginnings that did not have to be read again."),
    "generated_tokens_total": ("counter", "Tokens of replies."),
    "conversations_resumed_total": ("counter", "Conversations that went on, by where they were."),
    "conversations": ("gauge", "Conversations that are kept, by where they are."),
    "start_time_seconds": ("gauge", "When the server was started, in seconds since 1970."),
    "rows_decoding": ("gauge", "Requests that are being answered."),
    "rows_reading": ("gauge", "Requests whose prompts are being read."),
    "requests_waiting": ("gauge", "Requests that wait for a row."),
    "prefixes": ("gauge", "Shared beginnings that are kept."),
    "time_to_first_token_seconds": ("histogram", "From the arrival of a request to its first token."),
    "step_seconds": ("histogram", "Duration of a step of all rows."),
}
"""Kind and meaning of every metric."""


class Metrics:
    """Numbers by name and label, for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.set("start_time_seconds", time.time())

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        """Increase a counter."""
        with self._lock:
            self._values[name][_label(labels)] += amount

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        with self._lock:
            self._values[name][_label(labels)] = value

    def observe(self, name: str, value: float) -> None:
        """Add a duration, in seconds, to a histogram."""
        with self._lock:
            for bound in (*BOUNDS, float("inf")):
                self._values[f"{name}_bucket"][_label({"le": f"{bound:g}".replace("inf", "+Inf")})] += value <= bound
            self._values[f"{name}_sum"][""] += value
            self._values[f"{name}_count"][""] += 1

    def text(self) -> str:
        """All of it, in the text format."""
        lines = []
        with self._lock:
            for name, (kind, meaning) in HELP.items():
                lines += [f"# HELP ahn_{name} {meaning}", f"# TYPE ahn_{name} {kind}"]
                parts = [f"{name}_{part}" for part in ("bucket", "sum", "count")] if kind == "histogram" else [name]
                for part in parts:
                    values = self._values.get(part) or ({"": 0.0} if kind != "histogram" else {})
                    lines += [f"ahn_{part}{label} {value:.15g}" for label, value in values.items()]
        return "\n".join(lines) + "\n"


def _label(labels: dict[str, str]) -> str:
    return "{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "}" if labels else ""
