"""The ATen ops that programs may hold, by name: functions of their arguments that check these, and nothing else.

A program may come from anyone, and torch has pure ops that return what was in memory before (`empty`), read or write
beyond a tensor's end, or read files. So ops are named one by one. `aropt.ir.verify.op_problem` asks this list at
capture too: what can be captured can be read again.
"""

from __future__ import annotations

POINTWISE = """
abs acos acosh add addcdiv addcmul angle arccos arccosh arcsin arcsinh arctan arctan2 arctanh asin asinh atan atan2
atanh bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil celu clamp clamp_max
clamp_min clip conj complex copysign cos cosh deg2rad digamma div divide elu eq erf erfc erfinv exp exp2 expm1
float_power floor floor_divide fmax fmin fmod frac ge gelu glu greater greater_equal gt hardshrink hardsigmoid
hardswish hardtanh heaviside hypot imag isclose isfinite isinf isnan isneginf isposinf ldexp le leaky_relu lerp less
less_equal lgamma log log10 log1p log2 log_sigmoid logaddexp logaddexp2 logical_and logical_not logical_or logical_xor
logit lt masked_fill maximum minimum mish mul multiply nan_to_num ne neg negative nextafter not_equal polar positive
pow prelu rad2deg real reciprocal relu relu6 remainder round rsqrt rsub selu sgn sigmoid sign signbit silu sin sinc
sinh softplus softshrink special_erf special_expit special_log_softmax special_softmax sqrt square sub subtract tan
tanh threshold true_divide trunc where xlogy __and__ __lshift__ __or__ __rshift__ __xor__
"""
SHAPES = """
_conj _shape_as_tensor _to_copy _unsafe_view alias arange atleast_1d atleast_2d atleast_3d broadcast_tensors
broadcast_to cat chunk clone concat concatenate constant_pad_nd contiguous copy detach diag diag_embed diagonal expand
expand_as eye fill flatten flip fliplr flipud full full_like gather hstack index index_add index_copy index_fill
index_put index_select item lift_fresh lift_fresh_copy linspace masked_scatter meshgrid movedim moveaxis mT narrow
new_full new_ones new_zeros numpy_T one_hot ones ones_like pad permute pixel_shuffle pixel_unshuffle reflection_pad1d
reflection_pad2d repeat repeat_interleave replication_pad1d replication_pad2d reshape reshape_as roll rot90
scalar_tensor scatter scatter_add scatter_reduce select select_scatter slice slice_scatter split split_with_sizes
squeeze stack swapaxes swapdims sym_numel sym_size t take_along_dim tensor_split tile to transpose tril tril_indices
triu triu_indices type_as unbind unflatten unfold unsqueeze view view_as view_as_complex view_as_real vstack zeros
zeros_like
"""
REDUCTIONS = """
_log_softmax _softmax all amax amin aminmax any argmax argmin argsort bucketize count_nonzero cosine_similarity cummax
cummin cumprod cumsum diff kthvalue linalg_norm linalg_vector_norm log_softmax logcumsumexp logsumexp max mean median
min nanmean nansum norm prod searchsorted softmax sort std std_mean sum topk trapezoid var var_mean
"""
PRODUCTS = """
_fused_rms_norm _native_batch_norm_legit_no_training _adaptive_avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d
adaptive_max_pool1d addbmm addmm addmv addr alpha_dropout avg_pool1d avg_pool2d baddbmm batch_norm bilinear bmm conv1d
conv2d conv3d conv_transpose1d conv_transpose2d convolution cross dot dropout einsum embedding feature_dropout fft_fft
fft_fft2 fft_fftn fft_ifft fft_ifft2 fft_irfft fft_rfft _fft_c2c _fft_r2c ger group_norm inner instance_norm kron
layer_norm linalg_cross linalg_multi_dot linear matmul max_pool1d max_pool2d mm mv native_dropout native_group_norm
native_layer_norm outer rms_norm scaled_dot_product_attention tensordot upsample_bilinear2d upsample_linear1d
upsample_nearest1d upsample_nearest2d
"""
ATEN = frozenset(f"{POINTWISE} {SHAPES} {REDUCTIONS} {PRODUCTS}".split())
