// All that NvInfer.h takes from CUDA: names of two opaque types. So the plugins build where there is no CUDA toolkit.
#pragma once

using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;
