// The gates of a chunk of the backward pass, where the forward pass saved c_t only: two products over all its rows,
// since all x_t and h_{t-1} are known. Included inside a per-set anonymous namespace, after backward.h.
//
// A member rebuilds its own units of its team's rows, which are those that it reads.

template <typename T>
void Backward<T>::prepare_rebuilding() {
  const LayerWeights<T>& w = p_.weights;
  const int64_t H = shape_.hidden_size;
  for (int64_t i = 0; i < 4 * H; ++i) {
    rebuilt_.bias[i] = (w.bias_ih ? w.bias_ih[i] : T(0)) + (w.bias_hh ? w.bias_hh[i] : T(0));
  }
  if (!plan_.pack) return;
  for (int64_t block = hidden_blocks_.begin; block < hidden_blocks_.end; ++block) {
    if (block % plan_.grid.batch_groups != team_) continue;
    pack_gate_panel(w.weight_ih, H, shape_.input_size, block,
                    rebuilt_.input_panels + block * 4 * kLanes * shape_.input_size);
    pack_gate_panel(w.weight_hh, H, shape_.output_size, block,
                    rebuilt_.recurrent_panels + block * 4 * kLanes * shape_.output_size);
  }
}

template <typename T>
void Backward<T>::rebuild_gates() {
  const int64_t H = shape_.hidden_size;
  const int64_t P = shape_.output_size;
  if (!chunk_.masked_h) list_previous_rows();
  int64_t count = 0;
  for (int64_t t = chunk_.begin; t < chunk_.begin + chunk_.count; ++t) {
    const int64_t s = steps_.time(t);
    const int64_t before = row_in_chunk(chunk_, s);
    for (int64_t row = 0; row < team_rows(s); ++row, ++count) {
      const int64_t b = rows_.batch_row(row);
      rebuilt_.input_rows[count] = steps_.at(p_.input, t) + b * p_.input.stride_b;
      rebuilt_.h_rows[count] = chunk_.masked_h ? chunk_.masked_h + (before + b) * P : row_list_[before + b];
      rebuilt_.gate_rows[count] = rebuilt_.gates + (before + b) * 4 * H;
    }
  }
  GateProduct<T> product(H, hidden_blocks_);
  RowGrid<const T> input{}, h{};
  RowGrid<T> gates{};
  input.each = rebuilt_.input_rows;
  h.each = rebuilt_.h_rows;
  gates.each = rebuilt_.gate_rows;
  product.multiply(count, input, shape_.input_size, p_.weights.weight_ih, rebuilt_.input_panels, gates, rebuilt_.bias);
  product.multiply(count, h, P, p_.weights.weight_hh, rebuilt_.recurrent_panels, gates, static_cast<const T*>(nullptr));

  for (int64_t s = chunk_.first; s < chunk_.first + chunk_.count; ++s) {
    cells_ = cells_of_step(s);
    const int64_t before = row_in_chunk(chunk_, s);
    for (int64_t row = 0; row < team_rows(s); ++row) {
      const int64_t b = rows_.batch_row(row);
      T* const of_row = rebuilt_.gates + (before + b) * 4 * H;
      const T* const previous = previous_cell(b);
      for (int64_t block = hidden_blocks_.begin; block < hidden_blocks_.end; ++block) {
        const int64_t unit = block * kLanes;
        const int lanes = product.lanes_of(block);
        Reg<T> values[4];
        for (int gate = 0; gate < 4; ++gate) values[gate] = load_lanes<T>(of_row + gate * H + unit, lanes);
        const Reg<T> c = gates_and_cell<T>(values, previous, unit, lanes, false);
        for (int gate = 0; gate < 4; ++gate) store_lanes<T>(of_row + gate * H + unit, values[gate], lanes);
        if (shape_.projected) store_lanes<T>(chunk_.hidden + (before + b) * H + unit, values[3] * tanh<T>(c), lanes);
      }
    }
  }
}
