// Forward pass of one direction of one layer. Included inside a per-set anonymous namespace.
//
// Chunk by chunk: the input part W x_t + b of some time steps at once into the pre-activation
// buffer (in training that buffer is the saved gates), then the recurrence over those steps, whose
// tiles sum U h_{t-1}, add what the buffer holds and update the cell from registers.

template <typename T>
struct CellState {
  const T* previous;  // c_{t-1} of the row, or null for zeros
  T* current;         // c_t
};

// From pre-activations to gates, c_t and o * tanh(c_t), `lanes` units of one row.
template <typename T>
LSTM_EXT_INLINE void update_cell(Reg<T> i, Reg<T> f, Reg<T> g, Reg<T> o, CellState<T> cell, int64_t unit, int lanes,
                                 T* hidden, T* gates, int64_t hidden_size) {
  using S = Simd<T>;
  const Reg<T> one = S::set1(T(1));
  // A division costs as much as an exponential: i and g share one, o and tanh(c) another. f has its
  // own, since its rounding error is multiplied into c at every step. Gates that meet in c anyway
  // share, so that a NaN spreads no further than in the equations.
  f = one / sigmoid_denominator<T>(f);
  const Reg<T> i_denominator = sigmoid_denominator<T>(i);
  Reg<T> g_numerator, g_denominator;
  tanh_fraction<T>(g, g_numerator, g_denominator);
  const Reg<T> inverse = one / (i_denominator * g_denominator);
  i = g_denominator * inverse;
  g = g_numerator * (i_denominator * inverse);
  Reg<T> c = i * g;
  if (cell.previous) c = S::fma(f, load_lanes<T>(cell.previous + unit, lanes), c);
  store_lanes<T>(cell.current + unit, c, lanes);
  const Reg<T> o_denominator = sigmoid_denominator<T>(o);
  Reg<T> c_numerator, c_denominator;
  tanh_fraction<T>(c, c_numerator, c_denominator);
  const Reg<T> o_inverse = one / (o_denominator * c_denominator);
  o = c_denominator * o_inverse;
  store_lanes<T>(hidden + unit, c_numerator * o_inverse, lanes);
  if (gates) {
    store_lanes<T>(gates + unit, i, lanes);
    store_lanes<T>(gates + hidden_size + unit, f, lanes);
    store_lanes<T>(gates + 2 * hidden_size + unit, g, lanes);
    store_lanes<T>(gates + 3 * hidden_size + unit, o, lanes);
  }
}

template <typename T>
class Forward {
 public:
  Forward(const ForwardParams<T>& params, const ForwardPlan& plan, char* workspace, int worker)
      : p_(params),
        plan_(plan),
        shape_(params.shape),
        team_(worker / plan.grid.hidden_groups),
        member_(worker % plan.grid.hidden_groups),
        rows_(share(shape_.batch, plan.grid.batch_groups, team_)),
        blocks_(share(divide_up(shape_.hidden_size, kLanes), plan.grid.hidden_groups, member_)),
        all_workers_(reinterpret_cast<Barrier*>(workspace)),
        team_barrier_(reinterpret_cast<Barrier*>(workspace + kBarrierBytes * (1 + team_))),
        input_panels_(reinterpret_cast<T*>(workspace + plan.input_panels)),
        recurrent_panels_(reinterpret_cast<T*>(workspace + plan.recurrent_panels)),
        bias_(reinterpret_cast<T*>(workspace + plan.bias)),
        projection_panels_(reinterpret_cast<T*>(workspace + plan.projection_panels)),
        buffer_(reinterpret_cast<T*>(workspace + plan.pre_activations) +
                team_ * plan.team_rows * plan.chunk_steps * 4 * shape_.hidden_size),
        hidden_(reinterpret_cast<T*>(workspace + plan.hidden)) {}

  void run() {
    prepare_weights();
    const int64_t rows = rows_.end - rows_.begin;
    for (int64_t first = 0; first < shape_.steps; first += plan_.chunk_steps) {
      const int64_t steps = smaller(plan_.chunk_steps, shape_.steps - first);
      // Row n of the chunk is step first + n / rows; in training it is the row of the saved gates.
      const int64_t gate_row = 4 * shape_.hidden_size;
      const RowGrid<T> pre = p_.gates ? RowGrid<T>{p_.gates + (time(first) * shape_.batch + rows_.begin) * gate_row,
                                                   direction() * shape_.batch * gate_row, gate_row, rows}
                                      : RowGrid<T>{buffer_, rows * gate_row, gate_row, rows};
      input_part(first, steps, pre);
      for (int64_t s = 0; s < steps; ++s) {
        step(first + s, pre.data + s * pre.outer_step);
      }
    }
    final_state();
  }

