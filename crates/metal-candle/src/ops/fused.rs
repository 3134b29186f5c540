//! Fused launches for the linear layers of a block on GPUs. The number of launches does not depend on the low-rank
//! updates: one launch computes the products with A (or, in the backward pass, with B) of all layers that share an
//! input, and the elementwise kernel that follows adds the rest of the updates. On Metal the first launch also computes
//! the products with the weights, which are cuBLAS's on CUDA.

use super::activation::{self, Activation};
use super::gpu::{self, Arg, Formats, Grid, Kernel, ROW_THREADS, Source, Word};
use super::linear::{Linear, LowRankGradients};
use super::low_rank::{LowRank, LowRankUpdates};
use super::low_rank_gpu::{self, MAX_RANK, RANK_MULTIPLE, WIDTH_MULTIPLE};
use super::norm::Norm;
use super::rotary::Rotation;
use super::weight::Weight;
use crate::error::Result;
use crate::profile::{Kind, span};
use candle_core::{DType, Device, Tensor};

/// Tokens per thread where a low-rank update is added.
pub(super) const UPDATE_ROWS: usize = 4;
/// Rows of a tile of `product.metal`; also its columns, except in [`low_rank_gradients`].
const TILE: usize = 64;
const PRODUCT_THREADS: usize = 128;
/// The maximum number of layers that share an input.
const MAX_LAYERS: usize = 3;

/// Whether there are fused kernels for activations of this type on the device.
pub(crate) fn has_kernels(device: &Device, dtype: DType) -> bool {
    device.is_metal() || (cfg!(feature = "cuda") && device.is_cuda() && dtype != DType::F32)
}

/// Whether the fused kernels support the layer's weights: contiguous, on a GPU, and of type `dtype`.
pub(crate) fn supports(linear: &Linear, may_have_bias: bool, dtype: DType) -> bool {
    let fits =
        |tensor: &Tensor| has_kernels(tensor.device(), dtype) && tensor.dtype() == dtype && tensor.is_contiguous();
    let weight = &linear.weight;
    let is_read = if weight.block_format().is_some() {
        has_kernels(weight.device(), dtype) && weight.dtype() == dtype
    } else {
        weight.dense().is_ok_and(fits)
    };
    let is_wide = weight.device().is_metal() || weight.dims().iter().all(|width| width.is_multiple_of(WIDTH_MULTIPLE));
    is_read && is_wide && linear.bias.as_ref().is_none_or(|bias| may_have_bias && fits(bias))
}

/// Whether the fused kernels support the low-rank update for inputs of type `dtype`.
fn is_plain(update: &LowRank, dtype: DType, is_training: bool) -> bool {
    let drops = is_training && update.dropout > 0.0;
    let rank = update.a.dims()[0];
    let fits = |tensor: &Tensor| {
        if tensor.device().is_metal() {
            tensor.dtype() == dtype && tensor.is_contiguous()
        } else {
            gpu::supports_vector_loads(tensor, dtype) && rank.is_multiple_of(RANK_MULTIPLE) && rank <= MAX_RANK
        }
    };
    !drops && update.initial_factors.is_none() && update.magnitude.is_none() && fits(&update.a) && fits(&update.b)
}

/// Whether one launch computes the gradients of a block's low-rank updates in training.
pub(crate) fn gathers_gradients(updates: &LowRankUpdates, device: &Device, dtype: DType) -> bool {
    has_kernels(device, dtype) && updates.iter().any(|(_, update)| is_plain(update, dtype, true))
}

/// A linear layer and its low-rank update.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layer<'a> {
    pub(crate) linear: &'a Linear,
    pub(crate) update: Option<&'a LowRank>,
}

impl<'a> Layer<'a> {
    /// Whether the layer has no low-rank update, or one that the fused kernels support for inputs of type `dtype`.
    pub(crate) fn has_plain_update(&self, dtype: DType, is_training: bool) -> bool {
        self.update.is_none_or(|update| is_plain(update, dtype, is_training))
    }

