"""The operations of a melded layer, one a file: plain-torch reference and a thin nn.Module each.

Shape legend for all of them: T tokens, `in`/`out` features, r adapter rank, k written rows.
Knows neither Lightning nor transformers.
"""

from falqon.kernels.backbone_matmul import BackboneMatmul, backbone_matmul, joined_gradients
from falqon.kernels.compensated import Compensation, compensation, encode_compensated
from falqon.kernels.melded_matmul import MeldedMatmul, melded_matmul
from falqon.kernels.pending import pending_gradient, pending_outputs
from falqon.kernels.proxy_grad import ProxyGrad, proxy_grad
from falqon.kernels.quantize import PassThrough, Quantize
from falqon.kernels.rms_norm_quantize import RmsNormQuantize, rms_norm_grad, rms_norm_quantize
from falqon.kernels.row_update import (
    Origin,
    RowUpdate,
    RowUpdateCounts,
    RowWrite,
    row_update,
    row_updates,
)
from falqon.kernels.swiglu_quantize import SwigluQuantize, swiglu_grad, swiglu_quantize

__all__ = [
    "BackboneMatmul",
    "Compensation",
    "MeldedMatmul",
    "Origin",
    "PassThrough",
    "ProxyGrad",
    "Quantize",
    "RmsNormQuantize",
    "RowUpdate",
    "RowUpdateCounts",
    "RowWrite",
    "SwigluQuantize",
    "backbone_matmul",
    "compensation",
    "encode_compensated",
    "joined_gradients",
    "melded_matmul",
    "pending_gradient",
    "pending_outputs",
    "proxy_grad",
    "rms_norm_grad",
    "rms_norm_quantize",
    "row_update",
    "row_updates",
    "swiglu_grad",
    "swiglu_quantize",
]
