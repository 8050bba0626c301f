"""The Hub id and tag of the published head, written by every push; None for a head in the folder of this file."""

HEAD: str | None = None
REVISION: str | None = None
