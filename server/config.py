"""What a server is started with: the text of a `.properties` file, and the same on other ports."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

from server import properties
from server.errors import ConfigError, PortTaken
from server.keys import PORT_KEYS
from server.properties import Properties

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class ServerConfig:
    """The text of a `.properties` file and what it says."""

    text: str
    name: str = "config.properties"
    """As messages call it."""

    @classmethod
    def read(cls, path: Path) -> ServerConfig:
        """Raises:
        ConfigError: there is no such file, or TorchServe would not do what it says.
        """
        properties.read(path).check()
        return cls(path.read_text(encoding="utf-8"), str(path))

    @cached_property
    def properties(self) -> Properties:
        return properties.parse(self.text, self.name)

    def value(self, key: str) -> str:
        """What counts for the key: the environment's, the file's, or TorchServe's default."""
        return self.properties.get(key) or ""

    def on_ports(self, first: int) -> ServerConfig:
        """The same configuration on five ports from `first`, in the order of `PORT_KEYS`."""
        values = {}
        for port, (key, known) in enumerate(PORT_KEYS.items(), start=first):
            address = re.sub(r"(:[0-9]+)?$", f":{port}", self.value(key), count=1)
            values[key] = str(port) if known.kind == "port" else address
        return self._with(values)

    def with_model_api(self) -> ServerConfig:
        """The same configuration, by which models can be registered and removed."""
        return self._with({"enable_model_api": "true"})

    def with_absolute_paths(self) -> ServerConfig:
        """The same configuration for a server that runs in another directory than the project's root.

        Raises:
            ConfigError: a file that is named does not exist.
        """
        named = self.properties.values.get("metrics_config")
        if named is None:
            return self
        path = ROOT / named.text
        if not path.is_file():
            raise ConfigError(
                f"{named.where}: metrics_config={named.text}: no such file in {ROOT}; correct or remove the line"
            )
        # JSON escapes what Java's properties need escaped: the backslash, and all that is not ASCII.
        return self._with({"metrics_config": json.dumps(str(path))[1:-1]})

    def without_variables_in_workers(self) -> ServerConfig:
        """The same configuration, by which workers get no variable that it reads: one may be a password."""
        if not self.properties.variables:
            return self
        given = self.properties.get("blacklist_env_vars")
        names = "|".join(sorted(self.properties.variables))
        return self._with({"blacklist_env_vars": f"{given}|{names}" if given else names})

    def _with(self, values: Mapping[str, str]) -> ServerConfig:
        """These values instead, in lines of their own: of two equal keys TorchServe takes the last."""
        lines = [f"{key}={value}\n" for key, value in values.items()]
        return ServerConfig(f"{self.text.rstrip()}\n{''.join(lines)}", self.name)

    @property
    def ports(self) -> dict[str, tuple[str, int]]:
        """Host and port of each key that opens one.

        Raises:
            ConfigError: one is a Unix socket, which our client could not reach.
        """
        result = {}
        for key, known in PORT_KEYS.items():
            value = self.value(key)
            port = properties.port_of(key, value)
            if port < 1:
                raise ConfigError(f"{key}={value}: expected an address with a port, such as {known.default}")
            of_grpc = self.value(key.replace("_port", "_address"))
            result[key] = (of_grpc if known.kind == "port" else urlsplit(value).hostname or "", port)
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
