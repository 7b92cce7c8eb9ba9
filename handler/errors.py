"""Why one request of a batch, or one image of a request, is refused, as values of one small tree.

RequestError
├── InvalidRequest    400  nothing sent, or bytes that cannot be decoded as the image they claim to be
├── ImageTooLarge     413  more pixels, a longer aspect or more time than the settings allow
├── UnsupportedImage  415  not an image, or a format that is not taken
├── InternalError     500  our own mistake, which no request should be able to bring about
└── RequestTooLate    504  it waited so long that nobody waits for its answer any more

A refusal concerns one request of a batch; the others are answered as if it had not been there.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar

# The refusal may name what it found, which may be longer than TorchServe can send.
_MOST_CHARACTERS = 500


class RequestError(Exception):
    """The refusal of a request or of one of its images. The message is written for the client who sent it."""

    code: ClassVar[int]
    phrase: ClassVar[str]

    def document(self) -> dict[str, int | str]:
        """The error in TorchServe's own shape, with a message of bounded length."""
        message = str(self)
        if len(message) > _MOST_CHARACTERS:
            message = message[: _MOST_CHARACTERS - 1] + "…"
        return {"code": self.code, "type": type(self).__name__, "message": message}

    def encode(self, **further: Any) -> bytes:
        """That as JSON, with what its protocol demands beside it."""
        return json.dumps({**self.document(), **further}).encode()


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


class RequestTooLate(RequestError):
    code = 504
    phrase = "Gateway Timeout"
