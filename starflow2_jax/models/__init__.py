"""The networks. One alphabet of dimensions in every einsum and shape comment:

B batch, S positions of a sequence, M images of a sequence, N tokens of an image, D channels of an image token,
E width, L layers, H query heads, J key/value heads, R = H/J query heads a key/value head, K head dimension,
C capacity of a cache, F hidden width of an MLP, V vocabulary, P patches of the vision tower.

The slot of an image token is its place in its image, from 0 to N - 1 in raster order.
"""
