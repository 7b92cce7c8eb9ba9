"""TorchServe's `.properties` file: the five ports it opens, and a copy of it on other ports."""

from __future__ import annotations

import json
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from server import properties
from server.errors import ConfigError, PortTaken
from server.keys import PORT_KEYS

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class ServerConfig:
    """The lines of a `.properties` file."""

    text: str

    @classmethod
    def read(cls, path: Path) -> ServerConfig:
        """Raises:
        ConfigError: there is no such file, or TorchServe would not do what it says.
        """
        properties.read(path).check()
        return cls(path.read_text(encoding="utf-8"))

    def value(self, key: str) -> str:
        """What the file says, or TorchServe's default."""
        found = re.findall(rf"^{key}=(.*)$", self.text, flags=re.MULTILINE)
        return found[-1].strip() if found else PORT_KEYS[key].default or ""

    def on_ports(self, first: int) -> ServerConfig:
        """The same configuration on five ports from `first`, in the order of `PORT_KEYS`."""
        text = f"{self.text.rstrip()}\n"
        for offset, key in enumerate(PORT_KEYS):
            port = str(first + offset)
            line = f"{key}={re.sub(r'[0-9]+$', port, self.value(key))}"
            text, replaced = re.subn(rf"^{key}=.*$", line, text, flags=re.MULTILINE)
            text += "" if replaced else f"{line}\n"
        return ServerConfig(text)

    def with_absolute_paths(self) -> ServerConfig:
        """The same configuration for a server that runs in another directory than the project's root.

        Raises:
            ConfigError: a file that is named does not exist.
        """

        def absolute(line: re.Match[str]) -> str:
            path = ROOT / line[1].strip()
            if not path.is_file():
                raise ConfigError(
                    f"metrics_config={line[1]}: no such file, seen from {ROOT}; correct or remove the line"
                )
            # JSON escapes what Java's properties need escaped: the backslash, and all that is not ASCII.
            return f"metrics_config={json.dumps(str(path))[1:-1]}"

        return ServerConfig(re.sub(r"^metrics_config=(.*)$", absolute, self.text, flags=re.MULTILINE))

    @property
    def ports(self) -> dict[str, tuple[str, int]]:
        """Host and port of each key that opens one."""
        result = {}
        for key in PORT_KEYS:
            value = self.value(key)
            try:
                parts = urlsplit(value if "://" in value else f"grpc://127.0.0.1:{value}")
                result[key] = (parts.hostname or "127.0.0.1", parts.port or 80)
            except ValueError:
                raise ConfigError(f"{key}={value}: expected an address such as {PORT_KEYS[key].default}") from None
        return result

    def check_ports(self) -> None:
        """Raises:
        PortTaken: naming the first port that cannot be opened, and how to choose others.
        """
        for key, (host, port) in self.ports.items():
            with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((host, port))
                except OSError as error:
                    raise PortTaken(
                        f"port {port} ({key}) cannot be opened: {error.strerror}. Stop what uses it, or choose five "
                        f"other ports with --port N, for example --port {port + 1000 if port < 64000 else 18080}"
                    ) from None