    /// The weight as a kernel argument.
    fn weight(&self) -> Result<Arg<'a>> {
        self.linear.weight.stored().map(Arg::In)
    }

    /// The rank of the low-rank update, 0 if there is none.
    fn rank(&self) -> usize {
        self.update.map_or(0, |update| update.a.dims()[0])
    }

    fn scale(&self) -> f32 {
        self.update.map_or(0.0, |update| update.scale)
    }

    fn a(&self) -> Arg<'a> {
        self.update.map_or(Arg::None, |update| Arg::In(&update.a))
    }

    fn b(&self) -> Arg<'a> {
        self.update.map_or(Arg::None, |update| Arg::In(&update.b))
    }

    fn empty_z(&self, tokens: usize, like: &Tensor) -> Result<Option<Tensor>> {
        if self.rank() == 0 { Ok(None) } else { gpu::empty((tokens, self.rank()), like).map(Some) }
    }
}

fn read(tensor: Option<&Tensor>) -> Arg<'_> {
    tensor.map_or(Arg::None, Arg::In)
}

fn written(tensor: Option<&Tensor>) -> Arg<'_> {
    tensor.map_or(Arg::None, Arg::Out)
}

/// One argument for each of the [`MAX_LAYERS`] layers of a kernel; missing ones are `Arg::None`.
fn each<'a>(found: impl Iterator<Item = Arg<'a>>) -> [Arg<'a>; MAX_LAYERS] {
    let mut all = [Arg::None; MAX_LAYERS];
    for (index, arg) in all.iter_mut().zip(found) {
        *index = arg;
    }
    all
}

fn each_word(found: impl Iterator<Item = Word>) -> [Word; MAX_LAYERS] {
    let mut all = [Word(0); MAX_LAYERS];
    for (index, word) in all.iter_mut().zip(found) {
        *index = word;
    }
    all
}

/// The block formats of the layers' weights.
fn formats(layers: &[Layer]) -> Formats {
    layers.iter().map(|layer| layer.linear.weight.block_format()).collect()
}

/// A kernel of `product.metal`.
fn product(name: &'static str, kind: usize, columns: usize, args: &[Arg], like: &Tensor, formats: Formats) -> Kernel {
    let is_aligned = args.iter().all(|arg| match arg {
        // a row of blocks is a multiple of eight elements
        Arg::In(tensor) if tensor.dtype() != DType::U8 => {
            let row = tensor.dims().last().copied().unwrap_or(0);
            row.is_multiple_of(4) && gpu::are_aligned_to_four(&[tensor])
        }
        _ => true,
    });
    Kernel::new(Source::Product, name, like.dtype())
        .with("KIND", kind)
        .with("COLUMNS", columns)
        .with("ALIGNED", usize::from(is_aligned))
        .with("FORMATS", formats.constant())
}

/// The low-rank update of each layer, and the tensor for its product with A or B.
fn updated<'a>(layers: &[Layer<'a>], made: &'a [Option<Tensor>]) -> Vec<Option<(&'a LowRank, &'a Tensor)>> {
    layers.iter().zip(made).map(|(layer, made)| layer.update.zip(made.as_ref())).collect()
}

/// The products of layers that share an input, by layer.
#[derive(Debug)]
pub(crate) struct Products {
    /// The product with the weight, without bias and low-rank update: `[tokens, out_features]`; empty if only the
    /// products with A were computed.
    pub(crate) y: Vec<Tensor>,
    /// The product with A: `[tokens, rank]`.
    pub(crate) z: Vec<Option<Tensor>>,
}

