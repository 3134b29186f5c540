//! Vector registers with a number per lane, because compilers do not reliably vectorize arithmetic on arrays.

use super::lanes::{Lanes, ROUNDER};
use crate::isa::{Arithmetic, Fused, Separate};
use std::ops::{Add, Div, Mul, Sub};

/// The registers of an instruction set.
pub(super) trait HasRegisters: Arithmetic {
    type Registers: Registers<Memory = Lanes>;
}

/// A number per lane, in registers.
pub(super) trait Registers:
    Copy + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Div<Output = Self>
{
    /// The numbers in memory.
    type Memory: Copy;

    fn load(from: &Self::Memory) -> Self;
    fn store(self) -> Self::Memory;
    fn splat(value: f32) -> Self;
    /// The smaller number; `other` if `self` is NaN.
    fn min(self, other: Self) -> Self;
    /// The larger number; `other` if `self` is NaN.
    fn max(self, other: Self) -> Self;
    fn abs(self) -> Self;
    /// `yes` where `a < b`, else `no`.
    fn where_less(a: Self, b: Self, yes: Self, no: Self) -> Self;

    #[inline(always)]
    fn zero() -> Self {
        Self::splat(0.0)
    }

    /// The nearest integers between `low` and `high`; ties to even. `high` for NaN.
    #[inline(always)]
    fn rounded(self, low: f32, high: f32) -> Self {
        let rounder = Self::splat(ROUNDER);
        ((self + rounder) - rounder).min(Self::splat(high)).max(Self::splat(low))
    }
}

impl<const L: usize> Registers for Lanes<L> {
    type Memory = Self;

    #[inline(always)]
    fn load(from: &Self) -> Self {
        *from
    }

    #[inline(always)]
    fn store(self) -> Self {
        self
    }

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self::splat(value)
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        self.min(other)
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.max(other)
    }

    #[inline(always)]
    fn abs(self) -> Self {
        self.abs()
    }

    #[inline(always)]
    fn where_less(a: Self, b: Self, yes: Self, no: Self) -> Self {
        Self::where_less(a, b, yes, no)
    }
}

#[cfg(not(target_arch = "x86_64"))]
impl HasRegisters for Fused {
    type Registers = Lanes;
}

