"""``rocket-fast`` and ``python -m rocket_fast``: run a command, turn errors meant for people into one line."""

from __future__ import annotations

import sys

from rocket_fast.errors import Failed, InvalidArgument, MissingExtra, optional_import

USER_ERROR, FAILED, INTERRUPTED = 2, 1, 128


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0; 1 for a run that failed; 2 for an error of the user's; 128 + signal when stopped and saved."""
    try:
        for module in ("tyro", "rich"):
            optional_import(module, "train")
        from rocket_fast.cli import dispatch
        from rocket_fast.trainer import Interrupted
    except MissingExtra as error:
        print(f"rocket-fast: {error}", file=sys.stderr)
        return USER_ERROR
    try:
        dispatch(sys.argv[1:] if arguments is None else arguments)
    except (InvalidArgument, MissingExtra) as error:
        print(f"rocket-fast: {error}", file=sys.stderr)
        return USER_ERROR
    except (Failed, PermissionError) as error:
        print(f"rocket-fast: {error}", file=sys.stderr)
        return FAILED
    except Interrupted as stop:
        print(f"rocket-fast: {stop}", file=sys.stderr)
        return INTERRUPTED + stop.signum
    return 0


if __name__ == "__main__":
    sys.exit(main())
