// Backward pass of one direction of one layer. Included inside a per-set anonymous namespace.
//
// Reverse time loop per batch slice: a tile of dh_t = dL/dh_t + dgates_{t+1} U becomes, in its
// epilogue, the gate gradients of step t. Chunk by chunk of time, while its gate gradients are in
// cache, follow the products over all its steps: the input gradient and the weight gradients.

template <typename T>
class Backward {
 public:
  Backward(const BackwardParams<T>& params, const BackwardPlan& plan, char* workspace, int worker)
      : p_(params),
        plan_(plan),
        shape_(params.shape),
        worker_(worker),
        team_(worker / plan.grid.hidden_groups),
        member_(worker % plan.grid.hidden_groups),
        rows_(share(shape_.batch, plan.grid.batch_groups, team_)),
        hidden_columns_(columns_of(shape_.hidden_size)),
        output_columns_(columns_of(shape_.output_size)),
        all_workers_(reinterpret_cast<Barrier*>(workspace)),
        team_barrier_(reinterpret_cast<Barrier*>(workspace + kBarrierBytes * (1 + team_))),
        input_panels_(reinterpret_cast<T*>(workspace + plan.input_panels)),
        recurrent_panels_(reinterpret_cast<T*>(workspace + plan.recurrent_panels)),
        projection_panels_(reinterpret_cast<T*>(workspace + plan.projection_panels)),
        partial_sums_(reinterpret_cast<T*>(workspace + plan.partial_sums)),
        grad_gates_(reinterpret_cast<T*>(workspace + plan.grad_gates)),
        grad_hidden_(reinterpret_cast<T*>(workspace + plan.grad_hidden)),
        outer_products_(reinterpret_cast<T*>(workspace + plan.outer_products)) {}

  void run() {
    prepare_weights();
    for (int64_t first = 0; first < shape_.steps; first += plan_.chunk_steps) {
      const int64_t count = smaller(plan_.chunk_steps, shape_.steps - first);
      for (int64_t s = first; s < first + count; ++s) step(s);
      if (first + count == shape_.steps && p_.grad_h0) initial_state_gradient();
      // One meeting a chunk is enough with two buffers: whoever writes the next chunk but one has
      // met everybody after they had read this one.
      if (plan_.grid.workers() > 1) all_workers_->wait(plan_.grid.workers());
      const Chunk chunk{first, count, shape_.reverse ? first : shape_.steps - first - count};
      if (p_.grad_input.data) input_gradient(chunk);
      weight_gradients(chunk);
    }
  }

 private:
  using S = Simd<T>;
  static constexpr int kLanes = S::kLanes;

  // Steps first ... first + count - 1 of the time loop, which are the times begin ... begin + count - 1.
  struct Chunk {
    int64_t first, count, begin;
  };

  // Steps run against the direction of the forward pass. The map is its own inverse.
  int64_t time(int64_t s) const { return shape_.reverse ? s : shape_.steps - 1 - s; }
  // Where step s lies in the chunk buffers: two of them in turn, each in the order of time.
  int64_t slot(int64_t s) const {
    const int64_t first = s / plan_.chunk_steps * plan_.chunk_steps;
    const int64_t count = smaller(plan_.chunk_steps, shape_.steps - first);
    const int64_t place = shape_.reverse ? s - first : count - 1 - (s - first);
    return first / plan_.chunk_steps % 2 * plan_.chunk_steps + place;
  }
  T* grad_gates(int64_t s) const { return grad_gates_ + slot(s) * shape_.batch * plan_.gate_row; }
  T* grad_hidden(int64_t s) const { return grad_hidden_ + slot(s) * shape_.batch * shape_.output_size; }
  // The step at the chunk's earliest time, whose slot is the chunk's first.
  int64_t first_step_in_time(const Chunk& c) const { return shape_.reverse ? c.first : c.first + c.count - 1; }
  Range columns_of(int64_t size) const {
    const Range blocks = share(divide_up(size, kLanes), plan_.grid.hidden_groups, member_);
    return {blocks.begin * kLanes, smaller(blocks.end * kLanes, size)};
  }
  void meet_team() {
    if (plan_.grid.hidden_groups > 1) team_barrier_->wait(plan_.grid.hidden_groups);
  }

