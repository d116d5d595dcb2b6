// moe_step on the CPU: the kernels of the parts behind one another, over buffers that stay in the caches between them.
#include "params.h"

#include <type_traits>

#include "cpu/runs.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"
#include "expert_mlp/params.h"
#include "relu2/params.h"
#include "route/params.h"
#include "router_logits/params.h"

namespace nvfp4 {
namespace NVFP4_ISA {

#if defined(NVFP4_ISA_AVX512BF16)  // the ops without use for bf16 dot products
using avx512::relu2;
using avx512::route;
using avx512::router_logits;
#endif

int moe_step(const MoeStepParams& p) {
    const DefaultFloats floats;
    const int dtype = static_cast<int>(p.x.kind);
    const i64 bytes = dtype == fp32 ? 4 : 2, tokens = p.x.rows, hidden = p.x.cols, slots = tokens * p.top_k;
    const i64 size = p.down.rows, width = p.up.rows, shared = p.shared_up.data ? p.shared_up.rows : 0;
    enum { logits, weights, indices, offsets, inverse, order, token, middle, made, inner, mixed, squared, beside, rooms };
    const i64 lengths[rooms] = {tokens * p.experts * 4, slots * 4, slots * 8, (p.experts + 1) * 8, slots * 8, slots * 8, slots * 8,
                                slots * width * bytes, slots * size * 4, tokens * size * bytes, tokens * size * bytes,
                                tokens * shared * bytes, tokens * hidden * bytes};
    i64 all = 0;
    for (const i64 length : lengths) all += (length + 63) / 64 * 64;
    static thread_local Scratch scratch;
    char* at = static_cast<char*>(scratch.get(all));
    if (!at) return 1;
    void* room[rooms];
    for (int i = 0; i < rooms; ++i) room[i] = at, at += (lengths[i] + 63) / 64 * 64;
    const auto floats_of = [&](int i) { return static_cast<float*>(room[i]); };
    const auto integers = [&](int i) { return static_cast<i64*>(room[i]); };
    const auto plain = [&](void* data, i64 rows, i64 cols) { return Operand{p.x.kind, data, nullptr, nullptr, rows, cols, cols, 1}; };
    const i64 one_group[2] = {0, tokens};
    const auto product = [&](const Operand& a, const Operand& b, void* out) {
        return grouped_matmul({a, b, one_group, 1, 0, false, out, dtype, false, p.threads});
    };

    RouterLogitsParams scores{};
    scores.x = p.x.data, scores.weight = p.router, scores.tokens = tokens, scores.hidden = hidden, scores.experts = p.experts;
    scores.stride = p.x.row_stride, scores.dtype = dtype, scores.logits = floats_of(logits), scores.threads = p.threads;
    if (const int status = router_logits(scores)) return status;
    const RouteParams choice{floats_of(logits), p.bias, tokens, p.experts, p.top_k, p.groups, p.top_groups, p.scale, p.normalize,
                             integers(indices), floats_of(weights), integers(offsets), integers(inverse), integers(order), p.threads};
    if (const int status = route(choice)) return status;

    Operand x = p.x;
    if (p.fc1.data) {
        x = plain(room[inner], tokens, size);
        if (const int status = product(p.x, p.fc1, room[inner])) return status;
    }
    x.rows = slots, x.row_index = integers(token);
    const ExpertMlpParams experts{
        {x, p.up, integers(offsets), p.experts, p.up_stride, false, room[middle], dtype, true, p.threads},
        {plain(room[middle], slots, width), p.down, integers(offsets), p.experts, p.down_stride, false, room[made], 0, false,
         p.threads},
        p.top_k, integers(token), floats_of(weights), integers(inverse), integers(order), p.fc2.data ? room[mixed] : p.out, p.threads};
    if (const int status = expert_mlp(experts)) return status;
    if (p.fc2.data) {
        if (const int status = product(plain(room[mixed], tokens, size), p.fc2, p.out)) return status;
    }
    if (!p.shared_up.data) return 0;

    if (const int status = product(p.x, p.shared_up, room[squared])) return status;
    Relu2Params square{};
    square.x = square.y = room[squared], square.rows = tokens, square.features = shared;
    square.dtype = dtype, square.threads = p.threads;
    relu2(square);
    if (const int status = product(plain(room[squared], tokens, shared), p.shared_down, room[beside])) return status;
    with_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        T *const y = static_cast<T*>(p.out), *const other = static_cast<T*>(room[beside]);
        over(tokens * hidden, [&](i64 i, int, auto extent) { store(y + i, load(y + i, extent) + load(other + i, extent), extent); });
    });
    return 0;
}

}  // namespace NVFP4_ISA
}  // namespace nvfp4