/// The products of `x: [tokens, in_features]` with A of up to three layers, and with their weights if `with_weights`.
pub(crate) fn products(x: &Tensor, layers: &[Layer], with_weights: bool) -> Result<Products> {
    let _span = span("products", Kind::Gemm);
    let (tokens, k) = x.dims2()?;
    let width = |layer: &Layer| layer.linear.weight.dims2().map(|(rows, _)| if with_weights { rows } else { 0 });
    let mut made = Products { y: Vec::new(), z: Vec::new() };
    let mut widths = [0; 2 * MAX_LAYERS];
    for (index, layer) in layers.iter().enumerate() {
        widths[index] = width(layer)?;
        widths[MAX_LAYERS + index] = layer.rank();
        if with_weights {
            made.y.push(gpu::empty((tokens, widths[index]), x)?);
        }
        made.z.push(layer.empty_z(tokens, x)?);
    }
    if gpu::has_products(x) {
        let weights: Vec<(&Weight, &Tensor)> = layers.iter().map(|layer| &layer.linear.weight).zip(&made.y).collect();
        Weight::multiply_together(x, &weights, None)?;
        low_rank_gpu::products_with_a(x, &updated(layers, &made.z))?;
        return Ok(made);
    }
    let weights = layers.iter().map(Layer::weight).collect::<Result<Vec<_>>>()?;
    let mut args = vec![Arg::In(x)];
    args.extend(each(weights.into_iter()));
    args.extend(each(layers.iter().map(Layer::a)));
    args.extend(each(made.y.iter().map(Arg::Out)));
    args.extend(each(made.z.iter().map(|z| written(z.as_ref()))));
    let mut words: Vec<Word> = vec![tokens.into(), k.into()];
    let mut columns = 0;
    words.extend(widths.map(|width| {
        columns += width;
        Word::from(columns)
    }));
    words.extend(each_word(layers.iter().map(|layer| layer.linear.weight.format_word())));
    let kernel = product("products", 0, TILE, &args, x, formats(layers));
    let grid = Grid::plane((columns.div_ceil(TILE), tokens.div_ceil(TILE)), PRODUCT_THREADS);
    gpu::launch(&kernel, grid, &args, &words)?;
    Ok(made)
}

/// The gradient with respect to the input that up to three layers share, if `needs_input`, without the part that flows
/// through their low-rank updates; and the gradient with respect to each layer's z: `scale dy B`.
pub(crate) fn products_backward(
    layers: &[Layer],
    dys: &[&Tensor],
    needs_input: bool,
) -> Result<(Option<Tensor>, Vec<Option<Tensor>>)> {
    let _span = span("products", Kind::Gemm);
    let (tokens, width) = (dys[0].dim(0)?, layers[0].linear.weight.dims2()?.1);
    let dx = if needs_input { Some(gpu::empty((tokens, width), dys[0])?) } else { None };
    let dzs = layers.iter().map(|layer| layer.empty_z(tokens, dys[0])).collect::<Result<Vec<_>>>()?;
    if gpu::has_products(dys[0]) {
        if let Some(dx) = &dx {
            for (index, (layer, dy)) in layers.iter().zip(dys).enumerate() {
                let beta = if index == 0 { 0.0 } else { 1.0 };
                layer.linear.weight.multiply_on_gpu(dx, dy, false, (1.0, beta), None)?;
            }
        }
        low_rank_gpu::products_with_b(dys, &updated(layers, &dzs))?;
        return Ok((dx, dzs));
    }
    let width = if needs_input { width } else { 0 };
    let weights = layers.iter().map(Layer::weight).collect::<Result<Vec<_>>>()?;
    let mut args = Vec::new();
    args.extend(each(dys.iter().map(|dy| Arg::In(dy))));
    args.extend(each(weights.into_iter()));
    args.extend(each(layers.iter().map(Layer::b)));
    args.push(written(dx.as_ref()));
    args.extend(each(dzs.iter().map(|dz| written(dz.as_ref()))));
    let mut words: Vec<Word> = vec![tokens.into(), width.into()];
    words.extend(each_word(dys.iter().map(|dy| dy.dims()[1].into())));
    words.extend(each_word(layers.iter().map(|layer| layer.rank().into())));
    words.extend(each_word(layers.iter().map(|layer| layer.scale().into())));
    let tiles = width.div_ceil(TILE) + layers.iter().map(|layer| layer.rank().div_ceil(TILE)).sum::<usize>();
    words.extend(each_word(layers.iter().map(|layer| layer.linear.weight.format_word())));
    let kernel = product("products_backward", 1, TILE, &args, dys[0], formats(layers));
    let grid = Grid::plane((tiles, tokens.div_ceil(TILE)), PRODUCT_THREADS);
    gpu::launch(&kernel, grid, &args, &words)?;
    Ok((dx, dzs))
}

