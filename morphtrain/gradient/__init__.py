"""Cheaper gradients: a module per option of the `gradient` group, each with a context for any training loop.

with ApproximateGradients("zero"):  # or SparseGradients(p=0.9)
    loss = F.cross_entropy(model(images), labels)
loss.backward()
"""

from morphtrain.gradient.approximate import ApproximateGradients
from morphtrain.gradient.patches import weight_gradient
from morphtrain.gradient.sparse_activation import SparseGradients, sparsified

__all__ = ["ApproximateGradients", "SparseGradients", "sparsified", "weight_gradient"]
