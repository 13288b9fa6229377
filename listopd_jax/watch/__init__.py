"""The page on which people watch their runs: a command, a reader of workdirs, and a server on loopback."""