/// Adds biases and low-rank updates to q, k and v, and rotates whole heads of q and k if `rotation` is given. All in
/// place.
pub(crate) fn finish_qkv(
    rotation: Option<&Rotation>,
    head_dim: usize,
    layers: &[Layer; MAX_LAYERS],
    made: &Products,
) -> Result<()> {
    let _span = span("rotary", Kind::Elementwise);
    let half = head_dim / 2;
    let (cos, sin) = rotation.map(Rotation::tables).unzip();
    let (tokens, q_width) = made.y[0].dims2()?;
    let (q_heads, kv_heads) = (q_width / (2 * half), made.y[1].dim(1)? / (2 * half));
    let mut args = vec![read(cos), read(sin)];
    args.extend(made.y.iter().map(Arg::Out));
    args.extend(layers.iter().map(|layer| read(layer.linear.bias.as_ref())));
    args.extend(made.z.iter().map(|z| read(z.as_ref())));
    args.extend(layers.iter().map(Layer::b));
    let mut words: Vec<Word> =
        vec![tokens.into(), q_heads.into(), kv_heads.into(), half.into(), rotation.is_some().into()];
    words.extend(layers.iter().map(|layer| Word::from(layer.linear.bias.is_some())));
    words.extend(layers.iter().map(|layer| Word::from(layer.rank())));
    words.extend(layers.iter().map(|layer| Word::from(layer.scale())));
    let others = layers.iter().map(|layer| layer.linear.bias.as_ref()).chain([cos, sin]);
    let kernel = Finish::new("finish_qkv", layers, head_dim, &made.y[0], others);
    let columns = (q_heads + 2 * kv_heads) * half;
    kernel.launch_by_column(tokens, (columns, 2 * columns / TILE_COLUMNS), &args, &words)
}

/// A kernel that adds low-rank updates to results.
enum Finish {
    /// A kernel of `fused.metal`: a thread has [`UPDATE_ROWS`] tokens.
    Rows(Kernel),
    /// A kernel of `cuda/fused.cu`: a warp has tiles of tokens and [`TILE_COLUMNS`] columns.
    Tiles(Kernel),
}

/// The columns of a tile of `cuda/fused.cu`, and the tokens of a thread group whose warps share rows.
const TILE_COLUMNS: usize = 64;
const BLOCK_TOKENS: usize = 16;

/// The number of tokens for which a warp loads the factors of an update once, if warps do not share rows.
fn warp_tokens(tokens: usize) -> usize {
    if tokens >= 2048 { 32 } else { 8 }
}

/// Whether `cuda/fused.cu` adds the low-rank updates of `layers` to rows of `width` elements.
fn uses_tiles(layers: &[Layer], width: usize, like: &Tensor) -> bool {
    gpu::has_products(like)
        && like.dtype() != DType::F32
        && width.is_multiple_of(TILE_COLUMNS)
        && layers.iter().any(|layer| layer.rank() > 0)
}