  RightHandSide<T> recurrent_weight() const {
    return {plan_.pack ? recurrent_panels_ : p_.weights.weight_hh, shape_.output_size, 4 * shape_.hidden_size,
            plan_.pack};
  }
  RightHandSide<T> projection_weight() const {
    return {plan_.pack ? projection_panels_ : p_.weights.weight_hr, shape_.hidden_size, shape_.output_size, plan_.pack};
  }
  RightHandSide<T> input_weight() const {
    return {plan_.pack ? input_panels_ : p_.weights.weight_ih, shape_.input_size, 4 * shape_.hidden_size, plan_.pack};
  }

  void prepare_weights() {
    if (!plan_.pack) return;
    const int teams = plan_.grid.batch_groups;
    const int64_t gates = 4 * shape_.hidden_size;
    pack_columns(p_.weights.weight_hh, shape_.output_size, gates, output_columns_, team_, teams, recurrent_panels_);
    if (shape_.projected) {
      pack_columns(p_.weights.weight_hr, shape_.hidden_size, shape_.output_size, hidden_columns_, team_, teams,
                   projection_panels_);
    }
    if (p_.grad_input.data) {
      pack_columns(p_.weights.weight_ih, shape_.input_size, gates, Range{0, shape_.input_size}, worker_,
                   plan_.grid.workers(), input_panels_);
    }
    if (teams > 1) all_workers_->wait(plan_.grid.workers());
  }

  void step(int64_t s) {
    const int64_t t = time(s);
    const T* later = s == 0 ? nullptr : grad_gates(s - 1);
    const T* grad_h_n = s == 0 ? p_.grad_h_n : nullptr;
    if (!shape_.projected) {
      recurrent_gradient(
          later, grad_h_n,
          [&](int64_t row, int64_t column, const T* sums, int lanes) {
            cell_gradient(s, t, row, column, S::load(sums), lanes);
          },
          t);
    } else {
      T* out = grad_hidden(s);
      recurrent_gradient(
          later, grad_h_n,
          [&](int64_t row, int64_t column, const T* sums, int lanes) {
            store_lanes<T>(out + (rows_.begin + row) * shape_.output_size + column, S::load(sums), lanes);
          },
          t);
      meet_team();
      const int64_t P = shape_.output_size;
      multiply(
          RowGrid<const T>{out + rows_.begin * P, 0, P, team_rows()}, team_rows(), projection_weight(), hidden_columns_,
          partial_sums(), [&](int64_t row, int64_t column) LSTM_EXT_LAMBDA_INLINE { prefetch_cell(s, t, row, column); },
          [](int64_t, int64_t, int, Reg<T>& v) LSTM_EXT_LAMBDA_INLINE { v = S::zero(); },
          [&](int64_t row, int64_t column, const T* sums, int lanes) {
            cell_gradient(s, t, row, column, S::load(sums), lanes);
          });
    }
    meet_team();
  }

  // dL/dh0 = dgates U at the first time of the sequence.
  void initial_state_gradient() {
    recurrent_gradient(
        grad_gates(shape_.steps - 1), nullptr, [&](int64_t row, int64_t column, const T* sums, int lanes) {
          store_lanes<T>(p_.grad_h0 + (rows_.begin + row) * shape_.output_size + column, S::load(sums), lanes);
        });
  }

  // The team's own place for sums that wait, wide enough for both products of a step (P <= H).
  RowGrid<T> partial_sums() const {
    return {partial_sums_ + rows_.begin * shape_.hidden_size, 0, shape_.hidden_size, team_rows()};
  }

  int64_t team_rows() const { return rows_.end - rows_.begin; }

