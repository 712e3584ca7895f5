"""Small commands of packages that know no launcher: a user's mistake is one line and an exit status."""

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from utils.errors import ConfigError, UserError


def run_command(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Call `main` with the command line and end the process. Exit status: 0 done; 1 error; 2 wrong settings; 130 Ctrl-C."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except OSError as error:  # a full disk, a folder of somebody else's
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
