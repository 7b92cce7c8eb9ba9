"""The Java libraries inside TorchServe's `model-server.jar`, whose build strips what scanners look for.

Many versions stand in the jar itself. The others are those of build files: TorchServe 0.12.0's, and those of gRPC and
Groovy, which bring the most. They count for the jar of 0.12.0 alone, which a digest tells.
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
_FROM_GRPC = "build files of gRPC 1.50.0 and of what it needs"
_FROM_GROOVY = "build files of Groovy 3.0.9 and of what it needs"
IN_GRPC = "inside grpc-netty-shaded"
"""In the source of a library that is part of gRPC's copy of netty."""
_UNKNOWN = (None, "unknown")
_NAMES = ""
"""Stands for the list of the jar's names."""
_STATED = {
    ("io/grpc/internal/GrpcUtil.class", r"\b(\d+\.\d+\.\d+)"): {
        "io.grpc:grpc-api": "io/grpc",
        "io.grpc:grpc-context": "io/grpc",
        "io.grpc:grpc-core": "io/grpc/internal io/grpc/inprocess io/grpc/util",
        "io.grpc:grpc-netty-shaded": "io/grpc/netty/",
        "io.grpc:grpc-protobuf": "io/grpc/protobuf",
        "io.grpc:grpc-protobuf-lite": "io/grpc/protobuf/lite",
        "io.grpc:grpc-stub": "io/grpc/stub/",
    },
    ("com/google/gson/internal/GsonBuildConfig.class", r"(\d+\.\d+[\d.]*)"): {
        "com.google.code.gson:gson": "com/google/gson/",
    },
    ("META-INF/DEPENDENCIES", r"log4j-core:jar:([\w.-]+)"): {
        "org.apache.logging.log4j:log4j-api": (
            "org/apache/logging/log4j org/apache/logging/log4j/internal/ org/apache/logging/log4j/message/"
            " org/apache/logging/log4j/simple org/apache/logging/log4j/spi org/apache/logging/log4j/status"
            " org/apache/logging/log4j/util/"
        ),
        "org.apache.logging.log4j:log4j-core": "org/apache/logging/log4j/core/",
        "org.apache.logging.log4j:log4j-slf4j-impl": "org/apache/logging/slf4j org/slf4j/impl",
    },
    ("META-INF/groovy-release-info.properties", r"ImplementationVersion=(\S+)"): {
        "org.codehaus.groovy:groovy": (
            "groovy/ org/codehaus/groovy/ org/apache/groovy/"
            " groovyjarjarantlr/ groovyjarjarantlr4/ groovyjarjarasm/ groovyjarjarpicocli/"
        ),
        "org.codehaus.groovy:groovy-ant": "groovy/ant",
        "org.codehaus.groovy:groovy-astbuilder": "org/apache/groovy/ast/builder",
        "org.codehaus.groovy:groovy-cli-picocli": "groovy/cli/picocli",
        "org.codehaus.groovy:groovy-console": "groovy/console",
        "org.codehaus.groovy:groovy-datetime": "org/apache/groovy/datetime/extensions",
        "org.codehaus.groovy:groovy-docgenerator": "org/apache/groovy/docgenerator",
        "org.codehaus.groovy:groovy-groovydoc": "org/apache/groovy/groovydoc/tools",
        "org.codehaus.groovy:groovy-groovysh": "org/apache/groovy/groovysh",
        "org.codehaus.groovy:groovy-jmx": "groovy/jmx",
        "org.codehaus.groovy:groovy-json": "groovy/json",
        "org.codehaus.groovy:groovy-jsr223": "org/codehaus/groovy/jsr223",
        "org.codehaus.groovy:groovy-macro": "org/codehaus/groovy/macro/runtime",
        "org.codehaus.groovy:groovy-nio": "org/apache/groovy/nio/runtime",
        "org.codehaus.groovy:groovy-servlet": "groovy/servlet",
        "org.codehaus.groovy:groovy-sql": "groovy/sql",
        "org.codehaus.groovy:groovy-swing": "groovy/swing",
        "org.codehaus.groovy:groovy-templates": "groovy/text",
        "org.codehaus.groovy:groovy-test": "groovy/test",
        "org.codehaus.groovy:groovy-test-junit5": "groovy/junit5/plugin",
        "org.codehaus.groovy:groovy-testng": "org/codehaus/groovy/testng",
        "org.codehaus.groovy:groovy-xml": "groovy/xml",
    },
    ("org/apache/tools/ant/version.txt", r"VERSION=(\S+)"): {
        "org.apache.ant:ant": "org/apache/tools/",
        "org.apache.ant:ant-antlr": "org/apache/tools/ant/taskdefs/optional",
        "org.apache.ant:ant-junit": "org/apache/tools/ant/taskdefs/optional/junit",
        "org.apache.ant:ant-launcher": "org/apache/tools/ant/launch",
    },
    ("junit/runner/Version.class", r"(\d+\.\d+[\d.]*)"): {
        "junit:junit": (
            "junit/ org/junit org/junit/experimental/ org/junit/function org/junit/internal/ org/junit/matchers"
            " org/junit/rules org/junit/runner/ org/junit/runners/ org/junit/validator"
        ),
    },
    ("module-info.class", r"(?s)Module\W+([\d.]+).*org\.junit\.platform\.launcher"): {
        "org.junit.platform:junit-platform-commons": "org/junit/platform/commons/",
        "org.junit.platform:junit-platform-engine": "org/junit/platform/engine/",
        "org.junit.platform:junit-platform-launcher": "org/junit/platform/launcher/",
    },
    ("META-INF/versions/9/module-info.class", r"(?s)Module\W+([\d.]+).*org\.yaml\.snakeyaml"): {
        "org.yaml:snakeyaml": "org/yaml/snakeyaml/",
    },
    ("picocli/CommandLine.class", r"(\d+\.\d+\.\d+)"): {"info.picocli:picocli": "picocli"},
    (_NAMES, r"webjars/jquery/([\d.]+)/jquery\.js"): {"org.webjars:jquery": "META-INF/resources/webjars/jquery/"},
}
"""Where a version stands: a file of the jar, and what is around it → the libraries of that release, with folders of
the jar that hold them. A folder that ends in / stands for those below it, too."""
_SHADED = (
    "META-INF/native/libio_grpc_netty_shaded_netty_transport_native_epoll_x86_64.so",
    r"(4\.\d+\.\d+\.Final)\.so",
    (
        "netty-buffer", "netty-codec", "netty-codec-http", "netty-codec-http2", "netty-codec-socks", "netty-common",
        "netty-handler", "netty-handler-proxy", "netty-resolver", "netty-transport", "netty-transport-classes-epoll",
        "netty-transport-native-epoll", "netty-transport-native-unix-common",
    ),
)  # fmt: skip
"""What tells the version of the copy of netty inside grpc-netty-shaded, and what that is made of."""
_NETTY = ("META-INF/io.netty.versions.properties", r"^(netty[\w-]*)\.version=(\S+)")
_DECLARED = {
    _FROM_BUILD: {
        "org.apache.commons:commons-compress": ("org/apache/commons/compress/", "1.25.0"),
        "commons-io:commons-io": ("org/apache/commons/io/", "2.16.1"),
        "commons-cli:commons-cli": ("org/apache/commons/cli", "1.3.1"),
        "io.prometheus:simpleclient": ("io/prometheus/client", "0.9.0"),
        "io.prometheus:simpleclient_common": ("io/prometheus/client/exporter/common", "0.9.0"),
        "io.prometheus:simpleclient_servlet": ("io/prometheus/client/exporter io/prometheus/client/filter", "0.9.0"),
        "com.lmax:disruptor": ("com/lmax/disruptor/", "3.4.4"),
        "org.slf4j:slf4j-api": ("org/slf4j org/slf4j/event org/slf4j/helpers org/slf4j/spi", "1.7.32"),
    },
    _FROM_GRPC: {
        # `protoc_version=3.18.0` of TorchServe is the compiler's. UnknownFieldSet.Builder here has the field
        # `fieldBuilders`, which 3.18.0 lacks.
        "com.google.protobuf:protobuf-java": ("com/google/protobuf/", "3.21.7"),
        "com.google.api.grpc:proto-google-common-protos": (
            "com/google/api com/google/cloud/ com/google/geo/ com/google/logging/ com/google/longrunning"
            " com/google/rpc/ com/google/type",
            "2.9.0",
        ),
        # Without com/google/common/io/TempFileCreator, which came with the fixes of 32.0.0.
        "com.google.guava:guava": ("com/google/common/ com/google/thirdparty/", "31.1-android"),
        "com.google.guava:failureaccess": ("com/google/common/util/concurrent/internal", "1.0.1"),
        "com.google.code.findbugs:jsr305": ("javax/annotation/", "3.0.2"),
        "com.google.errorprone:error_prone_annotations": ("com/google/errorprone/annotations/", "2.14.0"),
        "com.google.j2objc:j2objc-annotations": ("com/google/j2objc/annotations", "1.3"),
        "com.google.android:annotations": ("android/annotation", "4.1.1.4"),
        "org.checkerframework:checker-qual": ("org/checkerframework/", "3.12.0"),
        "org.codehaus.mojo:animal-sniffer-annotations": ("org/codehaus/mojo/animal_sniffer", "1.21"),
        "io.perfmark:perfmark-api": ("io/perfmark", "0.25.0"),
    },
    f"{_FROM_GRPC}, {IN_GRPC}": {
        "io.netty:netty-tcnative-boringssl-static": ("io/grpc/netty/shaded/io/netty/internal/tcnative", "2.0.54.Final"),
        "io.netty:netty-tcnative-classes": ("io/grpc/netty/shaded/io/netty/internal/tcnative", "2.0.54.Final"),
    },
    _FROM_GROOVY: {
        "org.testng:testng": ("org/testng/", "7.4.0"),
        "com.beust:jcommander": ("com/beust/jcommander/", "1.78"),
        "com.github.javaparser:javaparser-core": ("com/github/javaparser/", "3.23.0"),
        "com.thoughtworks.qdox:qdox": ("com/thoughtworks/qdox/", "1.12.1"),
        "jline:jline": ("jline/", "2.14.6"),
        "org.fusesource.jansi:jansi": ("org/fusesource/jansi/", "1.12"),
        "org.fusesource.jansi:jansi-native": ("org/fusesource/jansi/internal", "1.6"),
        "org.fusesource.hawtjni:hawtjni-runtime": ("org/fusesource/hawtjni/runtime", "1.9"),
        "org.junit.jupiter:junit-jupiter-api": ("org/junit/jupiter/api/", "5.7.2"),
        "org.junit.jupiter:junit-jupiter-engine": ("org/junit/jupiter/engine/", "5.7.2"),
        "org.opentest4j:opentest4j": ("org/opentest4j", "1.2.0"),
        "org.hamcrest:hamcrest-core": ("org/hamcrest/", "1.3"),
    },
}
"""What tells the version → library → its folders, and the version."""
FOLDERS = {name: folders for libraries in _STATED.values() for name, folders in libraries.items()}
FOLDERS |= {name: folders for libraries in _DECLARED.values() for name, (folders, _) in libraries.items()}
"""Library → its folders. netty's own are not here: it lists its parts itself."""


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

    @property
    def is_of_grpc(self) -> bool:
        """Whether it is gRPC's copy of netty, or part of it."""
        return self.name == "grpc-netty-shaded" or IN_GRPC in self.source


