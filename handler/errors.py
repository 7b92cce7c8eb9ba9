"""Why one row of a batch is not answered, as values of one small tree.

RequestError
├── InvalidRequest    400  nothing sent, or bytes that cannot be decoded as the image they claim to be
├── ImageTooLarge     413  more pixels or a longer aspect than the settings allow
├── UnsupportedImage  415  not an image, or a format that is not taken
└── InternalError     500  our own mistake, which no request should be able to bring about

A refusal belongs to one row of a batch; its neighbours are answered as if it had not been there.
"""

from __future__ import annotations

import json
from typing import ClassVar


class RequestError(Exception):
    """One row's refusal. The message is written for the client who sent the row."""

    code: ClassVar[int]
    phrase: ClassVar[str]

    def body(self) -> dict[str, int | str]:
        """The error body in TorchServe's own shape."""
        return {"code": self.code, "type": type(self).__name__, "message": str(self)}

    def encode(self) -> bytes:
        """That as JSON."""
        return json.dumps(self.body()).encode()


class InvalidRequest(RequestError):
    code = 400
    phrase = "Bad Request"


class ImageTooLarge(RequestError):
    code = 413
    phrase = "Content Too Large"


class UnsupportedImage(RequestError):
    code = 415
    phrase = "Unsupported Media Type"


class InternalError(RequestError):
    code = 500
    phrase = "Internal Server Error"
