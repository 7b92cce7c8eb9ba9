"""The Java libraries inside TorchServe's `model-server.jar`, whose build strips what scanners look for.

Most versions stand in the jar itself. The others are those of TorchServe 0.12.0's build files, and count for its jar
alone, which a digest tells.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from importlib.metadata import distribution
from pathlib import Path
from typing import NamedTuple

JAR = Path(str(distribution("torchserve").locate_file("ts/frontend/model-server.jar")))
_SHA256 = "ce340411ce54beaacd3dcfa31644a9aa369a83a36ed687172ba1088a13123dfe"
"""Of the jar of TorchServe 0.12.0, the last there will be."""
_FROM_JAR, _FROM_BUILD = "jar", "build files of TorchServe 0.12.0"
IN_GRPC = "jar, inside grpc-netty-shaded"
"""The source of a library of which the jar has two: this is gRPC's own."""
_STATED = {
    "io.grpc:grpc-core": ("io/grpc/internal/GrpcUtil.class", r"\b(\d+\.\d+\.\d+)"),
    "io.grpc:grpc-netty-shaded": ("io/grpc/internal/GrpcUtil.class", r"\b(\d+\.\d+\.\d+)"),
    "com.google.code.gson:gson": ("com/google/gson/internal/GsonBuildConfig.class", r"(\d+\.\d+[\d.]*)"),
    "org.apache.logging.log4j:log4j-core": ("META-INF/DEPENDENCIES", r"log4j-core:jar:([\w.-]+)"),
    "org.apache.logging.log4j:log4j-api": ("META-INF/DEPENDENCIES", r"log4j-api:jar:([\w.-]+)"),
    "org.codehaus.groovy:groovy": ("META-INF/groovy-release-info.properties", r"ImplementationVersion=(\S+)"),
    "org.apache.ant:ant": ("org/apache/tools/ant/version.txt", r"VERSION=(\S+)"),
    "junit:junit": ("junit/runner/Version.class", r"(\d+\.\d+[\d.]*)"),
}
"""Name → a file of the jar, and where the version stands in it. Libraries of one release share one."""
_SHADED = (
    "META-INF/native/libio_grpc_netty_shaded_netty_transport_native_epoll_x86_64.so",
    r"(4\.\d+\.\d+\.Final)\.so",
    (
        "netty-buffer", "netty-codec", "netty-codec-http", "netty-codec-http2", "netty-codec-socks", "netty-common",
        "netty-handler", "netty-handler-proxy", "netty-resolver", "netty-transport", "netty-transport-native-epoll",
    ),
)  # fmt: skip
"""What tells the version of the copy of netty inside grpc-netty-shaded, and what that is made of."""
_NETTY = ("META-INF/io.netty.versions.properties", r"^(netty[\w-]*)\.version=(\S+)")
_DECLARED = {
    "org.yaml:snakeyaml": ("org/yaml/snakeyaml/Yaml.class", "2.1"),
    "org.apache.commons:commons-compress": ("org/apache/commons/compress/archivers/ArchiveEntry.class", "1.25.0"),
    "commons-io:commons-io": ("org/apache/commons/io/IOUtils.class", "2.16.1"),
    "commons-cli:commons-cli": ("org/apache/commons/cli/CommandLine.class", "1.3.1"),
    "io.prometheus:simpleclient": ("io/prometheus/client/Collector.class", "0.9.0"),
    "com.lmax:disruptor": ("com/lmax/disruptor/RingBuffer.class", "3.4.4"),
    "org.slf4j:slf4j-api": ("org/slf4j/Logger.class", "1.7.32"),
    # grpc-protobuf 1.50.0 asks for it; `protoc_version=3.18.0` is the compiler's. Its UnknownFieldSet.Builder has the
    # field `fieldBuilders`, which 3.18.0 lacks.
    "com.google.protobuf:protobuf-java": ("com/google/protobuf/UnknownFieldSet$Builder.class", "3.21.7"),
}
"""Name → a class of it, which the jar holds, and the version."""


class Library(NamedTuple):
    """One that is inside the jar."""

    group: str
    name: str
    version: str | None
    """None where neither the jar nor a build file of ours tells."""
    source: str
    """What tells the version."""

    @property
    def purl(self) -> str:
        """As scanners look it up."""
        return f"pkg:maven/{self.group}/{self.name}" + (f"@{self.version}" if self.version else "")


def read(jar: Path = JAR) -> list[Library]:
    """Those that can be told, by group and name."""
    found = []
    with zipfile.ZipFile(jar) as archive:
        held = set(archive.namelist())

        def text(member: str) -> str:
            return archive.read(member).decode("latin-1") if member in held else ""

        for name, version in sorted(set(re.findall(_NETTY[1], text(_NETTY[0]), re.MULTILINE))):
            found.append(Library("io.netty", name, version, _FROM_JAR))
        if stated := re.search(_SHADED[1], text(_SHADED[0])):
            found += [Library("io.netty", name, stated[1], IN_GRPC) for name in _SHADED[2]]
        for library, (member, pattern) in _STATED.items():
            if stated := re.search(pattern, text(member)):
                found.append(_library(library, stated[1].rstrip("."), _FROM_JAR))
        is_known = hashlib.sha256(jar.read_bytes()).hexdigest() == _SHA256
        for library, (member, declared) in _DECLARED.items():
            if member in held:
                told = (declared, _FROM_BUILD) if is_known else (None, "unknown")
                found.append(_library(library, *told))
    return sorted(found)


def _library(name: str, version: str | None, source: str) -> Library:
    group, _, artifact = name.partition(":")
    return Library(group, artifact, version, source)
