"""Errors that the server answers requests with, in OpenAI's JSON form."""

import logging

from starflow2_jax.data.documents import DocumentError

TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
log = logging.getLogger(__name__)


class ApiError(Exception):
    """An error response.

    `status`: of HTTP. `message`: one sentence for the user. `code`: a word for programs. `param`: the field of the
    request that is wrong. `retry`: seconds after which the client may try again.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, retry: int | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry = status, message, code, param, retry

    def body(self) -> dict:
        """The JSON body of the response."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """The error for a request that is wrong (400). The arguments are those of ApiError."""
    return ApiError(400, message, code, param)


def told(error: Exception) -> ApiError:
    """The error that the client receives for an exception. One that is not the client's fault is logged, and becomes a
    500.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, DocumentError):
        return ApiError(400, str(error), "invalid_prompt", "messages")
    log.error("a request failed", exc_info=error)
    return ApiError(500, "this request failed inside the server; its log says why", "internal_error")
