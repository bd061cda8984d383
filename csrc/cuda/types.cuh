// Names of types that the kernels share. No header is included, neither torch's nor CUDA's, so that NVRTC needs
// no include directory.
#pragma once

typedef long long i64;
typedef unsigned short u16;
typedef unsigned int u32;

struct bf16 { u16 bits; };
struct fp16 { u16 bits; };
typedef float f32;
typedef double f64;

#define DEVICE static __device__ __forceinline__
#define DEVICE_METHOD __device__ __forceinline__
