"""Language identification of an answer, for the voice that speaks it."""

from __future__ import annotations

import threading
from typing import Any

LANGUAGES = (  # the candidates
    "en", "de", "fr", "es", "it", "pt", "nl", "pl", "ru", "uk", "cs", "sv", "da", "no", "fi", "tr", "el", "hu", "ro", "ja", "zh",
    "ko", "ar", "hi", "vi", "id",
)  # fmt: skip
SURE = 0.8  # of 308 answers of nano's none was taken for another language than English with more than 0.26
ENOUGH = 400  # characters, the last ones of a text, that are classified

_lock = threading.Lock()
_loaded: Any = None


def language_of(text: str) -> str | None:
    """One of LANGUAGES, or None where it is not clear. The first call takes half a second, all others 0.1 ms."""
    name, likely = _identifier().classify(text[-ENOUGH:])
    return str(name) if likely >= SURE else None


def _identifier() -> Any:
    global _loaded
    with _lock:
        if _loaded is None:
            from py3langid.langid import MODEL_FILE, LanguageIdentifier  # late: 4 MB that only a voice needs

            _loaded = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
            _loaded.set_languages(LANGUAGES)
        return _loaded
