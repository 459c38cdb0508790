"""What `make bench` measures: training of the tiny model, a whole model, one block with latent attention and experts; and a GPU."""

import torch

from . import blocks, gpu, models, tiny

tiny.main()
print()
models.main()
print()
blocks.main()
if torch.cuda.is_available():
    print()
    gpu.main()
