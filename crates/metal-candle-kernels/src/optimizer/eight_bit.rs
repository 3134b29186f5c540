//! The step of AdamW with 8-bit moments.

use super::adam::{AdamStep, update};
use super::section::{CHUNK, Section, check};
use crate::parallel::{Shared, for_each};
use std::sync::OnceLock;

/// The number of elements that share a scale; the last block of a section may be shorter.
pub const BLOCK: usize = 256;

/// A map from codes to ascending numbers from -1 or 0 to 1, with an index to find the nearest number.
struct CodeMap {
    values: [f32; 256],
    /// `borders[i]` is the midpoint between codes `i` and `i + 1`; infinity after the last code.
    borders: [f32; 257],
    /// The first possible code for each upper half of the bits of a number.
    first: Vec<u8>,
}

/// The numbers of the dynamic tree code (<https://arxiv.org/abs/2110.02861>, section 2.2): evenly spaced numbers in each of
/// seven decades, with the bits that the exponent does not use, and 0 and 1.
#[must_use]
pub fn dynamic_codes(signed: bool) -> [f32; 256] {
    let mut values = vec![0.0, 1.0];
    for decade in 0..7 {
        let count = 1 << if signed { decade } else { decade + 1 };
        let width = 0.9 / f64::from(count);
        for i in 0..count {
            let value = (0.1 + width * (f64::from(i) + 0.5)) * 10f64.powi(decade - 6);
            values.push(value as f32);
            if signed {
                values.push(-value as f32);
            }
        }
    }
    values.sort_by(f32::total_cmp);
    std::array::from_fn(|code| values[code])
}

impl CodeMap {
    fn new(signed: bool) -> Self {
        let values = dynamic_codes(signed);
        let borders = std::array::from_fn(|code| match values.get(code + 1) {
            Some(next) => f32::midpoint(values[code], *next),
            None => f32::INFINITY,
        });
        let first = (0..=u16::MAX)
            .map(|upper| {
                // the lowest negative number has all lower bits set
                let lower = if upper >> 15 == 1 { 0xffff } else { 0 };
                let smallest = f32::from_bits(u32::from(upper) << 16 | lower);
                borders[..255].partition_point(|&border| border < smallest) as u8
            })
            .collect();
        Self { values, borders, first }
    }

    fn get(signed: bool) -> &'static Self {
        static SIGNED: OnceLock<CodeMap> = OnceLock::new();
        static UNSIGNED: OnceLock<CodeMap> = OnceLock::new();
        if signed { SIGNED.get_or_init(|| Self::new(true)) } else { UNSIGNED.get_or_init(|| Self::new(false)) }
    }

    /// The code of the number nearest to `x`, which is from -1 to 1.
    fn nearest(&self, x: f32) -> u8 {
        let mut code = usize::from(self.first[(x.to_bits() >> 16) as usize]);
        // numbers with the same upper bits straddle at most two borders
        code += usize::from(x > self.borders[code]);
        code += usize::from(x > self.borders[code]);
        code as u8
    }

    fn widen(&self, codes: &[u8], scale: f32, values: &mut [f32]) {
        for (value, code) in values.iter_mut().zip(codes) {
            *value = self.values[usize::from(*code)] * scale;
        }
    }

    /// Writes the codes of `values` and returns their scale. Numbers above 0 get at least the code `min_code`.
    fn narrow(&self, values: &[f32], codes: &mut [u8], min_code: u8) -> f32 {
        let scale = values.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        let factor = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        // the inverse of a subnormal scale is infinite
        let factor = if factor.is_finite() { factor } else { f32::MAX };
        for (code, value) in codes.iter_mut().zip(values) {
            let found = self.nearest((value * factor).clamp(-1.0, 1.0));
            *code = if *value > 0.0 { found.max(min_code) } else { found };
        }
        scale
    }
}

