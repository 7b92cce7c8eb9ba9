"""`servers.yaml`: what is behind an edge, servers of this machine and edges of others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from archive.strict_yaml import load as load_yaml
from client.errors import ClientError

_HOST = r"([\w.-]+|\[[0-9a-fA-F:]+\])"
_Name = Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]
_HttpUrl = Annotated[str, Field(pattern=rf"^http://{_HOST}:\d+/?$")]
_Weight = Annotated[int, Field(ge=1, le=100)]
_HttpsUrl = Annotated[str, Field(pattern=rf"^https://{_HOST}:\d+/?$")]


class ServerEntry(BaseModel):
    """A TorchServe, or an export for Ray Serve."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: _Name
    url: _HttpUrl
    """Its inference address."""
    management_url: _HttpUrl | None = None
    """By default the next port of the same host."""
    key_file: Path
    """TorchServe's own `key_file.json`, which a renewal rewrites."""
    ready_file: Path | None = None
    """`logs/ready` of a server that was started with --foreground: without it the server is about to stop, or
    a model has no worker."""
    weight: _Weight = 1
    """How many requests it gets beside another's one."""
    drained: bool = False
    """Gets no new request."""


class EdgeEntry(BaseModel):
    """Another machine's edge, which has the tokens of the servers there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: _Name
    url: _HttpsUrl
    key_file: Path
    """One line: a key that the other edge's `keys.conf` knows."""
    certificate_authority: Path
    """PEM file by which the other edge's certificate is verified."""
    weight: _Weight = 1
    """How many requests it gets beside another's one."""
    drained: bool = False
    """Gets no new request."""


class EdgeConfig(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: dict[str, Path | None] = {}
    """What must be ready on a server, each with its golden images, a folder or an archive, or nothing."""
    tolerance: float | None = Field(default=None, ge=0, le=1)
    """Largest difference of a golden probability that passes; by default the one that training wrote down."""
    servers: tuple[ServerEntry, ...] = ()
    edges: tuple[EdgeEntry, ...] = ()

    @model_validator(mode="after")
    def _is_whole(self) -> EdgeConfig:
        names = [*(entry.name for entry in self.servers), *(entry.name for entry in self.edges)]
        if not names:
            raise ValueError("list at least one server or edge")
        if len(set(names)) < len(names):
            raise ValueError("names of servers and edges must differ")
        if self.servers and not self.models:
            raise ValueError("list the models that must be ready on a server")
        return self


def read(path: Path) -> EdgeConfig:
    """Raises:
    ClientError: naming the file and every wrong key.
    """
    try:
        return EdgeConfig.model_validate(load_yaml(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ClientError(f"{path}: {error.strerror}; it lists what is behind the edge, see docs/edge.md") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ClientError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise ClientError(f"{path}: {'; '.join(map(_problem, error.errors()))}") from None


def _problem(problem: Any) -> str:
    key = ".".join(map(str, problem["loc"])) or "(the whole)"
    return f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
