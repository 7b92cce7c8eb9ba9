"""Let a server finish what it has taken before it is stopped: TorchServe itself cuts every open connection.

It cannot be told to take no more requests. So first whoever sends them is told, by the file `logs/ready` that goes, and
served until no more come. If they go on coming, the inference token is exchanged and its file removed: what comes
later is refused in order (400), and what was taken before is finished.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests

from server import processes

FINISH_TIMEOUT_S = 30.0
"""For requests that were taken before the tokens were exchanged."""
_WINDOW_S = 1.0
_IDLE_S = 0.05
"""Processor time that workers spend in a window without any request, telling their metrics."""
_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Activity:
    """What a server has done so far, and what waits."""

    requests: float
    waiting: int
    busy_s: float
    """Processor time of all workers."""

    def is_still_after(self, earlier: Activity) -> bool:
        """Whether nothing came, waited or was computed in between."""
        idle = abs(self.busy_s - earlier.busy_s) < _IDLE_S
        return self.requests == earlier.requests and self.waiting == earlier.waiting == 0 and idle


class Drain:
    """The last calls to a server; its tokens are kept here, since their file goes."""

    def __init__(self, run_dir: Path, management_url: str, metrics_url: str) -> None:
        self.run_dir = run_dir
        self.management_url = management_url
        self.metrics_url = metrics_url
        self._session = requests.Session()
        self._session.trust_env = False
        self._keys = self._read_keys()
        self._renew("management")

    def finish(self, timeout_s: float) -> bool:
        """Wait until no request comes any more, at most `timeout_s`; then refuse new ones and finish the others.

        Returns:
            Whether every request that was taken has been answered, as far as can be seen.
        """
        if self.wait_until_still(timeout_s):
            return True
        self.refuse_requests()
        return self.wait_until_still(FINISH_TIMEOUT_S)

    def wait_until_still(self, timeout_s: float) -> bool:
        """Whether the server stood still before the time was over; one that is gone does."""
        deadline = time.monotonic() + timeout_s
        try:
            earlier = self.activity()
            while time.monotonic() < deadline:
                time.sleep(_WINDOW_S)
                now = self.activity()
                if now.is_still_after(earlier):
                    return True
                earlier = now
        except requests.RequestException:
            return processes.find(self.run_dir) is None
        return False

    def activity(self) -> Activity:
        """Raises:
        requests.RequestException: the server does not answer.
        """
        metrics = self._session.get(f"{self.metrics_url}/metrics", timeout=_TIMEOUT_S).text
        counted = re.findall(r"^ts_inference_requests_total\{.*\} (\S+)$", metrics, flags=re.MULTILINE)
        waiting = 0
        for model in self._management("/models?limit=1000").get("models", []):
            for version in self._management(f"/models/{model['modelName']}/all"):
                waiting += version.get("jobQueueStatus", {}).get("pendingRequests", 0)
        return Activity(sum(map(float, counted)), waiting, self._busy_s())

    def refuse_requests(self) -> None:
        """Make every inference token that a client may have invalid, and take the file from which it would get a new
        one; requests that were taken are not touched."""
        self._renew("inference")
        (self.run_dir / "key_file.json").unlink(missing_ok=True)

    def _busy_s(self) -> float:
        total = 0.0
        for worker in processes.workers(self.run_dir):
            try:
                times = worker.cpu_times()
            except psutil.Error:
                continue
            total += times.user + times.system
        return total

    def _management(self, path: str) -> Any:
        answer = self._session.get(
            self.management_url + path, headers=_bearer(self._keys.get("management")), timeout=_TIMEOUT_S
        )
        answer.raise_for_status()
        return answer.json()

    def _renew(self, kind: str) -> None:
        """Have TorchServe exchange a token, which it writes into its file."""
        url = f"{self.management_url}/token?type={kind}"
        try:
            self._session.get(url, headers=_bearer(self._keys.get("API")), timeout=_TIMEOUT_S)
        except requests.RequestException:
            return
        self._keys = self._read_keys() or self._keys

    def _read_keys(self) -> dict[str, str]:
        """The tokens by their kind; none where there is no such file, as with tokens switched off."""
        try:
            document = json.loads((self.run_dir / "key_file.json").read_text(encoding="utf-8"))
            return {kind: entry["key"] for kind, entry in document.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}


def _bearer(token: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}
