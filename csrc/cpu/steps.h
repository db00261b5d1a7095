// The steps of a pass: when they are, which rows they have and where these lie, of dense and of
// packed data alike. Included inside a per-set anonymous namespace.

class Steps {
 public:
  // `reverse`: the pass runs from the last time to the first.
  Steps(const LayerShape& shape, bool reverse) : shape_(shape), reverse_(reverse) {}

  LSTM_EXT_INLINE int64_t count() const { return shape_.steps; }
  LSTM_EXT_INLINE bool packed() const { return shape_.step_offsets != nullptr; }
  // The time of step s of the pass; the map is its own inverse.
  LSTM_EXT_INLINE int64_t time(int64_t s) const { return reverse_ ? shape_.steps - 1 - s : s; }

  // Rows at time t, and before time t.
  LSTM_EXT_INLINE int64_t rows_at(int64_t t) const {
    return packed() ? shape_.step_offsets[t + 1] - shape_.step_offsets[t] : shape_.batch;
  }
  LSTM_EXT_INLINE int64_t rows_before(int64_t t) const { return packed() ? shape_.step_offsets[t] : t * shape_.batch; }

  // Rows of the steps s before and after; none beyond the ends.
  LSTM_EXT_INLINE int64_t rows_of_step(int64_t s) const { return s >= 0 && s < shape_.steps ? rows_at(time(s)) : 0; }

  // Of the rows at time t, or null where there are none in the whole sequence.
  LSTM_EXT_INLINE const uint8_t* resets_at(int64_t t) const {
    return shape_.resets ? shape_.resets + rows_before(t) : nullptr;
  }

  // Row 0 of a sequence at time t.
  template <typename T>
  LSTM_EXT_INLINE T* at(const Sequence<T>& x, int64_t t) const {
    return x.data + (packed() ? shape_.step_offsets[t] * x.stride_b : t * x.stride_t);
  }
  // All rows from time t on, in the order of time.
  template <typename T>
  LSTM_EXT_INLINE RowGrid<T> from(const Sequence<T>& x, int64_t t) const {
    if (packed()) return {at(x, t), x.stride_b, x.stride_b, 1};
    return {at(x, t), x.stride_t, x.stride_b, shape_.batch};
  }

 private:
  const LayerShape& shape_;
  const bool reverse_;
};

// The batch rows of one team (see WorkerGrid).
struct TeamRows {
  int64_t first, step, most;

  TeamRows(const LayerShape& shape, int64_t teams, int64_t team) {
    const Range rows = share(shape.batch, teams, team);
    const bool packed = shape.step_offsets != nullptr;
    first = packed ? team : rows.begin;
    step = packed ? teams : 1;
    most = packed ? divide_up(shape.batch - team, teams) : rows.end - rows.begin;
  }
  // How many of them there are in a step of so many rows.
  LSTM_EXT_INLINE int64_t of(int64_t rows) const {
    if (step == 1 && rows >= first + most) return most;
    return rows > first ? divide_up(rows - first, step) : 0;
  }
  LSTM_EXT_INLINE int64_t batch_row(int64_t row) const { return first + row * step; }
  // Whether a flag is set for one of rows begin ... end - 1 of the team; `flags` are those of the batch, or null.
  LSTM_EXT_INLINE bool any(const uint8_t* flags, int64_t begin, int64_t end) const {
    if (!flags) return false;
    uint8_t found = 0;
    for (int64_t row = begin; row < end; ++row) found |= flags[batch_row(row)];
    return found != 0;
  }
  // Rows begin ... end - 1 of the team, in an array with `stride` from one batch row to the next.
  template <typename T>
  LSTM_EXT_INLINE RowGrid<T> grid(T* data, int64_t stride, int64_t begin, int64_t end) const {
    const int64_t row_step = step * stride;
    return {data ? data + batch_row(begin) * stride : nullptr, (end - begin) * row_step, row_step, end - begin};
  }
};
