"""`python -m ckptcoord.cli`."""

import sys

from ckptcoord.cli import main

sys.exit(main())
