"""The networks. One alphabet of dimensions in every einsum and shape comment:

B batch, S positions of a sequence, M images of a sequence, N tokens of an image, D channels of an image token,
E width, L layers, H query heads, J key/value heads, R = H/J query heads a key/value head, K head dimension,
C cache length, F hidden width of an MLP, V vocabulary, P patches of the vision tower.
"""
