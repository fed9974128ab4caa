"""Keys never appear in what is written or printed: they are taken out of whatever comes from outside."""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import urllib.parse
from collections.abc import Iterable

SHORTEST = 12  # characters: shorter keys are words such as EMPTY, which completions may contain, too
MASK = b"***"


class Secrets:
    """The secrets in some environment variables, in every form in which a text may hold them.

    Args:
        names: of the variables.
    """

    def __init__(self, names: Iterable[str]) -> None:
        values = [os.environ.get(name, "").strip() for name in names]
        forms = {form for value in values if len(value) >= SHORTEST for form in forms_of(value)}
        self._forms = sorted(forms, key=len, reverse=True)  # a form may be part of another

    def hidden(self, raw: bytes) -> bytes:
        """Bytes without the secrets."""
        for form in self._forms:
            if form in raw:
                raw = raw.replace(form, MASK)
        return raw

    def hidden_in(self, text: str) -> str:
        """A text without the secrets."""
        return self.hidden(text.encode(errors="surrogatepass")).decode(errors="surrogatepass")


def secrets_of(options: argparse.Namespace) -> Secrets:
    """All secrets of a run: what is sent to servers, and the keys of the Hub and of S3."""
    every = [options, *getattr(options, "models", {}).values()]
    sent = [name for each in every for name in (each.api_key_env, *dict(each.header_env or []).values())]
    return Secrets([*sent, "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"])


def forms_of(value: str) -> Iterable[bytes]:
    """A secret as it is, as JSON and URLs write it, and as base64 at each of its three alignments."""
    raw = value.encode(errors="surrogatepass")
    yield raw
    yield json.dumps(value)[1:-1].encode()
    yield urllib.parse.quote(value, safe="").encode(errors="replace")
    for shift in range(3):
        text = base64.b64encode(b"\0" * shift + raw)
        # The first and the last characters also hold bits of what stands beside the secret.
        yield text[(0, 2, 3)[shift] : len(text) - (0, 3, 2)[(len(raw) + shift) % 3]]


def redact(url: str) -> str:
    """A URL without the password or key that it may carry."""
    return re.sub(r"([?&][\w-]*(?:key|token)=)[^&\s]+", r"\1***", re.sub(r"//[^/]*@", "//***@", url))
