"""The errors of the HTTP client that the installed huggingface_hub speaks with: httpx2 since its 2.0, httpx before."""

from __future__ import annotations

from importlib import import_module

import huggingface_hub

_client = import_module("httpx2" if int(huggingface_hub.__version__.split(".")[0]) >= 2 else "httpx")
HTTPError: type[Exception] = _client.HTTPError
TransportError: type[Exception] = _client.TransportError