 private:
  static constexpr int kLanes = Simd<T>::kLanes;

  int64_t direction() const { return shape_.reverse ? -1 : 1; }
  int64_t time(int64_t s) const { return shape_.reverse ? shape_.steps - 1 - s : s; }
  int lanes_of(int64_t block) const { return static_cast<int>(smaller(shape_.hidden_size - block * kLanes, kLanes)); }
  void meet_team() {
    if (plan_.grid.hidden_groups > 1) team_barrier_->wait(plan_.grid.hidden_groups);
  }

  // Each member uses the panels of its own units only; the teams share the work of packing them.
  void prepare_weights() {
    const LayerWeights<T>& w = p_.weights;
    const int teams = plan_.grid.batch_groups;
    for (int64_t block = blocks_.begin; block < blocks_.end; ++block) {
      if (block % teams != team_) continue;
      if (plan_.pack_input) {
        pack_gate_panel(w.weight_ih, shape_.hidden_size, shape_.input_size, block,
                        input_panels_ + block * 4 * kLanes * shape_.input_size);
      }
      if (plan_.pack_recurrent) {
        pack_gate_panel(w.weight_hh, shape_.hidden_size, shape_.output_size, block,
                        recurrent_panels_ + block * 4 * kLanes * shape_.output_size);
      }
      for (int gate = 0; gate < 4; ++gate) {
        const int64_t at = gate * shape_.hidden_size + block * kLanes;
        for (int64_t i = at; i < at + lanes_of(block); ++i) {
          bias_[i] = (w.bias_ih ? w.bias_ih[i] : T(0)) + (w.bias_hh ? w.bias_hh[i] : T(0));
        }
      }
    }
    if (shape_.projected) {
      const int64_t blocks = divide_up(shape_.output_size, kLanes);
      const int workers = plan_.grid.workers();
      for (int64_t block = team_ * plan_.grid.hidden_groups + member_; block < blocks; block += workers) {
        const int lanes = static_cast<int>(smaller(shape_.output_size - block * kLanes, kLanes));
        pack_transposed<T>(w.weight_hr + block * kLanes * shape_.hidden_size, lanes, shape_.hidden_size,
                           projection_panels_ + block * kLanes * shape_.hidden_size, kLanes);
      }
    }
    if (teams > 1 || (shape_.projected && plan_.grid.workers() > 1)) all_workers_->wait(plan_.grid.workers());
  }

  // pre = W x + b for all rows of the chunk and the units of this member.
  void input_part(int64_t first, int64_t steps, const RowGrid<T>& pre) {
    const RowGrid<const T> input{p_.input.data + time(first) * p_.input.stride_t + rows_.begin * p_.input.stride_b,
                                 direction() * p_.input.stride_t, p_.input.stride_b, pre.rows};
    const int64_t rows = steps * pre.rows;
    if (plan_.pack_input) {
      multiply_gate_panels(rows, input, shape_.input_size, input_panels_, pre, bias_,
                           [](int64_t, int64_t, auto&) LSTM_EXT_LAMBDA_INLINE { return false; });
    } else {
      dot_gates(p_.weights.weight_ih, shape_.input_size, rows, input, bias_, pre);
    }
  }

