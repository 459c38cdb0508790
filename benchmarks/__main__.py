"""What `make bench` measures: training of the tiny model, a whole model, then one block with latent attention and experts."""

from . import blocks, models, tiny

tiny.main()
print()
models.main()
print()
blocks.main()
