"""`python -m vitguard`."""

import sys

from vitguard.cli.main import main

sys.exit(main())
