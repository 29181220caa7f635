"""``python -m acb.cli.acb``, for when the command itself is not on the path."""

import sys

from acb.cli.acb import main

sys.exit(main())
