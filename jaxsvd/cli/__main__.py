"""python -m jaxsvd.cli COMMAND …"""

import sys

from jaxsvd.cli import main

sys.exit(main())
