"""What an object store answered, in the words of `ftrain.errors`: done, refused, taken, or nobody knows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from obstore import exceptions

from ftrain.errors import AlreadyExists, CorruptCheckpoint, ForeignAnswer, NotFound, StorageError, UnknownOutcome

_STATUS = re.compile(r"non-2xx status code: (\d{3})([^:\n<]*)")
_CODE = re.compile(r"<Code>([^<]{1,100})</Code>")
_MESSAGE = re.compile(r"<Message>([^<\n]{1,300})")
_WITHOUT_CREDENTIALS = ("169.254.169.254", "169.254.170.2", "metadata.google.internal")  # where they are asked for last
_VARIABLES = (
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, or AZURE_STORAGE_ACCOUNT_NAME and "
    "AZURE_STORAGE_ACCOUNT_KEY"
)
_PLAIN_HTTP = ("scheme is not https", "URL scheme is not allowed", "BadScheme")
_FOREIGN = re.compile(r"([A-Z][A-Za-z-]+ Header missing from response|Got invalid [a-z ]+ response)")
_SYSTEM_ERROR = re.compile(r'kind: \w+,\s+message: "([^"]{1,100})"')
_TRANSIENT = (408, 409, 425, 429)  # besides all from 500


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Raises `NotFound`, `CorruptCheckpoint` for a range beyond the end, `StorageError` for anything else."""
    try:
        yield
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            raise StorageError(f"{what}: there is no such bucket") from None
        raise NotFound(f"{what}: it is not there") from None
    except (exceptions.BaseError, ValueError, OSError) as error:
        if "non-2xx status code: 416" in str(error):
            raise CorruptCheckpoint(f"{what}: it was cut short, it ends before what is wanted of it") from None
        raise StorageError(f"{what}: {cause(error)}") from error


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Raises `AlreadyExists`, `UnknownOutcome` where it may have been done, or `StorageError` where it was refused."""
    try:
        yield
    except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
        raise AlreadyExists(f"{what}: it exists already") from None
    except FileNotFoundError as error:
        # An upload that is not there was given up by somebody, or was ended by a try whose reply was lost.
        kind = UnknownOutcome if "NoSuchUpload" in str(error) else StorageError
        raise kind(f"{what}: {cause(error)}") from error
    except (exceptions.BaseError, ValueError, OSError) as error:
        if _FOREIGN.search(str(error)):
            raise ForeignAnswer(f"{what}: {cause(error)}") from error
        kind = StorageError if _refused(error) else UnknownOutcome
        raise kind(f"{what}: {cause(error)}") from error


def cause(error: Exception) -> str:
    """The one sentence in what may be many lines."""
    text = str(error)
    if any(host in text for host in _WITHOUT_CREDENTIALS):
        return f"no credentials were found; set {_VARIABLES}"
    if any(said in text for said in _PLAIN_HTTP):
        return "plain http is used only where the endpoint is given as http://"
    if foreign := _FOREIGN.search(text):
        return f"the answer is not one of such a store ({foreign[1]})"
    status = _STATUS.search(text)
    if status is None:
        return _last_reason(text)
    said = [found[1] for pattern in (_CODE, _MESSAGE) if (found := pattern.search(text))]
    return " ".join([status[1] + status[2].rstrip(), *(f"({': '.join(said)})" for _ in said[:1])])


def _refused(error: Exception) -> bool:
    """Whether the store said that it did not, and will not, do it."""
    definite = (
        exceptions.PermissionDeniedError,
        exceptions.UnauthenticatedError,
        exceptions.NotSupportedError,
        exceptions.InvalidPathError,
        ValueError,
    )
    if isinstance(error, definite):
        return True
    text = str(error)
    status = _STATUS.search(text)
    if status is None:
        return any(said in text for said in (*_WITHOUT_CREDENTIALS, *_PLAIN_HTTP))
    return int(status[1]) == 501 or (400 <= int(status[1]) < 500 and int(status[1]) not in _TRANSIENT)


def _last_reason(text: str) -> str:
    """Of `Generic S3 error: Error performing PUT http://… in 3ms, after 2 retries - HTTP error: why`."""
    line = text.partition("\n")[0]
    why = _SYSTEM_ERROR.search(text)
    return (line.rpartition(" - ")[2] or line) + (f": {why[1]}" if why else "")
