"""Untrusted text on its way into a page: model answers, error messages and names are hostile until shown to be harmless.

Three doors: Jinja escapes markup, ``embed`` makes JSON that cannot leave its ``<script>``, and ``visible`` replaces what
would change how its neighbours read (bidi, invisible and control characters) by its code point. Scripts use ``textContent``.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

# C0 and C1 but tab and newline; bidi marks, embeddings, overrides and isolates; zero-width and line separators; interlinear
# annotation; tags; lone surrogates (which UTF-8 cannot hold). U+200C and U+200D stay: scripts and emoji need them.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f\ud800-\udfff]"
)
_CLOSERS = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"})


def visible(text: str) -> str:
    """``text`` with every control, bidi and invisible character replaced by ``⟦U+XXXX⟧``; CR LF becomes a newline."""
    return _INVISIBLE.sub(lambda m: f"⟦U+{ord(m[0]):04X}⟧", text.replace("\r\n", "\n"))


def embed(value: Any) -> str:
    """JSON for a ``<script type="application/json">``: strings ``visible``, NaN and infinity null, no ``<``, ``>`` or ``&``."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_CLOSERS)


def _plain(value: Any) -> Any:
    match value:
        case str():
            return visible(value)
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {visible(k): _plain(v) for k, v in value.items()}
        case list() | tuple():
            return [_plain(v) for v in value]
    return value
