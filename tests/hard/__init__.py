"""Hard use: scripts that try the library at a size of your choice; ``test_hard_use.py`` runs each of them small."""
