// The two opaque CUDA types that NvInfer.h needs, so that the plugins build without a CUDA toolkit.
#pragma once

using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;