  // dL/dh_t for this member's columns of the team's rows: from the output (t >= 0), from h_n on the last step,
  // and from the gate gradients of the step after.
  template <typename Finish>
  LSTM_EXT_INLINE void recurrent_gradient(const T* later, const T* grad_h_n, Finish&& finish, int64_t t = -1) {
    const int64_t P = shape_.output_size;
    const T* grad_output = t >= 0 && p_.grad_output.data ? p_.grad_output.data + t * p_.grad_output.stride_t : nullptr;
    const auto start = [&](int64_t row, int64_t column, int lanes, Reg<T>& v) LSTM_EXT_LAMBDA_INLINE {
      const int64_t b = rows_.begin + row;
      v = grad_output ? load_lanes<T>(grad_output + b * p_.grad_output.stride_b + column, lanes) : S::zero();
      if (grad_h_n) v = v + load_lanes<T>(grad_h_n + b * P + column, lanes);
    };
    RightHandSide<T> weight = recurrent_weight();
    const RowGrid<const T> rows{later ? later + rows_.begin * plan_.gate_row : nullptr, 0, plan_.gate_row, team_rows()};
    if (!later) weight.depth = 0;
    multiply(
        rows, team_rows(), weight, output_columns_, partial_sums(),
        [&](int64_t row, int64_t column) LSTM_EXT_LAMBDA_INLINE {
          if (!shape_.projected && t >= 0) prefetch_cell(time(t), t, row, column);
        },
        start, finish);
  }

  // Fetches what cell_gradient will read.
  LSTM_EXT_INLINE void prefetch_cell(int64_t s, int64_t t, int64_t row, int64_t unit) const {
    const int64_t H = shape_.hidden_size;
    const int64_t b = rows_.begin + row;
    const T* gates = p_.gates + (t * shape_.batch + b) * 4 * H + unit;
#pragma GCC unroll 4
    for (int gate = 0; gate < 4; ++gate) __builtin_prefetch(gates + gate * H);
    __builtin_prefetch(p_.cells + (t * shape_.batch + b) * H + unit);
    if (s + 1 < shape_.steps) __builtin_prefetch(p_.cells + (time(s + 1) * shape_.batch + b) * H + unit);
    if (p_.grad_output.data && !shape_.projected) {
      __builtin_prefetch(p_.grad_output.data + t * p_.grad_output.stride_t + b * p_.grad_output.stride_b + unit);
    }
  }

  // The gate gradients of one row and `lanes` units at step t, from dL/dh before the projection.
  LSTM_EXT_INLINE void cell_gradient(int64_t s, int64_t t, int64_t row, int64_t unit, Reg<T> grad_h, int lanes) {
    const int64_t H = shape_.hidden_size;
    const int64_t b = rows_.begin + row;
    const int64_t at = t * shape_.batch + b;
    const Reg<T> one = S::set1(T(1));
    const T* gates = p_.gates + at * 4 * H + unit;
    const Reg<T> i = load_lanes<T>(gates, lanes);
    const Reg<T> f = load_lanes<T>(gates + H, lanes);
    const Reg<T> g = load_lanes<T>(gates + 2 * H, lanes);
    const Reg<T> o = load_lanes<T>(gates + 3 * H, lanes);
    const Reg<T> tanh_c = tanh<T>(load_lanes<T>(p_.cells + at * H + unit, lanes));
    const bool first = s == shape_.steps - 1;
    const T* previous = first ? (p_.c0 ? p_.c0 + b * H : nullptr) : p_.cells + (time(s + 1) * shape_.batch + b) * H;

    T* running = p_.grad_c + b * H + unit;
    Reg<T> grad_c = s > 0         ? load_lanes<T>(running, lanes)
                    : p_.grad_c_n ? load_lanes<T>(p_.grad_c_n + b * H + unit, lanes)
                                  : S::zero();
    grad_c = S::fma(grad_h * o, one - tanh_c * tanh_c, grad_c);
    T* out = grad_gates(s) + b * plan_.gate_row + unit;
    store_lanes<T>(out, grad_c * g * (i * (one - i)), lanes);
    const Reg<T> c_previous = previous ? load_lanes<T>(previous + unit, lanes) : S::zero();
    store_lanes<T>(out + H, grad_c * c_previous * (f * (one - f)), lanes);
    store_lanes<T>(out + 2 * H, grad_c * i * (one - g * g), lanes);
    store_lanes<T>(out + 3 * H, grad_h * tanh_c * (o * (one - o)), lanes);
    store_lanes<T>(running, grad_c * f, lanes);
  }

