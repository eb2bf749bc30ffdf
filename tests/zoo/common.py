"""Six small images of noise, which the tests of pixel models share."""

import numpy as np

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
