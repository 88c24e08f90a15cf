"""The hub without a network: huggingface_hub asks it again and again, for a minute and more."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import get_session

_WAITS = (1.0, 2.0)  # seconds between three tries
_PATIENCE = 10.0  # seconds for an answer


@contextmanager
def asked_in_vain_once() -> Iterator[None]:
    """Where the hub cannot be reached, its libraries go on at once as if told to be offline.

    One request of the client that they share finds out, so that proxies and ``HF_ENDPOINT`` hold;
    what they have in their caches is used. A hub that is slow is asked as ever.

    Raises:
        ConnectionError: It was needed and cannot be reached, why, and what failed without it.
    """
    client: Any = get_session()
    fault = _fault(client) if hasattr(client, "event_hooks") else None  # not before 1.0
    if fault is None:
        yield
        return
    text = f"{HfApi().endpoint} cannot be reached ({fault})"

    asked = []

    def refuse(request: Any) -> None:
        asked.append(request)
        raise OfflineModeIsEnabled(text)

    before = client.event_hooks
    client.event_hooks = {**before, "request": [*before["request"], refuse]}
    try:
        yield
    except Exception as error:
        if not asked:
            raise
        is_nowhere = any(isinstance(cause, ConnectionError) for cause in _causes(error))
        rest = "what was wanted is in no cache" if is_nowhere else f"without it: {error}"
        raise ConnectionError(f"{text}, and {rest}") from error
    finally:
        client.event_hooks = before


def _fault(client: Any) -> OSError | None:
    """Why no connection can be made; None where one can, or where it only takes long."""
    for wait in (*_WAITS, None):
        try:
            client.head(HfApi().endpoint, timeout=_PATIENCE)
            return None
        except OfflineModeIsEnabled:  # by the user's own wish
            return None
        except Exception as error:  # of httpx, whose cause is the system's
            found = [cause for cause in _causes(error) if isinstance(cause, OSError)]
            if not found or isinstance(found[-1], TimeoutError):
                return None
            if wait is None:
                return found[-1]
        time.sleep(wait)
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    met: list[BaseException] = []
    while error is not None and error not in met:
        met.append(error)
        yield error
        error = error.__cause__ or error.__context__
