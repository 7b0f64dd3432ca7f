"""The command line of the lm-evaluation-harness, which then knows the model "skvq"."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Runs lm_eval; what the user got wrong is one line and exit code 2."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        sys.stderr.write(
            f"skvq: {error}. The evaluation harness is not installed: "
            "pip install 'skvq_ext[lm-eval]'.\n"
        )
        sys.exit(2)
    import skvq_ext.lm_eval  # noqa: F401  registers the model

    try:
        cli_evaluate()
    except (ValueError, OSError, NotImplementedError) as error:
        if os.environ.get("SKVQ_TRACEBACK"):
            raise
        sys.stderr.write(f"skvq: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
