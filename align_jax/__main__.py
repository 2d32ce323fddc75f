import sys

from align_jax.main import main

sys.exit(main())
