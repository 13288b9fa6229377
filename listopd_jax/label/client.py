"""The HTTP client of judges: a body is read up to a limit and never unpacked, so no server can fill the memory."""

from collections.abc import AsyncIterator

import httpx2

from listopd_jax.label.judges import Unavailable

LARGEST_BODY = 1 << 20  # bytes; an answer has a few thousand


def http_client() -> httpx2.AsyncClient:
    """A client whose requests raise Unavailable for a body that is compressed or larger than LARGEST_BODY."""
    return httpx2.AsyncClient(
        timeout=None,  # asking.py times each attempt as a whole
        headers={"Accept-Encoding": "identity"},
        event_hooks={"response": [_limit]},
    )


async def _limit(response: httpx2.Response) -> None:
    """Runs between the headers of a response and its body."""
    packed = response.headers.get("Content-Encoding", "identity")
    if packed.lower() == "identity":
        response.stream = _Limited(response.stream)
    elif response.status_code == httpx2.codes.OK:
        raise Unavailable(f"a body that is compressed, which was not asked for ({packed[:20]!r})")
    else:  # the status says enough; what explains it stays unread
        del response.headers["Content-Encoding"]
        response.stream = httpx2.ByteStream(b"")


class _Limited(httpx2.AsyncByteStream):
    """A body up to LARGEST_BODY."""

    def __init__(self, stream: httpx2.AsyncByteStream):
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in self._stream:
            if (size := size + len(chunk)) > LARGEST_BODY:
                raise Unavailable(f"a body of more than {LARGEST_BODY >> 20} MiB")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()
