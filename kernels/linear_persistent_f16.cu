#include "linear_persistent.cuh"

template kv::PersistentKernel kv::persistent_kernel<__half>(bool, int);
