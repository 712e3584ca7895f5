"""Errors that are the user's to mend: printed as one line, never as a traceback."""


class UserError(Exception):
    """What is wrong, where, and what to do, in one line. Entry scripts print it and exit with status 1."""


class ConfigError(UserError):
    """A wrong flag, key, value or combination, found before anything is started. Exit status 2."""
