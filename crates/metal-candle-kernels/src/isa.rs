//! Detects the instruction set for the kernels, and dispatches to it.

use std::sync::OnceLock;

/// An instruction set that the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// The instructions of every machine of the architecture.
    Baseline,
    /// AVX2, FMA and F16C.
    Avx2,
    /// Additionally AVX-512 F, BW and VL.
    Avx512,
}

impl Isa {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Baseline if cfg!(target_arch = "aarch64") => "neon",
            Self::Baseline => "baseline",
            Self::Avx2 => "avx2+fma",
            Self::Avx512 => "avx512",
        }
    }
}

/// The environment variable that limits the kernels to a level of [`LEVELS`], to compare levels and to test what other machines
/// use.
pub const ISA_VARIABLE: &str = "METAL_CANDLE_ISA";

/// The values of [`ISA_VARIABLE`], lowest level first.
#[cfg(target_arch = "x86_64")]
pub const LEVELS: [&str; 7] = ["baseline", "avx2", "avx-vnni", "avx512", "avx512-vnni", "avx512-bf16", "amx"];
/// The values of [`ISA_VARIABLE`], lowest level first.
#[cfg(target_arch = "aarch64")]
pub const LEVELS: [&str; 2] = ["neon", "dotprod"];
/// The values of [`ISA_VARIABLE`], lowest level first.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub const LEVELS: [&str; 1] = ["baseline"];

/// The instruction set used on this machine.
#[must_use]
pub fn isa() -> Isa {
    static FOUND: OnceLock<Isa> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let max_level = match limit() {
            Ok(Some(0)) => Isa::Baseline,
            Ok(Some(1 | 2)) => Isa::Avx2,
            _ => Isa::Avx512,
        };
        detect().min(max_level)
    })
}

/// Instructions that multiply 8-bit integers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Int8 {
    /// AVX2. AVX-512 without VNNI uses these instructions, too.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-VNNI.
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    /// AVX512-VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    /// The dot products of Armv8.2.
    #[cfg(target_arch = "aarch64")]
    Dotprod,
}

impl Int8 {
    /// The name, if it is a separate level.
    pub(crate) fn name(self) -> Option<&'static str> {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => None,
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => Some("avx-vnni"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => Some("avx512-vnni"),
            #[cfg(target_arch = "aarch64")]
            Self::Dotprod => Some("dotprod"),
        }
    }
}

/// The instructions used on this machine; `None` if products of 8-bit integers are not faster than f32.
pub(crate) fn int8() -> Option<Int8> {
    static FOUND: OnceLock<Option<Int8>> = OnceLock::new();
    *FOUND.get_or_init(|| detect_int8(limit().ok().flatten().unwrap_or(LEVELS.len())))
}

#[cfg(target_arch = "x86_64")]
fn detect_int8(max_level: usize) -> Option<Int8> {
    match isa() {
        Isa::Avx512 if max_level >= 4 && is_x86_feature_detected!("avx512vnni") => Some(Int8::Avx512Vnni),
        Isa::Avx2 | Isa::Avx512 if max_level >= 2 && is_x86_feature_detected!("avxvnni") => Some(Int8::AvxVnni),
        Isa::Avx2 | Isa::Avx512 => Some(Int8::Avx2),
        Isa::Baseline => None,
    }
}

