"""`python -m service` is `quire`."""

import sys

from service.cli.main import main

sys.exit(main())
