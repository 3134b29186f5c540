//! The layers of a block on Metal, in launches whose number does not depend on the terms: the product with A, or with B on the
//! way back, is part of the launch of the product with the weight, and what comes between two products adds the rest of the term.

use super::gpu::{self, Arg, Formats, Grid, Kernel, ROW_THREADS, Source, Word};
use super::linear::{Linear, TermGradients};
use super::low_rank::{LowRank, LowRankTerms};
use super::norm::Norm;
use super::rotary::Rotation;
use crate::error::Result;
use crate::profile::{Kind, span};
use candle_core::{DType, Tensor};

/// Tokens that a thread takes where a term is added.
pub(super) const TERM_ROWS: usize = 4;
/// Rows of a tile of `product.metal`, and its columns unless all are few.
const TILE: usize = 64;
const PRODUCT_THREADS: usize = 128;
/// The most layers that share an input.
const MOST: usize = 3;

/// Whether this module takes the weights of a layer: they are those of a Metal device, whole, and of type `dtype`.
pub(crate) fn takes(linear: &Linear, may_have_bias: bool, dtype: DType) -> bool {
    let fits = |tensor: &Tensor| tensor.device().is_metal() && tensor.dtype() == dtype && tensor.is_contiguous();
    let weight = &linear.weight;
    let is_read = if weight.block_format().is_some() {
        weight.device().is_metal() && weight.dtype() == dtype
    } else {
        weight.dense().is_ok_and(fits)
    };
    is_read && linear.bias.as_ref().is_none_or(|bias| may_have_bias && fits(bias))
}

/// A linear layer and its term.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layer<'a> {
    pub(crate) linear: &'a Linear,
    pub(crate) term: Option<&'a LowRank>,
}

impl<'a> Layer<'a> {
    /// Whether this module takes its term, if it has one, with inputs of type `dtype`.
    pub(crate) fn has_plain_term(&self, dtype: DType, is_training: bool) -> bool {
        let fits = |tensor: &Tensor| tensor.dtype() == dtype && tensor.is_contiguous();
        self.term.is_none_or(|term| {
            let drops = is_training && term.dropout > 0.0;
            !drops && term.start.is_none() && term.magnitude.is_none() && fits(&term.a) && fits(&term.b)
        })
    }

    /// The argument of a kernel that stands for the weight.
    fn weight(&self) -> Result<Arg<'a>> {
        self.linear.weight.stored().map(Arg::In)
    }

    /// The term's rank, 0 if there is none.
    fn rank(&self) -> usize {
        self.term.map_or(0, |term| term.a.dims()[0])
    }

    fn scale(&self) -> f32 {
        self.term.map_or(0.0, |term| term.scale)
    }

    pub(super) fn a(&self) -> Arg<'a> {
        self.term.map_or(Arg::None, |term| Arg::In(&term.a))
    }

    fn b(&self) -> Arg<'a> {
        self.term.map_or(Arg::None, |term| Arg::In(&term.b))
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

/// One argument for each layer that a kernel has room for.
fn each<'a>(found: impl Iterator<Item = Arg<'a>>) -> [Arg<'a>; MOST] {
    let mut all = [Arg::None; MOST];
    for (place, arg) in all.iter_mut().zip(found) {
        *place = arg;
    }
    all
}

fn each_word(found: impl Iterator<Item = Word>) -> [Word; MOST] {
    let mut all = [Word(0); MOST];
    for (place, word) in all.iter_mut().zip(found) {
        *place = word;
    }
    all
}

/// The formats of the weights of layers.
fn formats(layers: &[Layer]) -> Formats {
    layers.iter().map(|layer| layer.linear.weight.block_format()).collect()
}

/// A kernel of `product.metal`.
fn product(name: &'static str, kind: usize, columns: usize, args: &[Arg], like: &Tensor, formats: Formats) -> Kernel {
    let is_aligned = args.iter().all(|arg| match arg {
        // blocks have rows of eights
        Arg::In(tensor) if tensor.dtype() != DType::U8 => {
            let row = tensor.dims().last().copied().unwrap_or(0);
            row.is_multiple_of(4) && gpu::are_aligned(&[tensor])
        }
        _ => true,
    });
    Kernel::new(Source::Product, name, like.dtype())
        .with("KIND", kind)
        .with("COLUMNS", columns)
        .with("ALIGNED", usize::from(is_aligned))
        .with("FORMATS", formats.constant())
}