def read(jar: Path = JAR) -> list[Library]:
    """Those that are inside, by group and name."""
    found = []
    with zipfile.ZipFile(jar) as archive:
        held = set(archive.namelist())
        inside = {name.rpartition("/")[0] for name in held}

        def text(member: str) -> str:
            if member == _NAMES:
                return "\n".join(held)
            return archive.read(member).decode("latin-1") if member in held else ""

        def has(folders: str) -> bool:
            return any(is_in(folder, folders) for folder in inside)

        for name, version in sorted(set(re.findall(_NETTY[1], text(_NETTY[0]), re.MULTILINE))):
            # netty names this one, too, but packs it apart.
            if name != "netty-tcnative" or has("io/netty/internal/tcnative"):
                found.append(Library("io.netty", name, version, _FROM_JAR))
        if stated := re.search(_SHADED[1], text(_SHADED[0])):
            found += [Library("io.netty", name, stated[1], f"{_FROM_JAR}, {IN_GRPC}") for name in _SHADED[2]]
        for (member, pattern), stating in _STATED.items():
            stated = re.search(pattern, text(member))
            told = (stated[1].rstrip("."), _FROM_JAR) if stated else _UNKNOWN
            found += [_library(name, *told) for name, folders in stating.items() if has(folders)]
        is_known = hashlib.sha256(jar.read_bytes()).hexdigest() == _SHA256
        for source, declared in _DECLARED.items():
            for name, (folders, version) in declared.items():
                if has(folders):
                    found.append(_library(name, *((version, source) if is_known else _UNKNOWN)))
    return sorted(found, key=lambda library: (library.group, library.name, library.source))


def is_in(folder: str, folders: str) -> bool:
    """Whether a folder of the jar is one of these, or below one that ends in /."""
    return any(folder == each.rstrip("/") or (each[-1] == "/" and folder.startswith(each)) for each in folders.split())


def _library(name: str, version: str | None, source: str) -> Library:
    group, _, artifact = name.partition(":")
    return Library(group, artifact, version, source)