  void step(int64_t s, T* pre_row) {
    const int64_t t = time(s);
    const int64_t count = rows_.end - rows_.begin;
    const int64_t H = shape_.hidden_size;
    const RowGrid<T> pre{pre_row, 0, 4 * H, count};
    const RowGrid<const T> h =
        s == 0
            ? RowGrid<const T>{p_.h0 ? p_.h0 + rows_.begin * shape_.output_size : nullptr, 0, shape_.output_size, count}
            : RowGrid<const T>{p_.output.data + time(s - 1) * p_.output.stride_t + rows_.begin * p_.output.stride_b, 0,
                               p_.output.stride_b, count};
    const T* c_previous = s == 0 ? p_.c0 : p_.cells ? p_.cells + time(s - 1) * shape_.batch * H : p_.c_n;
    T* c_current = p_.cells ? p_.cells + t * shape_.batch * H : p_.c_n;
    T* hidden = p_.output.data + t * p_.output.stride_t;
    int64_t hidden_stride = p_.output.stride_b;
    if (shape_.projected) {
      hidden = p_.hidden ? p_.hidden + t * shape_.batch * H : hidden_;
      hidden_stride = H;
    }
    const auto cell = [&](int64_t row, int64_t block, Reg<T> i, Reg<T> f, Reg<T> g, Reg<T> o) LSTM_EXT_LAMBDA_INLINE {
      const int64_t b = rows_.begin + row;
      const CellState<T> state{c_previous ? c_previous + b * H : nullptr, c_current + b * H};
      update_cell<T>(i, f, g, o, state, block * kLanes, lanes_of(block), hidden + b * hidden_stride,
                     p_.gates ? pre_row + row * 4 * H : nullptr, H);
    };
    const int64_t h_size = h.data ? shape_.output_size : 0;
    if (plan_.pack_recurrent) {
      multiply_gate_panels(count, h, h_size, recurrent_panels_, pre, static_cast<const T*>(nullptr),
                           [&](int64_t row, int64_t block, auto& tile) LSTM_EXT_LAMBDA_INLINE {
                             constexpr int R = sizeof(tile.acc) / sizeof(tile.acc[0]);
#pragma GCC unroll 6
                             for (int r = 0; r < R; ++r) {
                               cell(row + r, block, tile.acc[r][0], tile.acc[r][1], tile.acc[r][2], tile.acc[r][3]);
                             }
                             return true;
                           });
    } else {
      if (h_size > 0) dot_gates(p_.weights.weight_hh, h_size, count, h, static_cast<const T*>(nullptr), pre);
      for (int64_t row = 0; row < count; ++row) {
        for (int64_t block = blocks_.begin; block < blocks_.end; ++block) {
          const T* at = pre(row) + block * kLanes;
          const int n = lanes_of(block);
          cell(row, block, load_lanes<T>(at, n), load_lanes<T>(at + H, n), load_lanes<T>(at + 2 * H, n),
               load_lanes<T>(at + 3 * H, n));
        }
      }
    }
    meet_team();
    if (shape_.projected) {
      project(t, hidden + rows_.begin * hidden_stride, hidden_stride);
      meet_team();
    }
  }

