// mixer_step on the CPU: the three kernels behind one another, over buffers that stay in the caches between them.
#include "params.h"

#include <cstring>

#include "causal_conv1d/params.h"
#include "cpu/scratch.h"
#include "gated_rms_norm/params.h"
#include "state_update/params.h"

namespace nvfp4 {
namespace NVFP4_ISA {

int mixer_step(const MixerStepParams& p) {
    const auto slot = [&](i64 b) { return p.indices ? p.indices[b] : b; };
    for (i64 b = 0; b < p.batch; ++b) {
        if (slot(b) >= p.slots) return 2;
    }
    const i64 size = p.dtype == 0 ? 4 : 2, rows = p.batch * p.tokens;
    const i64 inner = p.heads * p.head_dim, shared = p.groups * p.state, channels = inner + 2 * shared;
    const i64 stride = inner + channels + p.heads;         // of a token of `projected`
    const i64 window = channels * (p.width - 1) * size;    // bytes
    static thread_local Scratch scratch;
    char* const before = static_cast<char*>(scratch.get(2 * p.batch * window + rows * (channels + inner) * size + 64));
    if (!before) return 1;
    char *const after = before + p.batch * window, *const convolved = after + p.batch * window;
    char* const scanned = convolved + rows * channels * size;
    char* const windows = static_cast<char*>(p.windows);
    const char* const projected = static_cast<const char*>(p.projected);
    const auto at = [&](i64 column) { return projected + column * size; };

    for (i64 b = 0; b < p.batch; ++b) {
        if (slot(b) >= 0) std::memcpy(before + b * window, windows + slot(b) * window, static_cast<size_t>(window));
        else std::memset(before + b * window, 0, static_cast<size_t>(window));
    }
    CausalConv1dParams conv{};
    conv.dtype = conv.initial_dtype = p.dtype;
    conv.tokens = rows, conv.channels = channels, conv.sequences = p.batch;
    conv.width = p.width, conv.silu = true, conv.threads = p.threads;
    conv.x = at(inner), conv.x_row = p.tokens * stride, conv.x_token = stride;
    conv.taps = p.taps, conv.bias = p.conv_bias;
    conv.initial = before, conv.y = convolved, conv.state = after;
    if (const int status = causal_conv1d(conv)) return status;

    const auto part = [&](i64 column, i64 head) {
        return ScanView{convolved + column * size, p.dtype, p.tokens * channels, channels, head};
    };
    StateUpdateParams update{};
    update.batch = p.batch, update.tokens = p.tokens, update.heads = p.heads, update.groups = p.groups;
    update.head_dim = p.head_dim, update.state = p.state, update.slots = p.slots, update.state_dtype = p.state_dtype;
    update.states = {p.states, p.heads * p.head_dim * p.state, 0, p.head_dim * p.state, p.state};
    update.x = part(0, p.head_dim), update.B = part(inner, p.state), update.C = part(inner + shared, p.state);
    update.dt = {at(inner + channels), p.dtype, p.tokens * stride, stride, 1};
    update.A = p.A, update.D = p.D, update.dt_bias = p.dt_bias, update.dt_softplus = true;
    update.low = p.low, update.high = p.high, update.indices = p.indices;
    update.y = scanned, update.threads = p.threads;
    if (const int status = state_update(update)) return status;

    for (i64 b = 0; b < p.batch; ++b) {
        if (slot(b) >= 0) std::memcpy(windows + slot(b) * window, after + b * window, static_cast<size_t>(window));
    }
    GatedRmsNormParams norm{};
    norm.dtype = p.dtype, norm.rows = rows, norm.channels = inner, norm.group = inner / p.groups;
    norm.gate = Gate::before_norm, norm.eps = p.eps, norm.weight = p.norm_weight, norm.threads = p.threads;
    norm.x = scanned, norm.x_stride = inner, norm.z = projected, norm.z_stride = stride, norm.y = p.y;
    return gated_rms_norm(norm);
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4