impl Finish {
    /// `like` and `others` are inputs; `others` may start anywhere, so tiles are used only if they start at a multiple of
    /// eight elements.
    fn new<'t>(
        name: &'static str,
        layers: &[Layer],
        width: usize,
        like: &Tensor,
        others: impl IntoIterator<Item = Option<&'t Tensor>>,
    ) -> Self {
        let mut others = others.into_iter().flatten();
        let are_aligned = others.all(|tensor| tensor.layout().start_offset().is_multiple_of(8));
        if !are_aligned || !uses_tiles(layers, width, like) {
            return Self::Rows(Kernel::new(Source::Fused, name, like.dtype()));
        }
        let rank = layers.iter().map(Layer::rank).max().unwrap_or(0);
        let steps = rank.div_ceil(16).next_power_of_two();
        // more groups keep the memory busy, if there are enough registers
        let beside = match name {
            "finish_mlp" if steps == 1 => 3,
            "finish_mlp_backward" | "finish_norm_backward" if steps > 1 => 1,
            _ => 2,
        };
        let kernel = Kernel::new(Source::TensorCoreFused, name, like.dtype()).with("RANK_STEPS", steps);
        let tokens = warp_tokens(like.dims()[0]);
        Self::Tiles(kernel.with("BLOCKS_BESIDE", beside).with("WARP_TOKENS", tokens))
    }

    /// Launches a thread for each of `columns` columns of a row, or a warp for each of `tiles` tiles.
    fn launch_by_column(
        &self,
        tokens: usize,
        (columns, tiles): (usize, usize),
        args: &[Arg],
        words: &[Word],
    ) -> Result<()> {
        match self {
            Self::Rows(kernel) => {
                gpu::launch(kernel, Grid::elements(tokens.div_ceil(UPDATE_ROWS) * columns), args, words)
            }
            Self::Tiles(kernel) => {
                let groups = (tiles.div_ceil(ROW_THREADS / 32), tokens.div_ceil(warp_tokens(tokens)));
                gpu::launch(kernel, Grid::plane(groups, ROW_THREADS), args, words)
            }
        }
    }

    /// Launches a thread group for some tokens.
    fn launch_by_token(&self, tokens: usize, args: &[Arg], words: &[Word]) -> Result<()> {
        let (kernel, rows) = match self {
            Self::Rows(kernel) => (kernel, UPDATE_ROWS),
            Self::Tiles(kernel) => (kernel, BLOCK_TOKENS),
        };
        gpu::launch(kernel, Grid::row(tokens.div_ceil(rows), ROW_THREADS), args, words)
    }
}

/// Adds low-rank updates to gate and up, in place on Metal, and returns `silu(gate) * up`.
pub(crate) fn finish_mlp(layers: &[Layer; 2], made: &Products) -> Result<Tensor> {
    let _span = span("swiglu", Kind::Elementwise);
    let (tokens, width) = made.y[0].dims2()?;
    let kernel = Finish::new("finish_mlp", layers, width, &made.y[0], []);
    if gpu::has_products(&made.y[0]) && made.z.iter().all(Option::is_none) {
        return activation::gated(Activation::Silu, &made.y[0], &made.y[1]);
    }
    let y = gpu::empty((tokens, width), &made.y[0])?;
    let mut args: Vec<Arg> = made.y.iter().map(Arg::Out).collect();
    args.push(Arg::Out(&y));
    args.extend(made.z.iter().map(|z| read(z.as_ref())));
    args.extend(layers.iter().map(Layer::b));
    let mut words: Vec<Word> = vec![tokens.into(), width.into()];
    words.extend(layers.iter().map(|layer| Word::from(layer.rank())));
    words.extend(layers.iter().map(|layer| Word::from(layer.scale())));
    kernel.launch_by_column(tokens, (width, width / TILE_COLUMNS), &args, &words)?;
    Ok(y)
}

/// Adds the low-rank updates to gate and up where [`finish_mlp`] has not changed them.
pub(crate) fn complete_mlp(layers: &[Layer; 2], (gate, up): (&Tensor, &Tensor), z: &[Option<Tensor>]) -> Result<()> {
    if !uses_tiles(layers, gate.dim(1)?, gate) {
        return Ok(());
    }
    for ((layer, y), z) in layers.iter().zip([gate, up]).zip(z) {
        if let (Some(update), Some(z)) = (layer.update, z) {
            gpu::product(y, (z, false), (&update.b, true), update.scale, 1.0)?;
        }
    }
    Ok(())
}

