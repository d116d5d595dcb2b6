// dequantize on the CPU. Bytes a value: 0.5625 read (NVFP4), 2 or 4 written: bound by the writing.
#include "params.h"

#include <type_traits>

#include "cpu/decode.h"
#include "cpu/threads.h"

namespace nvfp4 {
namespace NVFP4_ISA {
namespace {

template <class T>
void decode_row(const DequantizeParams& p, i64 row) {
    T* out = static_cast<T*>(p.out) + row * p.cols;
    const bool mxfp8 = p.global_scale == nullptr;
    const i64 runs = mxfp8 ? (p.cols + 31) / 32 : (p.cols + 15) / 16;
    const u8* scales = p.scales + row * runs;
    const u8* codes = p.codes + row * runs * (mxfp8 ? 32 : 8);
    for (i64 c = 0; c < p.cols; c += 16) {
        F values[vectors16];
        if (mxfp8) {
            decode_e4m3(codes + c, e8m0_value(scales[c / 32]), values);
        } else {
            decode_nvfp4(codes + c / 2, e4m3_values.v[scales[c / 16]] * *p.global_scale, values);
        }
        store_some(values, out + c, static_cast<int>(p.cols - c < 16 ? p.cols - c : 16));
    }
}

}  // namespace

int dequantize(const DequantizeParams& p) {
    const i64 most = p.rows * p.cols / 32768 + 1;
    auto body = [&](int t, int n) {
        const Range rows = part(p.rows, 1, t, n);
        for (i64 r = rows.begin; r < rows.end; ++r) {
            with_dtype(p.out_dtype, [&](auto* type) { decode_row<std::remove_pointer_t<decltype(type)>>(p, r); });
        }
    };
    parallel(static_cast<int>(p.threads < most ? p.threads : most), body);
    return 0;
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4
