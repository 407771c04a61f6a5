#include "linear_sm90.cuh"

template kv::LinearKernel kv::linear_kernel<__half>(int, int);
