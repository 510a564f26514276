"""``python -m modeling_mtpf.cli`` is ``mtpf``; so are ``accelerate launch -m`` and ``torchrun -m``."""

import sys

from .main import main

sys.exit(main())