  // For `rows` rows and `columns`: a * b + start(row, column, lanes), kLanes columns at a time to
  // finish(row, column, sums, lanes). Between blocks of k the sums wait in partial(row)[columns].
  template <typename A, typename Partial, typename Prefetch, typename Start, typename Finish>
  LSTM_EXT_INLINE void multiply(const A& a_row, int64_t rows, const RightHandSide<T>& b, Range columns,
                                const Partial& partial, const Prefetch& prefetch, const Start& start,
                                const Finish& finish) {
    const auto column_block = [&](int64_t column, auto width, int last) LSTM_EXT_LAMBDA_INLINE {
      constexpr int NV = width();
      const bool exact = b.packed || last == kLanes;
      for (int64_t k = 0; k == 0 || k < b.depth; k += kBlockK) {
        const int64_t depth = smaller(kBlockK, b.depth - k);
        for_each_row_tile(rows, [&](int64_t row, auto height) {
          constexpr int R = height();
          Tile<T, R, NV> tile;
          tile.zero();
          const T* a[R];
#pragma GCC unroll 6
          for (int r = 0; r < R; ++r) a[r] = b.depth > 0 ? a_row(row + r) + k : nullptr;
          const bool done = k + depth >= b.depth;
          // What the epilogue reads was written long ago; it arrives while the tile is summed.
          if (done) {
            for (int r = 0; r < R; ++r)
              for (int v = 0; v < NV; ++v) prefetch(row + r, column + v * kLanes);
          }
          const T* panel = b.template at<NV>(column, k);
          const int64_t step = b.template step<NV>();
          if (exact) {
            accumulate_rows(tile, a, panel, step, depth);
          } else {
            accumulate_rows<T, R, NV, true>(tile, a, panel, step, depth, last);
          }
#pragma GCC unroll 6
          for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
              const int lanes = v == NV - 1 ? last : kLanes;
              const int64_t at = column + v * kLanes;
              Reg<T> before;
              if (k == 0) {
                start(row + r, at, lanes, before);
              } else {
                before = load_lanes<T>(partial(row + r) + at, lanes);
              }
              tile.acc[r][v] = tile.acc[r][v] + before;
            }
          }
          for (int r = 0; r < R; ++r) {
            for (int v = 0; v < NV; ++v) {
              const int lanes = v == NV - 1 ? last : kLanes;
              const int64_t at = column + v * kLanes;
              if (done) {
                alignas(64) T sums[kLanes];
                S::store(sums, tile.acc[r][v]);
                finish(row + r, at, sums, lanes);
              } else {
                store_lanes<T>(partial(row + r) + at, tile.acc[r][v], lanes);
              }
            }
          }
        });
      }
    };
    for_each_column_block<T>(columns.begin, columns.end, column_block);
  }

  // dL/dx = dgates W; workers share the rows.
  void input_gradient(const Chunk& chunk) {
    const RowGrid<const T> grads{grad_gates(first_step_in_time(chunk)), shape_.batch * plan_.gate_row, plan_.gate_row,
                                 shape_.batch};
    const RowGrid<T> out{p_.grad_input.data + chunk.begin * p_.grad_input.stride_t, p_.grad_input.stride_t,
                         p_.grad_input.stride_b, shape_.batch};
    const Range mine = share(chunk.count * shape_.batch, plan_.grid.workers(), worker_);
    constexpr int64_t kRows = 16 * kTileRows;  // rows that pass over a panel while it is in cache
    const RightHandSide<T> weight = input_weight();
    for (int64_t begin = mine.begin; begin < mine.end; begin += kRows) {
      const int64_t rows = smaller(kRows, mine.end - begin);
      multiply([&](int64_t row) LSTM_EXT_LAMBDA_INLINE { return grads(begin + row); }, rows, weight,
               Range{0, shape_.input_size}, [&](int64_t row) LSTM_EXT_LAMBDA_INLINE { return out(begin + row); },
               [](int64_t, int64_t) LSTM_EXT_LAMBDA_INLINE {},
               [&](int64_t row, int64_t column, int lanes, Reg<T>& v) LSTM_EXT_LAMBDA_INLINE {
                 v = p_.accumulate_grad_input ? load_lanes<T>(out(begin + row) + column, lanes) : S::zero();
               },
               [&](int64_t row, int64_t column, const T* sums, int lanes) {
                 store_lanes<T>(out(begin + row) + column, S::load(sums), lanes);
               });
    }
  }

  // Adds the chunk's part; workers share the rows of the gradients.
  void weight_gradients(const Chunk& chunk) {
    const int64_t H = shape_.hidden_size;
    const int64_t B = shape_.batch;
    const int64_t P = shape_.output_size;
    const Range mine = share(4 * H, plan_.grid.workers(), worker_);
    T* scratch = outer_products_ + worker_ * outer_product_scratch(kLanes, divide_up(4 * H, plan_.grid.workers()));
    const T* grads = grad_gates(first_step_in_time(chunk));
    if (p_.grad_weight_ih) {
      if (chunk.first == 0) zero_rows(p_.grad_weight_ih, shape_.input_size, mine);
      add_outer_products<T>(grads, plan_.gate_row, chunk.count * B, mine,
                            {p_.input.data + chunk.begin * p_.input.stride_t, p_.input.stride_t, p_.input.stride_b, B},
                            shape_.input_size, p_.grad_weight_ih, scratch);
    }
    if (p_.grad_weight_hh) {
      if (chunk.first == 0) zero_rows(p_.grad_weight_hh, P, mine);
      // h_{t-1} is the output of the step before in the layer's direction; of its first step, h0.
      const bool has_first = chunk.first + chunk.count == shape_.steps;
      const int64_t begin = has_first && !shape_.reverse ? 1 : 0;  // of the steps with an output before
      const int64_t count = chunk.count - (has_first ? 1 : 0);
      const int64_t before = chunk.begin + begin + (shape_.reverse ? 1 : -1);
      add_outer_products<T>(grads + begin * B * plan_.gate_row, plan_.gate_row, count * B, mine,
                            {p_.output.data + before * p_.output.stride_t, p_.output.stride_t, p_.output.stride_b, B},
                            P, p_.grad_weight_hh, scratch);
      if (has_first && p_.h0) {
        add_outer_products<T>(grad_gates(shape_.steps - 1), plan_.gate_row, B, mine, {p_.h0, B * P, P, B}, P,
                              p_.grad_weight_hh, scratch);
      }
    }
    if (p_.grad_bias) {
      if (chunk.first == 0) zero_rows(p_.grad_bias, 1, mine);
      add_columns<T>(grads, plan_.gate_row, chunk.count * B, mine, p_.grad_bias);
    }
    if (p_.grad_weight_hr) {
      const Range projected = share(P, plan_.grid.workers(), worker_);
      if (chunk.first == 0) zero_rows(p_.grad_weight_hr, H, projected);
      add_outer_products<T>(grad_hidden(first_step_in_time(chunk)), P, chunk.count * B, projected,
                            {p_.hidden + chunk.begin * B * H, B * H, H, B}, H, p_.grad_weight_hr, scratch);
    }
  }

  static void zero_rows(T* matrix, int64_t columns, Range rows) {
    for (int64_t i = rows.begin * columns; i < rows.end * columns; ++i) matrix[i] = T(0);
  }

  const BackwardParams<T>& p_;
  const BackwardPlan& plan_;
  const LayerShape& shape_;
  const int64_t worker_, team_, member_;
  const Range rows_;            // batch rows of the team
  const Range hidden_columns_;  // hidden units of this member
  const Range output_columns_;  // output features of this member; the same without a projection
  Barrier* all_workers_;
  Barrier* team_barrier_;
  T* input_panels_;
  T* recurrent_panels_;
  T* projection_panels_;
  T* partial_sums_;
  T* grad_gates_;   // gradients of the pre-activations, chunk by chunk
  T* grad_hidden_;  // gradients of the projected h_t, likewise
  T* outer_products_;
};

template <typename T>
void backward(const BackwardParams<T>& params, const BackwardPlan& plan, char* workspace, int worker) {
  Backward<T>(params, plan, workspace, worker).run();
}