#[cfg(not(target_arch = "x86_64"))]
impl HasRegisters for Separate {
    type Registers = Lanes;
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Add, Div, Fused, HasRegisters, Lanes, Mul, Registers, Separate, Sub};
    use std::arch::x86_64::{
        __m128, __m256, _CMP_LT_OQ, _mm_add_ps, _mm_and_ps, _mm_andnot_ps, _mm_cmplt_ps, _mm_div_ps, _mm_loadu_ps,
        _mm_max_ps, _mm_min_ps, _mm_mul_ps, _mm_or_ps, _mm_set1_ps, _mm_storeu_ps, _mm_sub_ps, _mm256_add_ps,
        _mm256_andnot_ps, _mm256_blendv_ps, _mm256_cmp_ps, _mm256_div_ps, _mm256_loadu_ps, _mm256_max_ps,
        _mm256_min_ps, _mm256_mul_ps, _mm256_set1_ps, _mm256_storeu_ps, _mm256_sub_ps,
    };

    impl HasRegisters for Fused {
        type Registers = Avx;
    }

    impl HasRegisters for Separate {
        type Registers = Sse;
    }

    #[derive(Clone, Copy)]
    pub(in super::super) struct Sse([__m128; 4]);

    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx([__m256; 2]);

    // SAFETY: SSE2 is part of x86-64, and `Fused` is used on x86-64 only if AVX2 has been detected.
    macro_rules! operator {
        ($name:ident, $count:literal, $operator:ident, $method:ident, $function:ident) => {
            impl $operator for $name {
                type Output = Self;

                #[inline(always)]
                fn $method(mut self, other: Self) -> Self {
                    for i in 0..$count {
                        // SAFETY: as above.
                        self.0[i] = unsafe { $function(self.0[i], other.0[i]) };
                    }
                    self
                }
            }
        };
    }

    macro_rules! registers {
        (
            $name:ident, $count:literal of $lanes:literal,
            $add:ident $sub:ident $mul:ident $div:ident $min:ident $max:ident $and_not:ident
            $load:ident $store:ident $splat:ident, $choose:ident
        ) => {
            operator!($name, $count, Add, add, $add);
            operator!($name, $count, Sub, sub, $sub);
            operator!($name, $count, Mul, mul, $mul);
            operator!($name, $count, Div, div, $div);

            impl Registers for $name {
                type Memory = Lanes;

                #[inline(always)]
                fn load(from: &Lanes) -> Self {
                    let mut loaded = Self::splat(0.0);
                    for i in 0..$count {
                        // SAFETY: as above; there are sixteen lanes.
                        loaded.0[i] = unsafe { $load(from.0.as_ptr().add($lanes * i)) };
                    }
                    loaded
                }

                #[inline(always)]
                fn store(self) -> Lanes {
                    let mut to = Lanes::ZERO;
                    for i in 0..$count {
                        // SAFETY: as above; there are sixteen lanes.
                        unsafe { $store(to.0.as_mut_ptr().add($lanes * i), self.0[i]) };
                    }
                    to
                }

                #[inline(always)]
                fn splat(value: f32) -> Self {
                    // SAFETY: as above.
                    Self([unsafe { $splat(value) }; $count])
                }

                #[inline(always)]
                fn min(mut self, other: Self) -> Self {
                    for i in 0..$count {
                        // SAFETY: as above.
                        self.0[i] = unsafe { $min(self.0[i], other.0[i]) };
                    }
                    self
                }

                #[inline(always)]
                fn max(mut self, other: Self) -> Self {
                    for i in 0..$count {
                        // SAFETY: as above.
                        self.0[i] = unsafe { $max(self.0[i], other.0[i]) };
                    }
                    self
                }

                #[inline(always)]
                fn abs(mut self) -> Self {
                    for i in 0..$count {
                        // SAFETY: as above.
                        self.0[i] = unsafe { $and_not($splat(-0.0), self.0[i]) };
                    }
                    self
                }

                #[inline(always)]
                fn where_less(a: Self, b: Self, mut yes: Self, no: Self) -> Self {
                    for i in 0..$count {
                        // SAFETY: as above.
                        yes.0[i] = unsafe { $choose(a.0[i], b.0[i], yes.0[i], no.0[i]) };
                    }
                    yes
                }
            }
        };
    }

    registers!(
        Sse, 4 of 4,
        _mm_add_ps _mm_sub_ps _mm_mul_ps _mm_div_ps _mm_min_ps _mm_max_ps _mm_andnot_ps
        _mm_loadu_ps _mm_storeu_ps _mm_set1_ps, choose_sse
    );

    registers!(
        Avx, 2 of 8,
        _mm256_add_ps _mm256_sub_ps _mm256_mul_ps _mm256_div_ps _mm256_min_ps _mm256_max_ps _mm256_andnot_ps
        _mm256_loadu_ps _mm256_storeu_ps _mm256_set1_ps, choose_avx
    );

    /// `yes` where `a < b`, else `no`.
    ///
    /// # Safety
    /// None; unsafe as `choose_avx` is.
    #[inline(always)]
    unsafe fn choose_sse(a: __m128, b: __m128, yes: __m128, no: __m128) -> __m128 {
        // SAFETY: SSE2 is part of x86-64.
        unsafe {
            let is_less = _mm_cmplt_ps(a, b);
            _mm_or_ps(_mm_and_ps(is_less, yes), _mm_andnot_ps(is_less, no))
        }
    }

    /// `yes` where `a < b`, else `no`.
    ///
    /// # Safety
    /// The processor has AVX.
    #[inline(always)]
    unsafe fn choose_avx(a: __m256, b: __m256, yes: __m256, no: __m256) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_blendv_ps(no, yes, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b)) }
    }
}
