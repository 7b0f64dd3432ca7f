// The maps at the door.
#include "torch/tensor_ops.h"

namespace skvq::ops {
namespace {

template <class T>
const T* table(const OptionalTensor& t, const char* name, ScalarType dtype, std::int64_t heads, std::int64_t dim,
               const Place& place) {
  if (!t) return nullptr;
  check_tensor(*t, name, dtype, {heads, dim}, place);
  return t->const_data_ptr<T>();
}

void check_permutation(const std::int32_t* permutation, std::int64_t heads, std::int64_t dim) {
  if (permutation == nullptr) return;
  for (std::int64_t i = 0; i < heads * dim; ++i) {
    SKVQ_CHECK(permutation[i] >= 0 && permutation[i] < dim, "permutation of head ", i / dim, " holds ", permutation[i],
               "; channels are 0 to ", dim - 1);
  }
}

MapHeadsArgs make_args(const Tensor& x, const OptionalTensor& permutation, const OptionalTensor& shift,
                       const OptionalTensor& scale, const OptionalTensor& matrix, std::int64_t num_kv_heads,
                       const Place& place) {
  check_shape(x, "x", {-1, -1, -1});
  const std::int64_t heads = x.size(1), dim = x.size(2);
  SKVQ_CHECK(num_kv_heads > 0 && heads % num_kv_heads == 0, "x has ", heads,
             " heads; expected a multiple of num_kv_heads ", num_kv_heads);
  SKVQ_CHECK(dim <= kMaxHeadDim && dim % kBandUnit == 0, "x has ", dim, " channels; expected a multiple of ", kBandUnit,
             " up to ", kMaxHeadDim);
  MapHeadsArgs a{};
  a.dtype = float_dtype(x, "x");
  a.x = make_rows(x, "x", place);
  a.num_tokens = x.size(0);
  a.num_heads = static_cast<int>(heads);
  a.head_dim = static_cast<int>(dim);
  a.ratio = static_cast<int>(heads / num_kv_heads);
  a.permutation = table<std::int32_t>(permutation, "permutation", ScalarType::Int, num_kv_heads, dim, place);
  if (place.on_cpu) check_permutation(a.permutation, num_kv_heads, dim);
  a.shift = table<float>(shift, "shift", ScalarType::Float, num_kv_heads, dim, place);
  a.scale = table<float>(scale, "scale", ScalarType::Float, num_kv_heads, dim, place);
  if (matrix) {
    a.matrix_per_head = matrix->dim() == 3;
    if (a.matrix_per_head) {
      check_tensor(*matrix, "matrix", ScalarType::Float, {num_kv_heads, dim, dim}, place);
    } else {
      check_tensor(*matrix, "matrix", ScalarType::Float, {dim, dim}, place);
    }
    a.matrix = matrix->const_data_ptr<float>();
  }
  return a;
}

Tensor run(const Tensor& x, MapHeadsArgs& a, const Place& place) {
  Tensor out = new_tensor(x, {a.num_tokens, a.num_heads, a.head_dim}, x.scalar_type());
  a.out = out.mutable_data_ptr();
  place.backend->map_heads(a, place);
  return out;
}

}  // namespace

Tensor enter_heads(const Tensor& x, const OptionalTensor& permutation, const OptionalTensor& shift,
                   const OptionalTensor& scale, const OptionalTensor& matrix, std::int64_t num_kv_heads) {
  const Place place = place_of(x, "x");
  MapHeadsArgs a = make_args(x, permutation, shift, scale, matrix, num_kv_heads, place);
  return run(x, a, place);
}

Tensor leave_heads(const Tensor& o, const OptionalTensor& permutation, const OptionalTensor& shift,
                   const OptionalTensor& scale, const OptionalTensor& matrix, const OptionalTensor& share,
                   std::int64_t num_kv_heads) {
  const Place place = place_of(o, "o");
  MapHeadsArgs a = make_args(o, permutation, shift, scale, matrix, num_kv_heads, place);
  a.leave = true;
  a.share = table<float>(share, "share", ScalarType::Float, a.num_tokens, a.num_heads, place);
  return run(o, a, place);
}

}  // namespace skvq::ops
