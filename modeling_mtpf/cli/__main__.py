"""``python -m modeling_mtpf.cli`` is ``mtpf``."""

import sys

from .main import main

sys.exit(main())
