"""Where the published head lies: a Hub id and its tag, or a folder. Written anew by every publish."""

HEAD: str | None = None
REVISION: str | None = None
