// What the files of csrc/bindings*.cpp share.
#pragma once
#include <pybind11/pybind11.h>

#include "matmul/params.h"

namespace nvfp4 {

template <class T>
T* pointer(u64 address) {
    return reinterpret_cast<T*>(address);
}

// (kind, data, scales, global_scale, rows, cols, row_stride, col_stride)
inline Operand operand(const pybind11::tuple& t) {
    const Kind kind = static_cast<Kind>(t[0].cast<int>());
    return {kind, pointer<const void>(t[1].cast<u64>()), pointer<const u8>(t[2].cast<u64>()),
            pointer<const float>(t[3].cast<u64>()), t[4].cast<i64>(), t[5].cast<i64>(), t[6].cast<i64>(), t[7].cast<i64>()};
}

void bind_steps(pybind11::module_& m);

}  // namespace nvfp4
