#include "linear_sm90.cuh"

template kv::LinearKernel kv::linear_kernel<__nv_bfloat16>(int, int);