/// What comes out of layers with the same input, by layer.
#[derive(Debug)]
pub(crate) struct Products {
    /// The product with the weight, without bias and term: `[tokens, out_features]`; none if only terms were asked for.
    pub(crate) y: Vec<Tensor>,
    /// The product with A: `[tokens, rank]`.
    pub(crate) z: Vec<Option<Tensor>>,
}

/// The products of `x: [tokens, in_features]` with the As of at most three layers, and with the weights if `with_weights`.
pub(crate) fn products(x: &Tensor, layers: &[Layer], with_weights: bool) -> Result<Products> {
    let _span = span("products", Kind::Gemm);
    let (tokens, k) = x.dims2()?;
    let width = |layer: &Layer| layer.linear.weight.dims2().map(|(rows, _)| if with_weights { rows } else { 0 });
    let mut made = Products { y: Vec::new(), z: Vec::new() };
    let mut widths = [0; 2 * MOST];
    for (place, layer) in layers.iter().enumerate() {
        widths[place] = width(layer)?;
        widths[MOST + place] = layer.rank();
        if with_weights {
            made.y.push(gpu::empty((tokens, widths[place]), x)?);
        }
        made.z.push(layer.empty_z(tokens, x)?);
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

/// The gradient with respect to the input that at most three layers share, without what goes through their terms, if wanted; and
/// with respect to the z of each, with the term's scale in it: `scale dy B`.
pub(crate) fn products_backward(
    layers: &[Layer],
    dys: &[&Tensor],
    wants_input: bool,
) -> Result<(Option<Tensor>, Vec<Option<Tensor>>)> {
    let _span = span("products", Kind::Gemm);
    let (tokens, width) = (dys[0].dim(0)?, layers[0].linear.weight.dims2()?.1);
    let dx = if wants_input { Some(gpu::empty((tokens, width), dys[0])?) } else { None };
    let dzs = layers.iter().map(|layer| layer.empty_z(tokens, dys[0])).collect::<Result<Vec<_>>>()?;
    let width = if wants_input { width } else { 0 };
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

/// Adds biases and terms to q, k and v and rotates the whole heads of q and k if a rotation is given, all in place.
pub(crate) fn finish_qkv(
    rotation: Option<&Rotation>,
    head_dim: usize,
    layers: &[Layer; MOST],
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
    let count = tokens.div_ceil(TERM_ROWS) * (q_heads + 2 * kv_heads) * half;
    gpu::launch(&fused("finish_qkv", &made.y[0]), Grid::elements(count), &args, &words)
}

fn fused(name: &'static str, like: &Tensor) -> Kernel {
    Kernel::new(Source::Fused, name, like.dtype())
}

/// Adds terms to gate and up, in place, and returns `silu(gate) * up`.
pub(crate) fn finish_mlp(layers: &[Layer; 2], made: &Products) -> Result<Tensor> {
    let _span = span("swiglu", Kind::Elementwise);
    let (tokens, width) = made.y[0].dims2()?;
    let y = gpu::empty((tokens, width), &made.y[0])?;
    let mut args: Vec<Arg> = made.y.iter().map(Arg::Out).collect();
    args.push(Arg::Out(&y));
    args.extend(made.z.iter().map(|z| read(z.as_ref())));
    args.extend(layers.iter().map(Layer::b));
    let mut words: Vec<Word> = vec![tokens.into(), width.into()];
    words.extend(layers.iter().map(|layer| Word::from(layer.rank())));
    words.extend(layers.iter().map(|layer| Word::from(layer.scale())));
    let grid = Grid::elements(tokens.div_ceil(TERM_ROWS) * width);
    gpu::launch(&fused("finish_mlp", &y), grid, &args, &words)?;
    Ok(y)
}

/// The gradients of gate and up and the activation itself, from the gradient of the activation without the term of `down`.
pub(crate) fn finish_mlp_backward(
    (gate, up): (&Tensor, &Tensor),
    d_activation: Tensor,
    down: Layer,
    dz: Option<&Tensor>,
) -> Result<(Tensor, Tensor, Tensor)> {
    let _span = span("swiglu", Kind::Elementwise);
    let (tokens, width) = gate.dims2()?;
    let (d_up, y) = (gpu::empty((tokens, width), gate)?, gpu::empty((tokens, width), gate)?);
    let outs = [&d_activation, &d_up, &y].map(Arg::Out);
    let args: Vec<Arg> = [Arg::In(gate), Arg::In(up)].into_iter().chain(outs).chain([read(dz), down.a()]).collect();
    let words = [tokens.into(), width.into(), down.rank().into()];
    let grid = Grid::elements(tokens.div_ceil(TERM_ROWS) * width);
    gpu::launch(&fused("finish_mlp_backward", gate), grid, &args, &words)?;
    Ok((d_activation, d_up, y))
}

/// The residual stream after a layer, `residual + y + term` in place of `y`, and its norm if there is one.
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
    let grid = Grid::row(tokens.div_ceil(TERM_ROWS), ROW_THREADS);
    gpu::launch(&fused("finish_stream", &y), grid, &args, &words)?;
    Ok((y, normed))
}

/// Back through the norm of `x` in front of layers: the gradient with respect to `x`, added to `before`, and the norm's output
/// again; from the gradient of that output without the layers' terms.
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
    let grid = Grid::row(tokens.div_ceil(TERM_ROWS), ROW_THREADS);
    gpu::launch(&fused("finish_norm_backward", x), grid, &args, &words)?;
    Ok((d_normed, normed))
}

/// Room for the gradients of an adapter's terms, in one tensor: by the numbers of their layers, A before B.
#[derive(Debug, Clone)]
pub(crate) struct TermRoom {
    /// `[elements]`, f32.
    pub(crate) flat: Tensor,
    starts: Vec<Option<usize>>,
}

impl TermRoom {
    /// Room for the terms of the layers with a number below `count`, if there are any, on the device of `like`.
    pub(crate) fn new(terms: &LowRankTerms, count: usize, like: &Tensor) -> Result<Option<Self>> {
        let (mut starts, mut end) = (vec![None; count], 0);
        for (number, term) in terms.iter().filter(|(number, _)| *number < count) {
            starts[number] = Some(end);
            end += term.a.elem_count() + term.b.elem_count();
        }
        if end == 0 { Ok(None) } else { Ok(Some(Self { flat: gpu::empty_f32(end, like)?, starts })) }
    }

    fn gradients(&self, start: usize, term: &LowRank) -> Result<TermGradients> {
        let part = |start, like: &Tensor| self.flat.narrow(0, start, like.elem_count())?.reshape(like.shape());
        let (a, b) = (part(start, &term.a)?, part(start + term.a.elem_count(), &term.b)?);
        Ok(TermGradients { a, b, magnitude: None })
    }
}

/// What the gradients of a term are products of.
#[derive(Debug)]
pub(crate) struct Factors<'a> {
    /// The number of the layer.
    pub(crate) number: usize,
    pub(crate) layer: Layer<'a>,
    pub(crate) x: Tensor,
    pub(crate) dy: Tensor,
    pub(crate) z: Option<Tensor>,
    pub(crate) dz: Option<Tensor>,
}