/// The gradients of gate and up, and the recomputed activation. `made` and `layers` are the arguments of [`finish_mlp`].
/// `d_activation` is the gradient of the activation without the part that flows through the low-rank update of `down`.
pub(crate) fn finish_mlp_backward(
    layers: &[Layer; 2],
    made: &Products,
    d_activation: Tensor,
    down: Layer,
    dz: Option<&Tensor>,
) -> Result<(Tensor, Tensor, Tensor)> {
    let _span = span("swiglu", Kind::Elementwise);
    let (gate, up) = (&made.y[0], &made.y[1]);
    let (tokens, width) = gate.dims2()?;
    let (d_up, y) = (gpu::empty((tokens, width), gate)?, gpu::empty((tokens, width), gate)?);
    let outs = [&d_activation, &d_up, &y].map(Arg::Out);
    let mut args: Vec<Arg> = [Arg::In(gate), Arg::In(up)].into_iter().chain(outs).chain([read(dz), down.a()]).collect();
    let mut words = vec![tokens.into(), width.into(), down.rank().into()];
    let kernel = Finish::new("finish_mlp_backward", &[layers[0], layers[1], down], width, gate, []);
    if matches!(kernel, Finish::Tiles(_)) {
        args.extend(made.z.iter().map(|z| read(z.as_ref())));
        args.extend(layers.iter().map(Layer::b));
        words.extend(layers.iter().map(|layer| Word::from(layer.rank())));
        words.extend(layers.iter().map(|layer| Word::from(layer.scale())));
    }
    kernel.launch_by_column(tokens, (width, width / TILE_COLUMNS), &args, &words)?;
    Ok((d_activation, d_up, y))
}

/// The residual stream after a layer, `residual + y + update`, written over `y`, and its norm if `norm` is given.
pub(crate) fn finish_stream(
    residual: &Tensor,
    y: Tensor,
    layer: Layer,
    z: Option<&Tensor>,
    norm: Option<&Norm>,
) -> Result<(Tensor, Option<Tensor>)> {
    let _span = span("rms_norm", Kind::Elementwise);
    let (tokens, width) = y.dims2()?;
    let normed = norm.map(|_| gpu::empty((tokens, width), &y)).transpose()?;
    let args = [
        Arg::In(residual),
        Arg::Out(&y),
        read(norm.and_then(Norm::plain_weight)),
        written(normed.as_ref()),
        read(z),
        layer.b(),
    ];
    let eps = norm.map_or(0.0, |norm| norm.eps as f32);
    let words =
        [tokens.into(), width.into(), eps.into(), norm.is_some().into(), layer.rank().into(), layer.scale().into()];
    let weight = norm.and_then(Norm::plain_weight);
    Finish::new("finish_stream", &[layer], width, &y, [weight]).launch_by_token(tokens, &args, &words)?;
    Ok((y, normed))
}

/// The backward pass of the norm of `x` before `layers`: the gradient with respect to `x`, added to `before`, and the
/// recomputed output of the norm. `d_normed` is the gradient of that output without the part that flows through the
/// low-rank updates.
pub(crate) fn finish_norm_backward(
    norm: &Norm,
    x: &Tensor,
    d_normed: Tensor,
    before: &Tensor,
    layers: &[Layer],
    dzs: &[Option<Tensor>],
) -> Result<(Tensor, Tensor)> {
    let _span = span("rms_norm", Kind::Elementwise);
    let (tokens, width) = x.dims2()?;
    let normed = gpu::empty((tokens, width), x)?;
    let weight = read(norm.plain_weight());
    let mut args = vec![Arg::In(x), weight, Arg::Out(&d_normed), Arg::In(before), Arg::Out(&normed)];
    args.extend(each(dzs.iter().map(|dz| read(dz.as_ref()))));
    args.extend(each(layers.iter().map(Layer::a)));
    let mut words: Vec<Word> = vec![tokens.into(), width.into(), (norm.eps as f32).into()];
    words.extend(each_word(layers.iter().map(|layer| layer.rank().into())));
    Finish::new("finish_norm_backward", layers, width, x, [norm.plain_weight()])
        .launch_by_token(tokens, &args, &words)?;
    Ok((d_normed, normed))
}

/// A buffer for the gradients of all low-rank updates of an adapter, by layer id, A before B.
#[derive(Debug, Clone)]
pub(crate) struct LowRankGradientBuffer {
    /// `[elements]`, f32.
    pub(crate) flat: Tensor,
    offsets: Vec<Option<usize>>,
}

