// The Python face of csrc: one function an op; pointers as integers, sizes, strides; the status comes back (0, or 1 when
// memory ran out). nvfp4_kernels/ops/<op>/native.py calls these after op.py has checked everything.
#include "bindings.h"
#include "causal_conv1d/params.h"
#include "cpu/isa.h"
#include "dequantize/params.h"
#include "expert_mlp/params.h"
#include "gated_rms_norm/params.h"
#include "hadamard/params.h"
#include "permute/params.h"
#include "quantize/params.h"
#include "relu2/params.h"
#include "route/params.h"
#include "router_logits/params.h"
#include "state_update/params.h"

namespace py = pybind11;
using namespace nvfp4;

namespace {

// (block, stochastic, four_over_six, hadamard, codes, scales, global_scale)
QuantizeForm form(const py::tuple& t, u64 seed, u64 offset) {
    return {static_cast<Block>(t[0].cast<int>()), t[1].cast<bool>(), static_cast<FourOverSix>(t[2].cast<int>()),
            t[3].cast<i32>(), pointer<u8>(t[4].cast<u64>()), pointer<u8>(t[5].cast<u64>()),
            pointer<float>(t[6].cast<u64>()), seed, offset};
}

// stack: (matrices, stride). groups: (offsets, starts, how many, blocks of a line, which row of x each of their rows is or 0),
// offsets 0: none. noise: pointer to int64 [2], (seed, offset), or 0. The column form's draws come after the row form's.
// amax: pointer to fp32, or 0; turned: whether it has the transforms' too.
int call_quantize(u64 x, int dtype, i64 rows, i64 cols, i64 row_stride, i64 col_stride, const py::tuple& stack,
                  const py::tuple& groups, const py::tuple& row, const py::tuple& col, u64 noise, u64 amax, bool turned,
                  int threads) {
    const u64* state = pointer<const u64>(noise);
    const u64 seed = state ? state[0] : 0, offset = state ? state[1] : 0;
    QuantizeParams p{pointer<const void>(x), dtype, rows, cols, row_stride, col_stride, form(row, seed, offset),
                     form(col, seed, offset), threads};
    p.col.offset += p.row.stochastic ? 1 : 0;
    p.matrices = stack[0].cast<i64>(), p.matrix_stride = stack[1].cast<i64>();
    p.offsets = pointer<const i64>(groups[0].cast<u64>()), p.starts = pointer<const i64>(groups[1].cast<u64>());
    p.groups = groups[2].cast<i64>(), p.col.line = groups[3].cast<i64>();
    p.row_index = pointer<const i64>(groups[4].cast<u64>()), p.amax = pointer<const u32>(amax), p.turned = turned;
    const py::gil_scoped_release release;
    return NVFP4_CALL(quantize, p);
}

int call_dequantize(u64 codes, u64 scales, u64 global_scale, u64 out, int out_dtype, i64 rows, i64 cols, int threads) {
    const DequantizeParams p{pointer<const u8>(codes), pointer<const u8>(scales), pointer<const float>(global_scale),
                             pointer<void>(out), out_dtype, rows, cols, threads};
    const py::gil_scoped_release release;
    return NVFP4_CALL(dequantize, p);
}

int call_hadamard(u64 x, int dtype, i64 rows, i64 cols, i64 row_stride, i64 col_stride, u32 signs, u64 out, int threads) {
    const HadamardParams p{pointer<const void>(x), dtype, rows, cols, row_stride, col_stride, signs, pointer<u16>(out), threads};
    const py::gil_scoped_release release;
    return NVFP4_CALL(hadamard, p);
}

int call_matmul(const py::tuple& a, const py::tuple& b, u64 bias, int bias_dtype, u64 out, int out_dtype, bool accumulate,
                int threads) {
    const MatmulParams p{operand(a), operand(b), pointer<const void>(bias), bias_dtype, pointer<void>(out), out_dtype,
                         accumulate, false, threads};
    const py::gil_scoped_release release;
    return NVFP4_CALL_BF16(matmul, p);
}

// b_stride: in values, between the groups; relu2: of the result
GroupedMatmulParams groups(const Operand& a, const py::tuple& b, i64 b_stride, u64 offsets, i64 count, bool sums, u64 out,
                           int out_dtype, bool relu2, int threads) {
    return {a, operand(b), pointer<const i64>(offsets), count, b_stride, sums, pointer<void>(out), out_dtype, relu2, threads};
}

// starts: of a and b, where they are columns of groups; else 0. gathered: how many rows, and which of a (of b's columns, where
// sums are divided) each of them is; empty where they are not gathered
// squares: (h, relu2(h), weights, dweights, amax, turned, signs), 0 for those that are not there
int call_grouped_matmul(const py::tuple& a, const py::tuple& b, i64 b_stride, const py::tuple& starts, const py::tuple& gathered,
                        u64 offsets, i64 count, bool sums, u64 out, int out_dtype, const py::tuple& squares, int threads) {
    GroupedMatmulParams p = groups(operand(a), b, b_stride, offsets, count, sums, out, out_dtype, false, threads);
    p.a_starts = pointer<const i64>(starts[0].cast<u64>()), p.b_starts = pointer<const i64>(starts[1].cast<u64>());
    if (!gathered.empty()) {
        (sums ? p.b.cols : p.a.rows) = gathered[0].cast<i64>();
        (sums ? p.b.col_index : p.a.row_index) = pointer<const i64>(gathered[1].cast<u64>());
    }
    const auto at = [&](int i) { return squares[i].cast<u64>(); };
    const u32 signs = static_cast<u32>(at(6));
    const Squares made{pointer<const void>(at(0)), pointer<void>(at(1)), pointer<const float>(at(2)), nullptr, nullptr, nullptr, signs};
    p.squares = made.h || made.made ? &made : nullptr, p.dweights = pointer<float>(at(3));
    p.amax = pointer<u32>(at(4)), p.turned = pointer<float>(at(5));
    const py::gil_scoped_release release;
    return NVFP4_CALL_BF16(grouped_matmul, p);
}

// rooms: rows sorted by expert: the token of each, int64, the hidden values, of x's type, the outputs, fp32
int call_expert_mlp(const py::tuple& x, const py::tuple& up, i64 up_stride, const py::tuple& down, i64 down_stride,
                    const py::tuple& routing, const py::tuple& rooms, u64 out, int threads) {
    const auto at = [](const py::tuple& t, int i) { return t[i].cast<u64>(); };
    const i64 count = routing[0].cast<i64>(), top_k = routing[1].cast<i64>();
    const u64 offsets = at(routing, 2);
    Operand tokens = operand(x);
    const i64 rows = tokens.rows * top_k;
    const int dtype = static_cast<int>(tokens.kind);
    ExpertMlpParams p{};
    p.top_k = top_k, p.token = pointer<i64>(at(rooms, 0)), p.out = pointer<void>(out), p.threads = threads;
    p.inverse = pointer<const i64>(at(routing, 3)), p.order = pointer<const i64>(at(routing, 4));
    p.weights = pointer<const float>(at(routing, 5));
    tokens.rows = rows, tokens.row_index = p.token;
    p.up = groups(tokens, up, up_stride, offsets, count, false, at(rooms, 1), dtype, true, threads);
    const i64 width = p.up.b.rows;
    const Operand hidden{tokens.kind, p.up.out, nullptr, nullptr, rows, width, width, 1};
    p.down = groups(hidden, down, down_stride, offsets, count, false, at(rooms, 2), 0, false, threads);
    const py::gil_scoped_release release;
    return NVFP4_CALL_BF16(expert_mlp, p);
}

// sizes: (tokens, experts, top_k, groups, top_groups); made: (indices, weights, offsets, inverse, order), none for backward
RouteParams routing(u64 logits, u64 bias, const py::tuple& sizes, float scale, bool normalize, const py::tuple& made, int threads) {
    RouteParams p{};
    p.logits = pointer<const float>(logits), p.bias = pointer<const float>(bias);
    p.tokens = sizes[0].cast<i64>(), p.experts = sizes[1].cast<i64>(), p.top_k = sizes[2].cast<i64>();
    p.groups = sizes[3].cast<i64>(), p.top_groups = sizes[4].cast<i64>();
    p.scale = scale, p.normalize = normalize, p.threads = threads;
    if (made.empty()) return p;
    const auto integers = [&](int i) { return pointer<i64>(made[i].cast<u64>()); };
    p.indices = integers(0), p.weights = pointer<float>(made[1].cast<u64>());
    p.offsets = integers(2), p.inverse = integers(3), p.order = integers(4);
    return p;
}

int call_route(u64 logits, u64 bias, const py::tuple& sizes, float scale, bool normalize, const py::tuple& made, int threads) {
    const RouteParams p = routing(logits, bias, sizes, scale, normalize, made, threads);
    const py::gil_scoped_release release;
    return NVFP4_CALL(route, p);
}

int call_route_backward(u64 logits, u64 bias, const py::tuple& sizes, float scale, bool normalize, u64 dweights, u64 dlogits,
                        int threads) {
    const RouteBackwardParams p{routing(logits, bias, sizes, scale, normalize, py::tuple(), threads),
                                pointer<const float>(dweights), pointer<float>(dlogits)};
    const py::gil_scoped_release release;
    return NVFP4_CALL(route_backward, p);
}

// sizes: (dtype, tokens, top_k, features); routing: (order, inverse, weights or 0)
PermuteParams slots(const py::tuple& sizes, const py::tuple& routing, u64 rows, int threads) {
    PermuteParams p{};
    p.dtype = sizes[0].cast<int>(), p.tokens = sizes[1].cast<i64>(), p.top_k = sizes[2].cast<i64>();
    p.features = sizes[3].cast<i64>(), p.rows = pointer<void>(rows), p.threads = threads;
    p.order = pointer<const i64>(routing[0].cast<u64>()), p.inverse = pointer<const i64>(routing[1].cast<u64>());
    p.weights = pointer<const float>(routing[2].cast<u64>());
    return p;
}

int call_permute(const py::tuple& sizes, const py::tuple& routing, u64 x, i64 row_stride, u64 rows, int threads) {
    PermuteParams p = slots(sizes, routing, rows, threads);
    p.x = pointer<const void>(x), p.row_stride = row_stride;
    const py::gil_scoped_release release;
    return NVFP4_CALL(permute, p);
}

int call_unpermute(const py::tuple& sizes, const py::tuple& routing, u64 rows, u64 out, int threads) {
    PermuteParams p = slots(sizes, routing, rows, threads);
    p.out = pointer<void>(out);
    const py::gil_scoped_release release;
    return NVFP4_CALL(unpermute, p);
}

int call_unpermute_backward(const py::tuple& sizes, const py::tuple& routing, u64 rows, u64 dout, u64 drows, u64 dweights,
                            int threads) {
    PermuteParams p = slots(sizes, routing, rows, threads);
    p.dout = pointer<const void>(dout), p.drows = pointer<void>(drows), p.dweights = pointer<float>(dweights);
    const py::gil_scoped_release release;
    return NVFP4_CALL(unpermute_backward, p);
}

// sizes: (dtype, rows, features)
Relu2Params squares(const py::tuple& sizes, u64 x, u64 weights, int threads) {
    return {pointer<const void>(x), pointer<const float>(weights), sizes[1].cast<i64>(), sizes[2].cast<i64>(),
            sizes[0].cast<int>(), nullptr, nullptr, nullptr, nullptr, threads};
}

int call_relu2(const py::tuple& sizes, u64 x, u64 weights, u64 y, int threads) {
    Relu2Params p = squares(sizes, x, weights, threads);
    p.y = pointer<void>(y);
    const py::gil_scoped_release release;
    return NVFP4_CALL(relu2, p);
}

int call_relu2_backward(const py::tuple& sizes, u64 x, u64 weights, u64 dy, u64 dx, u64 dweights, int threads) {
    Relu2Params p = squares(sizes, x, weights, threads);
    p.dy = pointer<const void>(dy), p.dx = pointer<void>(dx), p.dweights = pointer<float>(dweights);
    const py::gil_scoped_release release;
    return NVFP4_CALL(relu2_backward, p);
}

// x: (data, dtype, stride); sizes: (tokens, hidden, experts)
RouterLogitsParams router(const py::tuple& x, u64 weight, const py::tuple& sizes, int threads) {
    RouterLogitsParams p{};
    p.x = pointer<const void>(x[0].cast<u64>()), p.dtype = x[1].cast<int>(), p.stride = x[2].cast<i64>();
    p.weight = pointer<const float>(weight), p.threads = threads;
    p.tokens = sizes[0].cast<i64>(), p.hidden = sizes[1].cast<i64>(), p.experts = sizes[2].cast<i64>();
    return p;
}

int call_router_logits(const py::tuple& x, u64 weight, const py::tuple& sizes, u64 logits, int threads) {
    RouterLogitsParams p = router(x, weight, sizes, threads);
    p.logits = pointer<float>(logits);
    const py::gil_scoped_release release;
    return NVFP4_CALL(router_logits, p);
}

int call_router_logits_backward(const py::tuple& x, u64 weight, const py::tuple& sizes, u64 dlogits, u64 dx, u64 dweight,
                                int threads) {
    RouterLogitsParams p = router(x, weight, sizes, threads);
    p.dlogits = pointer<const float>(dlogits), p.dx = pointer<void>(dx), p.dweight = pointer<float>(dweight);
    const py::gil_scoped_release release;
    return NVFP4_CALL(router_logits_backward, p);
}

// (data, dtype, row_stride, token_stride, head_stride)
ScanView view(const py::handle& h) {
    const auto t = h.cast<py::tuple>();
    return {pointer<const void>(t[0].cast<u64>()), t[1].cast<int>(), t[2].cast<i64>(), t[3].cast<i64>(), t[4].cast<i64>()};
}

// inputs: (x, dt, B, C, A, D, dt_bias, initial), the first four views; sequences: pointer to int64 [count, 4];
// sizes: (rows, length, heads, groups, head_dim, state); rules: (dt_softplus, low, high, chunk_size)
ScanParams scan(const py::tuple& inputs, u64 sequences, i64 count, const py::tuple& sizes, const py::tuple& rules, int threads) {
    const auto floats = [&](int i) { return pointer<const float>(inputs[i].cast<u64>()); };
    const auto size = [&](int i) { return sizes[i].cast<i64>(); };
    return {view(inputs[0]), view(inputs[1]), view(inputs[2]), view(inputs[3]), floats(4), floats(5), floats(6), floats(7),
            pointer<const ScanSequence>(sequences), count, size(0), size(1), size(2), size(3), size(4), size(5),
            rules[0].cast<bool>(), rules[1].cast<float>(), rules[2].cast<float>(), rules[3].cast<i64>(), nullptr, nullptr, threads};
}

int call_selective_scan(const py::tuple& inputs, u64 sequences, i64 count, const py::tuple& sizes, const py::tuple& rules, u64 y,
                        u64 last, int threads) {
    ScanParams p = scan(inputs, sequences, count, sizes, rules, threads);
    p.y = pointer<void>(y);
    p.last = pointer<float>(last);
    const py::gil_scoped_release release;
    return NVFP4_CALL_BF16(selective_scan, p);
}

// made: (dx, ddt, dB, dC, dA, dD, ddt_bias, dinitial)
int call_selective_scan_backward(const py::tuple& inputs, u64 sequences, i64 count, const py::tuple& sizes,
                                 const py::tuple& rules, const py::tuple& dy, u64 dlast, const py::tuple& made, int threads) {
    const auto any = [&](int i) { return pointer<void>(made[i].cast<u64>()); };
    const auto floats = [&](int i) { return pointer<float>(made[i].cast<u64>()); };
    const ScanBackwardParams p{scan(inputs, sequences, count, sizes, rules, threads), view(dy), pointer<const float>(dlast),
                               any(0), any(1), any(2), any(3), floats(4), floats(5), floats(6), floats(7)};
    const py::gil_scoped_release release;
    return NVFP4_CALL_BF16(selective_scan_backward, p);
}

// (data, slot_stride, token_stride, head_stride, row_stride)
StateView states(const py::tuple& t) {
    return {pointer<void>(t[0].cast<u64>()), t[1].cast<i64>(), t[2].cast<i64>(), t[3].cast<i64>(), t[4].cast<i64>()};
}

// sizes: (batch, tokens, heads, groups, head_dim, state, slots, dtype of the states); inputs: the views x, dt, B, C, z (with
// data 0: none), then A, D, D_of_channels, dt_bias; rules: (dt_softplus, low, high); noise: as in call_quantize
int call_state_update(const py::tuple& sizes, const py::tuple& kept, const py::tuple& intermediate, const py::tuple& inputs,
                      u64 indices, const py::tuple& rules, u64 noise, u64 y, int threads) {
    const auto size = [&](int i) { return sizes[i].cast<i64>(); };
    const auto floats = [&](int i) { return pointer<const float>(inputs[i].cast<u64>()); };
    const u64* drawn = pointer<const u64>(noise);
    const StateUpdateParams p{size(0), size(1), size(2), size(3), size(4), size(5), size(6), sizes[7].cast<int>(), states(kept),
                              states(intermediate), view(inputs[0]), view(inputs[1]), view(inputs[2]), view(inputs[3]),
                              view(inputs[4]), floats(5), floats(6), inputs[7].cast<bool>(), floats(8),
                              pointer<const i64>(indices), rules[0].cast<bool>(), rules[1].cast<float>(), rules[2].cast<float>(),
                              drawn != nullptr, drawn ? drawn[0] : 0, drawn ? drawn[1] : 0, pointer<void>(y), threads};
    const py::gil_scoped_release release;
    return NVFP4_CALL(state_update, p);
}

// x, z, dy: (pointer, row stride); z with pointer 0: none
GatedRmsNormParams norm(int dtype, i64 rows, i64 channels, i64 group, float eps, bool norm_before_gate, const py::tuple& x,
                        const py::tuple& z, u64 weight, int threads) {
    GatedRmsNormParams p{};
    p.dtype = dtype, p.rows = rows, p.channels = channels, p.group = group, p.eps = eps, p.threads = threads;
    p.x = pointer<const void>(x[0].cast<u64>()), p.x_stride = x[1].cast<i64>();
    p.z = pointer<const void>(z[0].cast<u64>()), p.z_stride = z[1].cast<i64>();
    p.gate = !p.z ? Gate::none : norm_before_gate ? Gate::after_norm : Gate::before_norm;
    p.weight = pointer<const float>(weight);
    return p;
}

int call_gated_rms_norm(int dtype, i64 rows, i64 channels, i64 group, float eps, bool norm_before_gate, const py::tuple& x,
                        const py::tuple& z, u64 weight, u64 y, int threads) {
    GatedRmsNormParams p = norm(dtype, rows, channels, group, eps, norm_before_gate, x, z, weight, threads);
    p.y = pointer<void>(y);
    const py::gil_scoped_release release;
    return NVFP4_CALL(gated_rms_norm, p);
}

int call_gated_rms_norm_backward(int dtype, i64 rows, i64 channels, i64 group, float eps, bool norm_before_gate,
                                 const py::tuple& x, const py::tuple& z, u64 weight, const py::tuple& dy, u64 dx, u64 dz,
                                 u64 dweight, int threads) {
    GatedRmsNormParams p = norm(dtype, rows, channels, group, eps, norm_before_gate, x, z, weight, threads);
    p.dy = pointer<const void>(dy[0].cast<u64>()), p.dy_stride = dy[1].cast<i64>();
    p.dx = pointer<void>(dx), p.dz = pointer<void>(dz), p.dweight = pointer<float>(dweight);
    const py::gil_scoped_release release;
    return NVFP4_CALL(gated_rms_norm_backward, p);
}

// sizes: (dtype, tokens, channels, sequences, width, silu); x, dy: (pointer, row stride, token stride); initial: (pointer, dtype)
CausalConv1dParams convolution(const py::tuple& sizes, u64 starts, const py::tuple& x, u64 taps, u64 bias,
                               const py::tuple& initial, int threads) {
    CausalConv1dParams p{};
    p.dtype = sizes[0].cast<int>(), p.tokens = sizes[1].cast<i64>(), p.channels = sizes[2].cast<i64>();
    p.sequences = sizes[3].cast<i64>(), p.width = sizes[4].cast<int>(), p.silu = sizes[5].cast<bool>();
    p.starts = pointer<const i64>(starts), p.threads = threads;
    p.x = pointer<const void>(x[0].cast<u64>()), p.x_row = x[1].cast<i64>(), p.x_token = x[2].cast<i64>();
    p.taps = pointer<const float>(taps), p.bias = pointer<const float>(bias);
    p.initial = pointer<const void>(initial[0].cast<u64>()), p.initial_dtype = initial[1].cast<int>();
    return p;
}

int call_causal_conv1d(const py::tuple& sizes, u64 starts, const py::tuple& x, u64 taps, u64 bias, const py::tuple& initial,
                       u64 y, u64 state, int threads) {
    CausalConv1dParams p = convolution(sizes, starts, x, taps, bias, initial, threads);
    p.y = pointer<void>(y), p.state = pointer<void>(state);
    const py::gil_scoped_release release;
    return NVFP4_CALL(causal_conv1d, p);
}

int call_causal_conv1d_backward(const py::tuple& sizes, u64 starts, const py::tuple& x, u64 taps, u64 bias,
                                const py::tuple& initial, const py::tuple& dy, u64 dstate, u64 dx, u64 dtaps, u64 dinitial,
                                int threads) {
    CausalConv1dParams p = convolution(sizes, starts, x, taps, bias, initial, threads);
    p.dy = pointer<const void>(dy[0].cast<u64>()), p.dy_row = dy[1].cast<i64>(), p.dy_token = dy[2].cast<i64>();
    p.dstate = pointer<const void>(dstate), p.dx = pointer<void>(dx);
    p.dtaps = pointer<float>(dtaps), p.dinitial = pointer<float>(dinitial);
    const py::gil_scoped_release release;
    return NVFP4_CALL(causal_conv1d_backward, p);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "CPU kernels of nvfp4_kernels: plain pointers, no torch. Call them through nvfp4_kernels.ops.";
    m.def("quantize", &call_quantize);
    m.def("dequantize", &call_dequantize);
    m.def("hadamard", &call_hadamard);
    m.def("matmul", &call_matmul);
    m.def("grouped_matmul", &call_grouped_matmul);
    m.def("expert_mlp", &call_expert_mlp);
    m.def("permute", &call_permute);
    m.def("unpermute", &call_unpermute);
    m.def("unpermute_backward", &call_unpermute_backward);
    m.def("relu2", &call_relu2);
    m.def("relu2_backward", &call_relu2_backward);
    m.def("route", &call_route);
    m.def("route_backward", &call_route_backward);
    m.def("router_logits", &call_router_logits);
    m.def("router_logits_backward", &call_router_logits_backward);
    m.def("selective_scan", &call_selective_scan);
    m.def("selective_scan_backward", &call_selective_scan_backward);
    m.def("state_update", &call_state_update);
    m.def("gated_rms_norm", &call_gated_rms_norm);
    m.def("gated_rms_norm_backward", &call_gated_rms_norm_backward);
    m.def("causal_conv1d", &call_causal_conv1d);
    m.def("causal_conv1d_backward", &call_causal_conv1d_backward);
    bind_steps(m);
    m.def("isa", &isa_name, "The instruction set in use: scalar, avx2, avx512 or avx512bf16.");
    m.def("outruns_mkl", &outruns_mkl);
    m.def("set_isa", &set_isa, "Use another one from now on; False if this CPU has it not.");
}
