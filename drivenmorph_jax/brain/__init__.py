"""Brain: is an image a whole head or a stripped brain, and where in a head is the brain."""
