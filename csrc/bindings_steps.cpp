// The Python face of what a layer does with a decoded token in one call.
#include "bindings.h"
#include "cpu/isa.h"
#include "mixer_step/params.h"
#include "moe_step/params.h"

namespace nvfp4 {
namespace {

namespace py = pybind11;

// sizes: (dtype, batch, tokens, heads, groups, head_dim, state, slots, width, dtype of the states); kept: (windows, states);
// weights: (taps, conv_bias, A, D, dt_bias, norm_weight); rules: (low, high, eps)
int call_mixer_step(const py::tuple& sizes, u64 projected, const py::tuple& kept, const py::tuple& weights, u64 indices,
                    const py::tuple& rules, u64 y, int threads) {
    const auto size = [&](int i) { return sizes[i].cast<i64>(); };
    const auto floats = [&](int i) { return pointer<const float>(weights[i].cast<u64>()); };
    const MixerStepParams p{sizes[0].cast<int>(), size(1), size(2), size(3), size(4), size(5), size(6), size(7),
                            sizes[8].cast<int>(), pointer<const void>(projected), pointer<void>(kept[0].cast<u64>()),
                            pointer<void>(kept[1].cast<u64>()), sizes[9].cast<int>(), floats(0), floats(1), floats(2),
                            floats(3), floats(4), floats(5), pointer<const i64>(indices), rules[0].cast<float>(),
                            rules[1].cast<float>(), rules[2].cast<float>(), pointer<void>(y), threads};
    const py::gil_scoped_release release;
    return NVFP4_CALL(mixer_step, p);
}

// No matrix: an empty tuple.
Operand optional(const py::handle& h) {
    const auto t = h.cast<py::tuple>();
    return t.empty() ? Operand{} : operand(t);
}

// router: (weight, bias or 0, experts); stacks: (up, up_stride, down, down_stride), strides in values from expert to expert;
// others: (fc1, fc2, shared_up, shared_down), empty tuples where there is none; choice: (top_k, groups, top_groups)
int call_moe_step(const py::tuple& x, const py::tuple& router, const py::tuple& stacks, const py::tuple& others,
                  const py::tuple& choice, float scale, bool normalize, u64 out, int threads) {
    const auto size = [](const py::tuple& t, int i) { return t[i].cast<i64>(); };
    const MoeStepParams p{operand(x), pointer<const float>(router[0].cast<u64>()), pointer<const float>(router[1].cast<u64>()),
                          size(router, 2), size(choice, 0), size(choice, 1), size(choice, 2), scale, normalize,
                          optional(stacks[0]), optional(stacks[2]), size(stacks, 1), size(stacks, 3), optional(others[0]),
                          optional(others[1]), optional(others[2]), optional(others[3]), pointer<void>(out), threads};
    const py::gil_scoped_release release;
    return NVFP4_CALL_BF16(moe_step, p);
}

}  // namespace

void bind_steps(py::module_& m) {
    m.def("mixer_step", &call_mixer_step);
    m.def("moe_step", &call_moe_step);
}

}  // namespace nvfp4
