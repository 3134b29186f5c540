// Low-rank updates of the rows of a decode step, each of which may have another adapter: y[row] += factor * B z with
// z = scale * A x[row]. CUDA only.
//
// `table` has the update of each adapter and linear layer. `adapters` has the index of each row's adapter, or EMPTY. Both are
// written before a step and are not changed by it, so they are read while the previous kernel runs.

#define MAX_RANK 64
#define WARPS 8
// Blocks that share the ranks of an update, and rows that a block of the second kernel computes.
#define RANK_PARTS 2
#define ROWS 4

// A factor A: [rank, width] and B: [columns, rank]. Both start at a multiple of 8 elements.
struct Update {
    const T* a;
    const T* b;
    uint rank;
    float scale;
};

FUNCTION Update update_of(const uint* table, uint adapter, uint num_linears, uint id) {
    Update none = {};
    return adapter == EMPTY ? none : reinterpret_cast<const Update*>(table)[wide(adapter) * num_linears + id];
}

FUNCTION void prefetch_lines(const T* from, uint num_bytes, uint first, uint step) {
    const uchar* start = reinterpret_cast<const uchar*>(from);
    for (uint at = 128 * first; at < num_bytes; at += 128 * step) PREFETCH(start + at);
}

struct InputWords {
    uint rows;
    uint width;
    uint num_linears;
    uint ids[3];
};

// z of up to three layers that share x: [layers, rows, MAX_RANK]. A block has a row and a layer.
KERNEL(row_inputs)(IN(T, x, 0), IN(uint, table, 1), IN(uint, adapters, 2), OUT(float, z, 3), WORDS(InputWords, 4) INDICES) {
    const uint row = group.x, layer = group.y;
    const Update update = update_of(table, adapters[row], p.num_linears, p.ids[layer]);
    const uint first = group.z * WARPS + warp;
    for (uint r = first; r < update.rank; r += WARPS * RANK_PARTS) {
        prefetch_lines(update.a + wide(r) * p.width, uint(sizeof(T)) * p.width, lane, 32);
    }
    WAIT_FOR_INPUT;
    for (uint r = first; r < update.rank; r += WARPS * RANK_PARTS) {
        const T* a = update.a + wide(r) * p.width;
        float sum = 0.0f;
        UNROLL4 for (uint i = 8 * lane; i < p.width; i += 256) {
            float u[8], v[8];
            load8(a + i, u);
            load8(x + wide(row) * p.width + i, v);
            UNROLL for (uint j = 0; j < 8; j++) sum += u[j] * v[j];
        }
        sum = warp_sum(sum);
        if (lane == 0) z[(layer * p.rows + row) * MAX_RANK + r] = update.scale * sum;
    }
}

#if OUT_F32
typedef float Out;
#else
typedef T Out;
#endif

struct OutputWords {
    uint rows;
    uint num_linears;
    uint ids[3];
    uint widths[3];
    // first row of B
    uint starts[3];
    float factor;
};

// Adds B z to y. A thread has one column of ROWS rows.
KERNEL(row_outputs)
(IN(float, z, 0), IN(uint, table, 1), IN(uint, adapters, 2), OUT(Out, y0, 3), OUT(Out, y1, 4), OUT(Out, y2, 5),
 WORDS(OutputWords, 6) INDICES) {
    uint tile = group.x, layer = 0;
    while (layer < 2 && tile >= (p.widths[layer] + 255) / 256) tile -= (p.widths[layer++] + 255) / 256;
    const uint width = p.widths[layer], column = tile * 256 + me;
    Out* y = layer == 0 ? y0 : layer == 1 ? y1 : y2;
    Update updates[ROWS];
    UNROLL for (uint i = 0; i < ROWS; i++) {
        const uint row = group.y * ROWS + i;
        updates[i] = update_of(table, row < p.rows ? adapters[row] : EMPTY, p.num_linears, p.ids[layer]);
        updates[i].b += wide(p.starts[layer] + column) * updates[i].rank;
        if (column < width && updates[i].rank > 0) PREFETCH(updates[i].b);
    }
    WAIT_FOR_INPUT;
    if (column >= width) return;
    UNROLL for (uint i = 0; i < ROWS; i++) {
        const uint row = group.y * ROWS + i, rank = updates[i].rank;
        if (rank == 0) continue;
        const float* of_z = z + (layer * p.rows + row) * MAX_RANK;
        float sum = 0.0f;
        if (rank % 8 == 0) {
            for (uint r = 0; r < rank; r += 8) {
                float u[8], v[8];
                load8(updates[i].b + r, u);
                load8_shared(of_z + r, v);
                UNROLL for (uint j = 0; j < 8; j++) sum += u[j] * v[j];
            }
        } else {
            for (uint r = 0; r < rank; r++) sum += float(updates[i].b[r]) * of_z[r];
        }
        const wide at = wide(row) * width + column;
        y[at] = Out(float(y[at]) + p.factor * sum);
    }
}
