"""A door of an edge for a platform that runs containers: its port and its two paths, and no key.

    python -m operate edge edge --door sagemaker

SageMaker and Vertex AI reach a container by plain HTTP from within their own network, where they have already checked
who asks, and say by the environment which port and paths they want.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from enum import Enum

from client.errors import ClientError

FILE = "door.conf"
"""In `run/`, where nginx.conf includes it if it is there."""
_PATH = r"/[\w./:-]+"


class Platform(str, Enum):
    sagemaker = "sagemaker"
    vertex = "vertex"


_WANTED = {
    Platform.sagemaker: {
        "port": ("SAGEMAKER_BIND_TO_PORT", "8080"), "health": ("", "/ping"), "predict": ("", "/invocations"),
    },
    Platform.vertex: {
        "port": ("AIP_HTTP_PORT", "8080"), "health": ("AIP_HEALTH_ROUTE", ""), "predict": ("AIP_PREDICT_ROUTE", ""),
    },
}  # fmt: skip
"""Of each platform: the variable that says it, and what counts without."""


def configuration(platform: Platform, models: Collection[str], environment: Mapping[str, str]) -> str:
    """What nginx is told within the edge's server.

    Args:
        models: those of `servers.yaml`. The platform's paths name none, so there must be one.

    Raises:
        ClientError: there are several models, or a variable is missing or wrong.
    """
    if len(models) != 1:
        raise ClientError(f"a door for {platform.value} serves one model, and servers.yaml lists {len(models)}")
    said = {}
    for what, (variable, default) in _WANTED[platform].items():
        said[what] = environment.get(variable) or default
        expected = r"[1-9]\d{0,4}" if what == "port" else _PATH
        if not re.fullmatch(expected, said[what]):
            raise ClientError(f"{variable}={said[what]}: expected a {'port' if what == 'port' else 'path'}")
    if said["health"] == said["predict"]:
        raise ClientError(f"AIP_HEALTH_ROUTE and AIP_PREDICT_ROUTE are both {said['predict']}: expected two paths")
    port, [model] = said["port"], models
    here = f"if ($server_port != {port}) {{ return 404; }}"
    return f"""listen {port};
location = "{said["health"]}" {{
    {here}
    if ($request_method != GET) {{ return 405; }}
    keepalive_timeout 0;
    rewrite ^ /readyz break;
    proxy_pass http://servers;
}}
location = "{said["predict"]}" {{
    {here}
    if ($request_method != POST) {{ return 405; }}
    if ($is_too_long) {{ return 400; }}
    if ($is_form) {{ return 415; }}
    keepalive_timeout 0;
    rewrite ^ /predictions/{model} break;
    proxy_pass http://servers;
}}
"""
