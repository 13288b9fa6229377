"""The tasks that are shipped, one file each, and how a run finds its task: by name, or in a user's own file."""
