// Functions that the processor and the GPU share carry CLF_HD.
#pragma once

#ifdef __CUDACC__
#define CLF_HD __host__ __device__
#else
#define CLF_HD
#endif
