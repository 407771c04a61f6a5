#include "linear_persistent.cuh"

template kv::PersistentKernel kv::persistent_kernel<__nv_bfloat16>(bool, int);