#[cfg(target_arch = "aarch64")]
fn detect_int8(max_level: usize) -> Option<Int8> {
    (max_level >= 1 && std::arch::is_aarch64_feature_detected!("dotprod")).then_some(Int8::Dotprod)
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn detect_int8(_: usize) -> Option<Int8> {
    None
}

/// Whether [`ISA_VARIABLE`] permits a level of [`LEVELS`].
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(crate) fn is_permitted(level: &str) -> bool {
    let index = LEVELS.iter().position(|&known| known == level);
    limit().is_ok_and(|most| most.is_none_or(|most| index.is_some_and(|index| index <= most)))
}

/// The index in [`LEVELS`] of the highest permitted level; `None` if the variable is not set.
pub(crate) fn limit() -> Result<Option<usize>, String> {
    let Some(value) = std::env::var_os(ISA_VARIABLE).filter(|value| !value.is_empty()) else { return Ok(None) };
    let level = LEVELS.iter().position(|level| value.to_str().is_some_and(|value| value.eq_ignore_ascii_case(level)));
    level.map(Some).ok_or_else(|| format!("expected one of {}, found `{}`", LEVELS.join(", "), value.display()))
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Isa {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl");
    match (avx2, avx512) {
        (true, true) => Isa::Avx512,
        (true, false) => Isa::Avx2,
        _ => Isa::Baseline,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Isa {
    Isa::Baseline
}

/// The f16 with these bits. Without branches, so that loops over it become vector code.
#[inline(always)]
pub(crate) fn half_to_f32(bits: u16) -> f32 {
    let bits = u32::from(bits);
    let magnitude = (bits & 0x7fff) << 13;
    // multiplying by 2^112 adjusts the exponent's bias and normalizes subnormals
    let scaled = (f32::from_bits(magnitude) * f32::from_bits(0x7780_0000)).to_bits();
    let special = magnitude | 0x7f80_0000;
    let value = if magnitude >= 0x0f80_0000 { special } else { scaled };
    f32::from_bits(value | ((bits & 0x8000) << 16))
}

/// The fastest multiply-add of the instruction set.
///
/// Without the instruction `f32::mul_add` is a library call, so the baseline of x86-64 rounds twice.
pub(crate) trait Arithmetic {
    fn mul_add(a: f32, b: f32, c: f32) -> f32;

    /// Transposes a square.
    #[inline(always)]
    fn transposed(square: [[f32; 8]; 8]) -> [[f32; 8]; 8] {
        std::array::from_fn(|i| std::array::from_fn(|j| square[j][i]))
    }

    /// `table[index]` for each index below 16.
    #[inline(always)]
    fn look_up(table: &[i8; 16], indices: [u8; 16]) -> [i8; 16] {
        let mut values = [0; 16];
        for i in 0..16 {
            values[i] = table[usize::from(indices[i] & 15)];
        }
        values
    }

    /// The f16 with these bits.
    #[inline(always)]
    fn f16_to_f32(bits: u16) -> f32 {
        half_to_f32(bits)
    }

    /// For each bit -1 if it is set, else 0.
    #[inline(always)]
    fn spread_bits(bits: [u8; 2]) -> [i8; 16] {
        let mut spread = [0; 16];
        for i in 0..16 {
            spread[i] = -((bits[i / 8] >> (i % 8) & 1).cast_signed());
        }
        spread
    }
}

/// Instruction sets with a fused multiply-add.
#[derive(Clone, Copy)]
pub(crate) struct Fused;

/// Instruction sets without a fused multiply-add.
#[cfg_attr(target_arch = "aarch64", allow(dead_code))]
#[derive(Clone, Copy)]
pub(crate) struct Separate;

impl Arithmetic for Fused {
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }

    /// Swaps pairs, then fours, then halves of rows.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn transposed(square: [[f32; 8]; 8]) -> [[f32; 8]; 8] {
        use std::arch::x86_64::{
            _mm256_loadu_ps, _mm256_permute2f128_ps, _mm256_shuffle_ps, _mm256_storeu_ps, _mm256_unpackhi_ps,
            _mm256_unpacklo_ps,
        };
        let mut result = [[0.0; 8]; 8];
        // SAFETY: `Fused` is used on x86-64 only if AVX2 has been detected; each row has eight floats.
        unsafe {
            let s = square.map(|row| _mm256_loadu_ps(row.as_ptr()));
            let pairs: [_; 8] = std::array::from_fn(|i| {
                let (a, b) = (s[i / 2 * 2], s[i / 2 * 2 + 1]);
                if i % 2 == 0 { _mm256_unpacklo_ps(a, b) } else { _mm256_unpackhi_ps(a, b) }
            });
            let fours: [_; 8] = std::array::from_fn(|i| {
                let at = i / 4 * 4 + i % 4 / 2;
                let (a, b) = (pairs[at], pairs[at + 2]);
                if i % 2 == 0 { _mm256_shuffle_ps::<0x44>(a, b) } else { _mm256_shuffle_ps::<0xee>(a, b) }
            });
            for i in 0..4 {
                let (a, b) = (fours[i], fours[i + 4]);
                _mm256_storeu_ps(result[i].as_mut_ptr(), _mm256_permute2f128_ps::<0x20>(a, b));
                _mm256_storeu_ps(result[i + 4].as_mut_ptr(), _mm256_permute2f128_ps::<0x31>(a, b));
            }
        }
        result
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn look_up(table: &[i8; 16], indices: [u8; 16]) -> [i8; 16] {
        use std::arch::x86_64::{_mm_loadu_si128, _mm_shuffle_epi8, _mm_storeu_si128};
        let mut values = [0; 16];
        // SAFETY: as for `transposed`; each array holds sixteen bytes.
        unsafe {
            let table = _mm_loadu_si128(table.as_ptr().cast());
            let indices = _mm_loadu_si128(indices.as_ptr().cast());
            _mm_storeu_si128(values.as_mut_ptr().cast(), _mm_shuffle_epi8(table, indices));
        }
        values
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn f16_to_f32(bits: u16) -> f32 {
        use std::arch::x86_64::{_mm_cvtph_ps, _mm_cvtsi32_si128, _mm_cvtss_f32};
        // SAFETY: as for `transposed`; F16C is part of that level.
        unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits)))) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn spread_bits(bits: [u8; 2]) -> [i8; 16] {
        use std::arch::x86_64::{
            _mm_and_si128, _mm_cmpeq_epi8, _mm_set_epi64x, _mm_set1_epi16, _mm_set1_epi64x, _mm_shuffle_epi8,
            _mm_storeu_si128,
        };
        let mut spread = [0; 16];
        // SAFETY: as for `transposed`; the array holds sixteen bytes.
        unsafe {
            // repeat each byte eight times, and keep one bit of each copy
            let bytes = _mm_set1_epi16(i16::from_le_bytes(bits));
            let bytes = _mm_shuffle_epi8(bytes, _mm_set_epi64x(0x0101_0101_0101_0101, 0));
            let masks = _mm_set1_epi64x(0x8040_2010_0804_0201_u64.cast_signed());
            let is_set = _mm_cmpeq_epi8(_mm_and_si128(bytes, masks), masks);
            _mm_storeu_si128(spread.as_mut_ptr().cast(), is_set);
        }
        spread
    }
}

impl Arithmetic for Separate {
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }
}

/// Defines a function that runs `body::<Arithmetic>` compiled for the instruction set of the machine.
macro_rules! dispatch {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<$($generic:ident: $bound:path),+>)? ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:ident) => {
        $(#[$meta])*
        $vis fn $name $(<$($generic: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
                fn avx512 $(<$($generic: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
                    $body::<crate::isa::Fused $($(, $generic)+)?>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2 $(<$($generic: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
                    $body::<crate::isa::Fused $($(, $generic)+)?>($($arg),*)
                }
                match crate::isa::isa() {
                    // SAFETY: `isa` has detected these instructions on this machine.
                    crate::isa::Isa::Avx512 => unsafe { avx512 $(::<$($generic),+>)? ($($arg),*) },
                    // SAFETY: as above.
                    crate::isa::Isa::Avx2 => unsafe { avx2 $(::<$($generic),+>)? ($($arg),*) },
                    crate::isa::Isa::Baseline => $body::<crate::isa::Separate $($(, $generic)+)?>($($arg),*),
                }
            }
            #[cfg(not(target_arch = "x86_64"))]
            $body::<crate::isa::Fused $($(, $generic)+)?>($($arg),*)
        }
    };
}

pub(crate) use dispatch;
