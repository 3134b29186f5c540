// Dequantizes matrices for kernels and libraries that read elements.

struct DequantizeWords {
    uint columns;
    uint format;
    // total number of weights, divided by eight
    uint count;
    uint has_ids;
};

// Dequantizes all rows of a matrix, or the rows in `ids`. One thread dequantizes eight weights.
KERNEL(dequantize)(IN(uchar, blocks, 0), IN(uint, ids, 1), OUT(T, y, 2), WORDS(DequantizeWords, 3) INDICES) {
    const uint index = group.x * threads + me;
    if (index >= p.count) return;
    const uint of_row = p.columns / 8;
    const uint row = index / of_row;
    float values[8];
    load8_row(row_of(blocks, p.format, p.has_ids ? ids[row] : row, p.columns), p.format, index % of_row * 8, values);
    GLOBAL T* to = y + wide(index) * 8;
    store4(to, values);
    store4(to + 4, values + 4);
}