  // h_t = W_hr (o * tanh(c_t)), the members sharing the output columns.
  void project(int64_t t, const T* hidden, int64_t hidden_stride) {
    const Range blocks = share(divide_up(shape_.output_size, kLanes), plan_.grid.hidden_groups, member_);
    T* out = p_.output.data + t * p_.output.stride_t + rows_.begin * p_.output.stride_b;
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const int lanes = static_cast<int>(smaller(shape_.output_size - block * kLanes, kLanes));
      const T* panel = projection_panels_ + block * kLanes * shape_.hidden_size;
      for_each_row_tile(rows_.end - rows_.begin, [&](int64_t row, auto height) LSTM_EXT_LAMBDA_INLINE {
        constexpr int R = height();
        const T* a[R];
        for (int r = 0; r < R; ++r) a[r] = hidden + (row + r) * hidden_stride;
        Tile<T, R, 1> tile;
        tile.zero();
        accumulate_rows(tile, a, panel, kLanes, shape_.hidden_size);
        for (int r = 0; r < R; ++r) {
          store_lanes<T>(out + (row + r) * p_.output.stride_b + block * kLanes, tile.acc[r][0], lanes);
        }
      });
    }
  }

  // For this member's panels: tile = a * panel + (bias, or what is in `pre`); then finish(row,
  // block, tile), which says whether it consumed the tile; if not, the tile goes to `pre`.
  template <typename A, typename Finish>
  LSTM_EXT_INLINE void multiply_gate_panels(int64_t rows, const A& a_row, int64_t count, const T* panels,
                                            const RowGrid<T>& pre, const T* bias, Finish&& finish) {
    const int64_t H = shape_.hidden_size;
    for (int64_t block = blocks_.begin; block < blocks_.end; ++block) {
      const int lanes = lanes_of(block);
      const T* panel = panels + block * 4 * kLanes * count;
      for (int64_t k = 0; k == 0 || k < count; k += kBlockK) {
        const int64_t depth = smaller(kBlockK, count - k);
        const bool last = k + depth >= count;
        for_each_row_tile(rows, [&](int64_t row, auto height) LSTM_EXT_LAMBDA_INLINE {
          constexpr int R = height();
          const T* a[R];
          T* out[R];
#pragma GCC unroll 6
          for (int r = 0; r < R; ++r) {
            a[r] = count > 0 ? a_row(row + r) + k : nullptr;
            out[r] = pre(row + r) + block * kLanes;
          }
          // The sum starts from zero and meets the rest at its end: adding many small products to a
          // large number would round each of them at the large one's precision.
          Tile<T, R, 4> tile;
          tile.zero();
#pragma GCC unroll 6
          for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int gate = 0; gate < 4; ++gate) __builtin_prefetch(out[r] + gate * H, 1);
          accumulate_rows(tile, a, panel + k * 4 * kLanes, 4 * kLanes, depth);
          const bool from_bias = bias && k == 0;
#pragma GCC unroll 6
          for (int r = 0; r < R; ++r) {
            const T* start = from_bias ? bias + block * kLanes : out[r];
#pragma GCC unroll 4
            for (int gate = 0; gate < 4; ++gate) {
              tile.acc[r][gate] = tile.acc[r][gate] + load_lanes<T>(start + gate * H, lanes);
            }
          }
          if (last && finish(row, block, tile)) return;
#pragma GCC unroll 6
          for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int gate = 0; gate < 4; ++gate) store_lanes<T>(out[r] + gate * H, tile.acc[r][gate], lanes);
        });
      }
    }
  }

  // The row-major path: pre = (bias, or what is in `pre`) + weight * a, for this member's units.
  template <typename A>
  void dot_gates(const T* weight, int64_t count, int64_t rows, const A& a_row, const T* bias, const RowGrid<T>& pre) {
    const int64_t H = shape_.hidden_size;
    const int64_t begin = blocks_.begin * kLanes;
    const int64_t end = smaller(blocks_.end * kLanes, H);
    if (begin == 0 && end == H) {  // all units: the four gates are one range
      dot_range(weight, count, 0, 4 * H, rows, a_row, bias, pre);
    } else {
      for (int gate = 0; gate < 4; ++gate) {
        dot_range(weight, count, gate * H + begin, gate * H + end, rows, a_row, bias, pre);
      }
    }
  }

  template <typename A>
  void dot_range(const T* weight, int64_t count, int64_t begin, int64_t end, int64_t rows, const A& a_row,
                 const T* bias, const RowGrid<T>& pre) {
    constexpr int kMany = kLanes >= 4 ? 4 : kLanes;
    for (int64_t m = begin; m < end;) {
      int64_t row = 0;
      const int64_t many_end = smaller(m + kLanes, end);
      for (; row + kMany <= rows; row += kMany) {
        for (int64_t j = m; j < many_end; j += kLanes / kMany) {
          dot_tile<T, kMany>(
              weight + j * count, count, static_cast<int>(smaller(many_end - j, kLanes / kMany)),
              [&](int x) LSTM_EXT_LAMBDA_INLINE { return a_row(row + x); },
              [&](int x) LSTM_EXT_LAMBDA_INLINE { return pre(row + x) + j; }, bias ? bias + j : nullptr);
        }
      }
      for (; row < rows; ++row) {
        dot_tile<T, 1>(
            weight + m * count, count, static_cast<int>(many_end - m),
            [&](int) LSTM_EXT_LAMBDA_INLINE { return a_row(row); },
            [&](int) LSTM_EXT_LAMBDA_INLINE { return pre(row) + m; }, bias ? bias + m : nullptr);
      }
      m = many_end;
    }
  }

  void final_state() {
    // The last step ended with a meeting of the team, so all columns are there.
    if (member_ != 0) return;
    const int64_t t = time(shape_.steps - 1);
    const int64_t H = shape_.hidden_size;
    const int64_t P = shape_.output_size;
    for (int64_t b = rows_.begin; b < rows_.end; ++b) {
      copy(p_.output.data + t * p_.output.stride_t + b * p_.output.stride_b, P, p_.h_n + b * P);
      if (p_.cells) copy(p_.cells + (t * shape_.batch + b) * H, H, p_.c_n + b * H);
    }
  }

  const ForwardParams<T>& p_;
  const ForwardPlan& plan_;
  const LayerShape& shape_;
  const int64_t team_, member_;
  const Range rows_;    // batch rows of the team
  const Range blocks_;  // blocks of kLanes hidden units of this member
  Barrier* all_workers_;
  Barrier* team_barrier_;
  T* input_panels_;
  T* recurrent_panels_;
  T* bias_;
  T* projection_panels_;
  T* buffer_;
  T* hidden_;
};

template <typename T>
void forward(const ForwardParams<T>& params, const ForwardPlan& plan, char* workspace, int worker) {
  Forward<T>(params, plan, workspace, worker).run();
}
