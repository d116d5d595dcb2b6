// Compile-only: every definition of csrc/numerics instantiated in a kernel, so that nvcc checks the headers for each target.
#include "numerics/block_scale.h"
#include "numerics/hadamard.h"
#include "numerics/mxfp8.h"
#include "numerics/philox.h"

using namespace nvfp4;

__global__ void quantize_blocks(const float* x, unsigned char* codes, unsigned char* scales, float amax, u64 seed, u64 offset) {
    const u32 block = blockIdx.x * blockDim.x + threadIdx.x;
    F32x1 v[16];
    for (int i = 0; i < 16; ++i) v[i] = F32x1(x[16 * block + i]);
    hadamard16(v, 0xD7E8u);
    F32x1 most(0.0f);
    for (int i = 0; i < 16; ++i) most = greatest(most, magnitude(v[i]));
    const TensorScale s = tensor_scale(amax, 448.0f);
    U32x1 six, four;
    block_scale_candidates(most, s, six, four);
    const U32x1 scale = select(less(most, F32x1(1.0f)), block_scale(most, s), six) | four;
    const F32x1 enc = block_encode<F32x1>(scale, s);
    const Draw<U32x1> draw = philox(U32x1(block), U32x1(0u), offset, seed);
    for (int i = 0; i < 16; ++i) {
        const F32x1 e = block_error(v[i], e4m3_decode<F32x1>(scale), enc, s);
        codes[16 * block + i] = static_cast<unsigned char>((e2m1_stochastic(v[i] * enc, random_byte(draw, i)) ^ e2m1_nearest(e)).v);
    }
    const U32x1 exponent = e8m0_encode(most);
    scales[block] = static_cast<unsigned char>((scale ^ e4m3_encode(v[0] * e8m0_inverse<F32x1>(exponent)) ^
                                                bits(e8m0_decode<F32x1>(exponent)) ^ bits(e2m1_decode<F32x1>(scale))).v);
}
