from __future__ import annotations

import sys

from vp_kernels.aot.command import main

if __name__ == "__main__":
    sys.exit(main())
