"""The games: each draws and plays, and returns what was played. None of them judges (dpaudit.verdict does)."""
