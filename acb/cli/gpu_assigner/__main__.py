"""``python -m acb.cli.gpu_assigner``, for when the command itself is not on the path."""

import sys

from acb.cli.gpu_assigner import main

sys.exit(main())
