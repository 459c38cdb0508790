"""What `make bench` measures: training of the tiny model, then one block with latent attention and experts."""

from . import blocks, tiny

tiny.main()
print()
blocks.main()
