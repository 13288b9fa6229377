"""The one exception for a user's mistake: main prints its message as a single line and exits with 2."""


class UserError(Exception):
    """A mistake the user can mend. The message is one line that names the file or field and the fix."""


class Interrupted(BaseException):
    """The job stopped early on request with everything saved: main prints the message and exits with 0.

    No Exception, like KeyboardInterrupt: a signal may raise it anywhere, and it is no failure of what it cuts short.
    """
