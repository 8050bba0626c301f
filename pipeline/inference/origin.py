"""Where the published head lies: its Hub id and tag. None: in the folder this file is in. Written by every push."""

HEAD: str | None = None
REVISION: str | None = None
