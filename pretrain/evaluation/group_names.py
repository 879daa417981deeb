"""Keys of what is measured by frequency, from the most frequent on; without torch, as reports need no more of it."""

from __future__ import annotations

GROUPS = ("frequent", "medium", "rare")
DECILES = (*(str(place) for place in range(1, 11)), "never_seen")