/// Tensors that the kernel of [`term_gradients`] has room for, and gradients.
const SOURCES: usize = 25;
const GRADIENTS: usize = 14;

/// The gradients of the terms of at most seven layers, in one launch, with the numbers of the layers.
pub(crate) fn term_gradients<'s>(factors: &'s [Factors], room: &TermRoom) -> Result<Vec<(usize, TermGradients)>> {
    let _span = span("outer product", Kind::Gemm);
    let mut sources: Vec<&'s Tensor> = Vec::new();
    let mut place_of = |tensor: &'s Tensor| {
        sources.iter().position(|source| source.id() == Tensor::id(tensor)).unwrap_or_else(|| {
            sources.push(tensor);
            sources.len() - 1
        })
    };
    let (mut words, mut made, mut tiles, mut most) = (Vec::<Word>::new(), Vec::new(), 0, 0);
    for factor in factors {
        let (Some(z), Some(dz), Some(term)) = (&factor.z, &factor.dz, factor.layer.term) else { continue };
        let Some(start) = room.starts.get(factor.number).copied().flatten() else { continue };
        let start_of_b = start + term.a.elem_count();
        for (wide, narrow, is_a, scale, start) in
            [(&factor.x, dz, true, 1.0, start), (&factor.dy, z, false, term.scale, start_of_b)]
        {
            let (features, rank) = (wide.dim(1)?, narrow.dim(1)?);
            tiles += features.div_ceil(TILE);
            most = rank.max(most);
            words.extend([place_of(wide), place_of(narrow), features, rank, usize::from(is_a)].map(Word::from));
            words.extend([Word::from(scale), start.into(), tiles.into()]);
        }
        made.push((factor.number, room.gradients(start, term)?));
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
    args.push(Arg::Out(&room.flat));
    // ranks are often far below a tile's width
    let columns = most.next_power_of_two().clamp(16, TILE);
    let kernel = product("term_gradients", 2, columns, &args, sources[0], Formats::default());
    gpu::launch(&kernel, Grid::plane((tiles, most.div_ceil(columns)), PRODUCT_THREADS), &args, &words)?;
    Ok(made)
}
