"""Requests to the Hub: which are tried again, and errors as one sentence with a remedy."""

import importlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import get_session, hf_raise_for_status

from ..errors import MtpfError
from ..model.sources_mtpf import is_hub_id

# huggingface_hub passes on the transport errors of its HTTP client: httpx in 1.x, httpx2 in 2.x.
httpx = importlib.import_module(HTTPError.__module__.partition(".")[0])

log = logging.getLogger(__name__)

RETRY_WAITS: tuple[float, ...] = (1.0, 4.0)
"""Seconds before the second and the third attempt of a request that failed for no fault of its own."""
TRANSIENT_STATUS = (408, 412, 429, 500, 502, 503, 504)
"""412 is the answer to a commit that the client sent twice by itself, because the first answer got lost."""

T = TypeVar("T")


class HubError(MtpfError):
    """A folder may not be published, or the Hub refuses, cannot be reached, or holds something unexpected."""


class PushConflictError(HubError):
    """The repo has got another commit since the push was planned; it was not touched."""


def check_repo_id(repo_id: str) -> None:
    """Raise `HubError` unless a name has the form ``owner/name``."""
    if not is_hub_id(repo_id):
        raise HubError(f"{str(repo_id)!r} is not a Hub id; use the form 'owner/name'.")


def validate_card(repo_id: str, card: ModelCard) -> None:
    """Raise `HubError` unless the Hub accepts the metadata of a card."""

    # Not `card.validate()`: in huggingface_hub 1.x it asks huggingface.co, whatever HF_ENDPOINT says.
    def ask() -> None:
        body = {"repoType": card.repo_type, "content": str(card)}
        answer = get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=body)
        if answer.status_code == 400:
            try:
                reason = "; ".join(entry["message"] for entry in json.loads(answer.text)["errors"])
            except (ValueError, LookupError, TypeError):
                reason = answer.text
            raise HubError(f"The Hub does not accept the card of {repo_id}: {reason}")
        hf_raise_for_status(answer)

    with explained(repo_id):
        attempt(ask)


def is_transient(error: BaseException | None) -> bool:
    """Say whether a failed request may succeed when it is sent again."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in TRANSIENT_STATUS
    # Xet reports a failed upload as ConnectionError; so does the client its offline mode.
    transport = isinstance(error, (httpx.TransportError, ConnectionError, TimeoutError))
    return transport and not isinstance(error, OfflineModeIsEnabled)


def attempt(action: Callable[[], T], landed: Callable[[], T | None] = lambda: None) -> T:
    """Call ``action``, up to three times; ``landed`` may find that it has succeeded after all."""
    for wait in (*RETRY_WAITS, None):
        try:
            return action()
        except Exception as error:
            if not is_transient(error) or isinstance(error, httpx.ConnectError):
                raise  # what cannot be reached now will not be in a second
            if wait is not None:
                log.info("The Hub did not answer as it should (%s); trying again.", type(error).__name__)
                time.sleep(max(wait, _retry_after(error)))
            if (result := landed()) is not None:
                return result
            if wait is None:
                raise
    raise AssertionError


def _retry_after(error: Exception) -> float:
    seconds = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return min(float(seconds), 60.0) if re.fullmatch(r"\d+", seconds) else 0.0


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Turn what the client raises into one sentence with a remedy, without token or headers."""
    try:
        yield
    except RevisionNotFoundError as error:
        raise HubError(f"{repo_id} has no such revision; name an existing commit, tag or branch.") from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"There is no repo {repo_id}, or your token may not read it; check the name, or log in with: "
            "hf auth login"
        ) from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, RevisionResolutionError) as error:
        raise HubError(
            f"The Hub cannot be reached and {repo_id} is not (completely) in the cache; connect, unset "
            f"HF_HUB_OFFLINE, or fetch it beforehand with: mtpf pull {repo_id}"
        ) from error
    except HfHubHTTPError as error:
        status, reason = error.response.status_code, error.server_message or "no reason given"
        if status in (401, 403):
            remedy = "your token may not do this; log in with a token that can write: hf auth login"
        else:
            remedy = "another commit was made meanwhile; push again" if status == 412 else "try again later"
        raise HubError(f"The Hub answers {status} for {repo_id} ({reason}): {remedy}.") from error
    except (httpx.TransportError, ConnectionError, TimeoutError) as error:
        raise HubError(
            f"The connection to the Hub failed for {repo_id} ({type(error).__name__}); check the network and "
            "try again."
        ) from error
    except UnicodeEncodeError:  # of an HTTP header; the error itself holds the token
        remedy = "log in again with hf auth login, or correct HF_TOKEN"
        raise HubError(f"The Hub token has characters that no token has; {remedy}.") from None
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        reason = error.strerror or str(error)
        raise HubError(f"A file of {repo_id} cannot be read or written{where}: {reason}.") from error