impl LowRankGradientBuffer {
    /// A buffer for the low-rank updates of the layers with ids below `count` that the fused kernels support in
    /// training, on the device of `like`; `None` if there are none.
    pub(crate) fn new(updates: &LowRankUpdates, count: usize, like: &Tensor) -> Result<Option<Self>> {
        let (mut offsets, mut end) = (vec![None; count], 0);
        if !has_kernels(like.device(), like.dtype()) {
            return Ok(None);
        }
        for (id, update) in updates.iter().filter(|(id, of)| *id < count && is_plain(of, like.dtype(), true)) {
            offsets[id] = Some(end);
            end += update.a.elem_count() + update.b.elem_count();
        }
        if end == 0 { Ok(None) } else { Ok(Some(Self { flat: gpu::empty_f32(end, like)?, offsets })) }
    }

    fn gradients(&self, start: usize, update: &LowRank) -> Result<LowRankGradients> {
        let part = |start, like: &Tensor| self.flat.narrow(0, start, like.elem_count())?.reshape(like.shape());
        let (a, b) = (part(start, &update.a)?, part(start + update.a.elem_count(), &update.b)?);
        Ok(LowRankGradients { a, b, magnitude: None })
    }
}

/// The tensors from which the gradients of a layer's low-rank update are computed.
#[derive(Debug)]
pub(crate) struct GradientFactors<'a> {
    /// The layer's id.
    pub(crate) id: usize,
    pub(crate) layer: Layer<'a>,
    pub(crate) x: Tensor,
    pub(crate) dy: Tensor,
    pub(crate) z: Option<Tensor>,
    pub(crate) dz: Option<Tensor>,
}

/// The maximum numbers of source tensors and of gradients of the kernel `term_gradients`.
const SOURCES: usize = 25;
const GRADIENTS: usize = 14;

/// The gradients of the low-rank updates of up to seven layers, in one launch, with the ids of the layers.
pub(crate) fn low_rank_gradients<'s>(
    factors: &'s [GradientFactors],
    buffer: &LowRankGradientBuffer,
) -> Result<Vec<(usize, LowRankGradients)>> {
    let _span = span("outer product", Kind::Gemm);
    let mut sources: Vec<&'s Tensor> = Vec::new();
    let mut index_of = |tensor: &'s Tensor| {
        sources.iter().position(|source| source.id() == Tensor::id(tensor)).unwrap_or_else(|| {
            sources.push(tensor);
            sources.len() - 1
        })
    };
    let (mut words, mut made, mut tiles, mut max_rank) = (Vec::<Word>::new(), Vec::new(), 0, 0);
    for factor in factors {
        let (Some(z), Some(dz), Some(update)) = (&factor.z, &factor.dz, factor.layer.update) else { continue };
        let Some(start) = buffer.offsets.get(factor.id).copied().flatten() else { continue };
        let start_of_b = start + update.a.elem_count();
        for (wide, narrow, is_a, scale, start) in
            [(&factor.x, dz, true, 1.0, start), (&factor.dy, z, false, update.scale, start_of_b)]
        {
            let (features, rank) = (wide.dim(1)?, narrow.dim(1)?);
            tiles += features.div_ceil(TILE);
            max_rank = rank.max(max_rank);
            words.extend([index_of(wide), index_of(narrow), features, rank, usize::from(is_a)].map(Word::from));
            words.extend([Word::from(scale), start.into(), tiles.into()]);
        }
        made.push((factor.id, buffer.gradients(start, update)?));
    }
    if made.is_empty() {
        return Ok(made);
    }
    let count = 2 * made.len();
    words.resize(words.len() / count * GRADIENTS, Word(0));
    let tokens = sources[0].dim(0)?;
    words.splice(0..0, [tokens.into(), count.into()]);
    let mut args: Vec<Arg> = sources.iter().map(|source| Arg::In(source)).collect();
    args.resize(SOURCES, Arg::None);
    args.push(Arg::Out(&buffer.flat));
    // ranks are often much smaller than a tile's width
    let columns = max_rank.next_power_of_two().clamp(16, TILE);
    let mut grid = Grid::plane((tiles, max_rank.div_ceil(columns)), PRODUCT_THREADS);
    let kernel = if gpu::has_products(sources[0]) {
        low_rank_gpu::gradients_kernel(columns, &mut grid, sources[0])
    } else {
        product("term_gradients", 2, columns, &args, sources[0], Formats::default())
    };
    gpu::launch(&kernel, grid, &args, &words)?;
    Ok(made)
}
