//! Launches the products with the factors A and B of low-rank updates on the tensor cores of CUDA devices
//! (`cuda/low_rank.cu`).

use super::gpu::{self, Arg, Grid, Kernel, Source, Word};
use super::low_rank::LowRank;
use crate::error::Result;
use candle_core::Tensor;

/// The kernels support ranks and widths that are a multiple of these.
pub(super) const RANK_MULTIPLE: usize = 8;
pub(super) const WIDTH_MULTIPLE: usize = 8;
/// The maximum rank for which fused kernels are faster than separate products.
pub(super) const MAX_RANK: usize = 32;

/// The thread group size of products.
const THREADS: usize = 256;
/// Tokens per thread group of a product.
const TOKENS: usize = 32;
/// The maximum number of tiles of eight columns that a thread group computes.
const MAX_TILES: usize = 6;
/// Features and tokens in a stage of the gradients' kernel, and the padding of its rows.
const TILE: usize = 64;
const DEPTH: usize = 64;
const PADDING: usize = 8;

/// A low-rank update, and the tensor for its product: `[tokens, rank]`.
type Product<'a> = Option<(&'a LowRank, &'a Tensor)>;

fn rank(product: &Product) -> usize {
    product.map_or(0, |(update, _)| update.a.dims()[0])
}

/// A kernel for products of `tiles` tiles of columns, and the number of thread groups that share them.
fn kernel(name: &'static str, tiles: usize, like: &Tensor) -> (Kernel, usize) {
    let groups = tiles.div_ceil(MAX_TILES);
    let kernel = Kernel::new(Source::LowRank, name, like.dtype());
    (kernel.with("KIND", 0).with("NTILES", tiles.div_ceil(groups)), groups)
}

/// One value for each of the three layers of a kernel; those of missing layers are `none`.
fn each<T: Copy>(found: impl Iterator<Item = T>, none: T) -> [T; 3] {
    let mut all = [none; 3];
    for (slot, value) in all.iter_mut().zip(found) {
        *slot = value;
    }
    all
}

fn written<'a>(product: &Product<'a>) -> Arg<'a> {
    product.map_or(Arg::None, |(_, to)| Arg::Out(to))
}

/// `z = x A^T` for up to three layers that share `x: [tokens, width]`.
pub(super) fn products_with_a(x: &Tensor, products: &[Product]) -> Result<()> {
    let (tokens, width) = x.dims2()?;
    let tiles = products.iter().map(rank).sum::<usize>() / 8;
    if tiles == 0 {
        return Ok(());
    }
    let mut args = vec![Arg::In(x)];
    args.extend(each(products.iter().map(|of| of.map_or(Arg::None, |(update, _)| Arg::In(&update.a))), Arg::None));
    args.extend(each(products.iter().map(written), Arg::None));
    let mut words: Vec<Word> = vec![tokens.into(), width.into()];
    words.extend(each(products.iter().map(|of| Word::from(rank(of))), Word(0)));
    let (kernel, groups) = kernel("products_with_a", tiles, x);
    gpu::launch(&kernel, Grid::plane((tokens.div_ceil(TOKENS), groups), THREADS), &args, &words)
}

/// `dz = scale dy B` for up to three layers with the gradients `dys` of their outputs.
pub(super) fn products_with_b(dys: &[&Tensor], products: &[Product]) -> Result<()> {
    let tokens = dys[0].dim(0)?;
    let tiles = products.iter().map(rank).max().unwrap_or(0) / 8;
    if tiles == 0 {
        return Ok(());
    }
    let mut args = Vec::new();
    args.extend(each(dys.iter().map(|dy| Arg::In(dy)), Arg::None));
    args.extend(each(products.iter().map(|of| of.map_or(Arg::None, |(update, _)| Arg::In(&update.b))), Arg::None));
    args.extend(each(products.iter().map(written), Arg::None));
    let mut words: Vec<Word> = vec![tokens.into()];
    words.extend(each(dys.iter().map(|dy| Word::from(dy.dims()[1])), Word(0)));
    words.extend(each(products.iter().map(|of| Word::from(rank(of))), Word(0)));
    words.extend(each(products.iter().map(|of| Word::from(of.map_or(0.0, |(update, _)| update.scale))), Word(0)));
    let (kernel, groups) = kernel("products_with_b", tiles, dys[0]);
    let mut grid = Grid::plane((tokens.div_ceil(TOKENS), products.len()), THREADS);
    grid.groups[2] = groups;
    gpu::launch(&kernel, grid, &args, &words)
}

/// The kernel of the gradients of low-rank updates, for tiles of `columns` columns of z and dz. Adds its shared memory
/// to `grid`.
pub(super) fn gradients_kernel(columns: usize, grid: &mut Grid, like: &Tensor) -> Kernel {
    let stages = if columns <= 16 { 4 } else { 3 };
    grid.shared_bytes = stages * DEPTH * (TILE + columns + 2 * PADDING) * like.dtype().size_in_bytes();
    Kernel::new(Source::LowRank, "term_gradients", like.dtype())
        .with("KIND", 2)
        .with("COLUMNS", columns)
        .with("STAGES", stages)
}