/// Computes one step of AdamW in place with 8-bit moments, in blocks of [`BLOCK`] elements
/// (<https://arxiv.org/abs/2110.02861>, section 2.1).
///
/// `m` and `v` are the codes of the moments, one per parameter; `m_scales` and `v_scales` are the scales of the blocks, starting
/// at `state` for each section. A second moment above 0 never gets the code of 0: the update would divide the first moment by
/// almost zero.
///
/// # Panics
/// The sections are out of order, overlap, or exceed a buffer.
#[allow(clippy::too_many_arguments)]
pub fn adamw_8bit(
    params: &mut [f32],
    grads: &[f32],
    (m, m_scales): (&mut [u8], &mut [f32]),
    (v, v_scales): (&mut [u8], &mut [f32]),
    step: &AdamStep,
    sections: &[Section],
) {
    let len = params.len().min(grads.len()).min(m.len()).min(v.len());
    check(sections.iter().map(|s| (s.start, s.len)), len, "parameters");
    let scales = m_scales.len().min(v_scales.len());
    check(sections.iter().map(|s| (s.state, s.len.div_ceil(BLOCK))), scales, "scales");
    let tasks: Vec<(&Section, usize)> =
        sections.iter().flat_map(|section| (0..section.len).step_by(CHUNK).map(move |done| (section, done))).collect();
    let (params, m, v) = (Shared::new(params), Shared::new(m), Shared::new(v));
    let (m_scales, v_scales) = (Shared::new(m_scales), Shared::new(v_scales));
    let (signed, unsigned) = (CodeMap::get(true), CodeMap::get(false));
    for_each(tasks.len(), len, |task| {
        let (section, done) = tasks[task];
        let step = AdamStep {
            learning_rate: section.learning_rate(step.learning_rate),
            weight_decay: section.weight_decay(step.weight_decay),
            ..*step
        };
        let (mut first, mut second) = ([0.0; BLOCK], [0.0; BLOCK]);
        for at in (done..section.len.min(done + CHUNK)).step_by(BLOCK) {
            let (start, len, block) = (section.start + at, BLOCK.min(section.len - at), section.state + at / BLOCK);
            // SAFETY: blocks are disjoint and within the buffers, as the sections are.
            let (params, m, v, m_scale, v_scale) = unsafe {
                (
                    params.part(start, len),
                    m.part(start, len),
                    v.part(start, len),
                    m_scales.part(block, 1),
                    v_scales.part(block, 1),
                )
            };
            let (first, second) = (&mut first[..len], &mut second[..len]);
            signed.widen(m, m_scale[0], first);
            unsigned.widen(v, v_scale[0], second);
            update(params, &grads[start..start + len], first, second, &step);
            m_scale[0] = signed.narrow(first, m, 0);
            v_scale[0] = unsigned.narrow(second, v, 1);
        }
    });
}

#[cfg(test)]
#[allow(clippy::float_cmp)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_strictly_ascending() {
        for signed in [true, false] {
            let codes = dynamic_codes(signed);
            assert!(codes.windows(2).all(|pair| pair[0] < pair[1]), "{codes:?}");
            assert_eq!(codes[255], 1.0);
            assert_eq!(codes[if signed { 127 } else { 0 }], 0.0);
        }
    }

    #[test]
    fn the_nearest_code_is_found_for_numbers_of_any_size() {
        for signed in [true, false] {
            let map = CodeMap::get(signed);
            for upper in 0..=0x3f80_u32 {
                for lower in [0, 1, 0x3fff, 0x8000, 0xc123, 0xffff] {
                    let x = f32::from_bits(upper << 16 | lower).min(1.0);
                    for x in [x, -x].into_iter().filter(|&x| signed || x >= 0.0) {
                        let code = map.nearest(x);
                        let away = |code: usize| (f64::from(map.values[code]) - f64::from(x)).abs();
                        let nearest = (0..256).map(away).fold(f64::INFINITY, f64::min);
                        assert!(away(usize::from(code)) <= nearest + 2e-7 * f64::from(x.abs()), "{x}: {code}");
                    }
                }
            }
        }
    }

    #[test]
    fn quantizing_is_accurate_and_preserves_zeros_and_the_largest() {
        let values: Vec<f32> = (0..200).map(|i| ((i * 37 % 101) as f32 - 50.0) * 1e-3).collect();
        let mut codes = vec![0; 200];
        let scale = CodeMap::get(true).narrow(&values, &mut codes, 0);
        assert_eq!(scale, 0.05);
        let mut back = vec![0.0; 200];
        CodeMap::get(true).widen(&codes, scale, &mut back);
        for (value, back) in values.iter().zip(&back) {
            assert!((value - back).abs() <= 0.008 * scale, "{value} {back}");
            assert_eq!(*value == 0.0, *back == 0.0);
        }
        assert_eq!(CodeMap::get(true).narrow(&[0.0; 3], &mut codes[..3], 0), 0.0);
        assert_eq!(codes[..3], [127; 3]);
        assert!(CodeMap::get(true).narrow(&[1e-42, 0.0, -1e-42], &mut codes[..3], 0) > 0.0);
    }

    #[test]
    fn a_small_second_moment_does_not_vanish() {
        let step = AdamStep {
            learning_rate: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            is_decoupled: true,
            step: 1,
            grad_scale: 1.0,
        };
        let (mut params, grads) = ([0.0; 2], [1.0, 1e-4]);
        let (mut m, mut v, mut m_scales, mut v_scales) = ([0; 2], [0; 2], [0.0], [0.0]);
        let section = Section { start: 0, len: 2, state: 0, rate: 1.0, decays: true };
        for count in 1..=200 {
            let before = params;
            let step = AdamStep { step: count, ..step };
            adamw_8bit(&mut params, &grads, (&mut m, &mut m_scales), (&mut v, &mut v_scales), &step, &[section]);
            for (before, after) in before.iter().zip(params) {
                assert!((before - after).abs() < 1.2e-3, "step {count}: {before} {after}");
            }
        }
    }
}
