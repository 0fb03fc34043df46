"""`python -m ckptcoord.cli`."""

import sys

from ckptcoord.cli.app import main

sys.exit(main())
