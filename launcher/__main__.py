"""``python -m acb.launcher``: the launcher without its shell script."""

import sys

from acb.launcher.main import main

sys.exit(main())
