"""YAML that strangers wrote, read in a time that its length bounds: aliases, which can unfold for ever, are refused."""

from __future__ import annotations

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.YAMLError(f"line {event.start_mark.line + 1}: an alias (*{event.anchor}) is not allowed")
        return super().compose_node(parent, index)


def load(text: str | bytes) -> Any:
    """What the document says, as plain values.

    Raises:
        yaml.YAMLError: it is not YAML, has an alias, or is nested too deeply.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except ValueError as error:  # dates and numbers that there are not
        raise yaml.YAMLError(str(error)) from None
