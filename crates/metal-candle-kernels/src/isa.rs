//! Which instruction set the kernels use.

use std::sync::OnceLock;

/// An instruction set that the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// What every machine of the architecture has.
    Baseline,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW and VL beside these.
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

/// The instruction set used on this machine.
#[must_use]
pub fn isa() -> Isa {
    static FOUND: OnceLock<Isa> = OnceLock::new();
    *FOUND.get_or_init(detect)
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

/// Multiply-add as the instruction set does it best.
///
/// Without the instruction `f32::mul_add` is a library call, so the baseline of x86-64 rounds twice.
pub(crate) trait Arithmetic {
    fn mul_add(a: f32, b: f32, c: f32) -> f32;
}

/// Instruction sets with a fused multiply-add.
pub(crate) struct Fused;

/// Instruction sets without one.
#[cfg_attr(target_arch = "aarch64", allow(dead_code))]
pub(crate) struct Separate;

impl Arithmetic for Fused {
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
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
                    // SAFETY: `isa` has found these instructions on this machine.
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
