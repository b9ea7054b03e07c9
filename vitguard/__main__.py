"""`python -m vitguard`."""

import sys

from vitguard.cli import main

sys.exit(main())
