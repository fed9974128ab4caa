"""Access to S3, and to servers that speak its protocol."""

from __future__ import annotations

import functools
import os
import urllib.parse
from typing import Any

ATTEMPTS = 10  # per request, unless AWS_MAX_ATTEMPTS is set: about 70 s with the back-off of the AWS library
QUICK_ATTEMPTS = 4  # per request of the first access, which fails mostly by mistake: 5 s, 25 s if nothing responds
VARIABLES = "AWS_ACCESS_KEY_ID or AWS_PROFILE, AWS_REGION and AWS_ENDPOINT_URL_S3"


def endpoint() -> str | None:
    """The server to use instead of AWS, from the same environment variables as AWS's own programs."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


@functools.cache
def client(bucket: str, settings: str, quick: bool) -> Any:
    """A client for a bucket, which retries for about a minute while the server is overloaded or unreachable.

    A client from `FileSystem.from_uri` gives up sooner, and waits only 3 s for a response: completing a large upload
    takes longer. Credentials are found by the AWS library, as is the region if the bucket's cannot be looked up.

    Args:
        bucket: its name.
        settings: as in pyarrow's URIs: `region=…&endpoint_override=…`.
        quick: retry for a few seconds only.
    """
    import pyarrow.fs

    options: dict[str, Any] = {"endpoint_override": endpoint(), **dict(urllib.parse.parse_qsl(settings))}
    if not options["endpoint_override"] and "region" not in options:
        options["region"] = _region_of(bucket)
    configured = os.environ.get("AWS_MAX_ATTEMPTS", "")
    attempts = QUICK_ATTEMPTS if quick else int(configured) if configured.isdigit() else ATTEMPTS
    return pyarrow.fs.S3FileSystem(
        **options,
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
        connect_timeout=5,
        request_timeout=5 if quick else 60,
    )


@functools.cache
def _region_of(bucket: str) -> str | None:
    """The bucket's region; None if AWS cannot be reached, as in a private network."""
    import pyarrow.fs

    try:
        return str(pyarrow.fs.resolve_s3_region(bucket))
    except OSError:
        return None
