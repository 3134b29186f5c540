//! Random numbers for initializing adapters.

use std::f64::consts::TAU;

/// `SplitMix64` (<https://doi.org/10.1145/2714064.2660195>), seeded by a number and a path, so that the initial values of
/// a module do not depend on the other modules.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64, path: &str) -> Self {
        let hash = path
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        Self(hash ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Sixteen random bits.
    pub(super) fn bits(&mut self) -> u16 {
        (self.next() >> 48) as u16
    }

    /// A uniform number from -1 up to 1.
    pub(super) fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
    }

    /// A standard normal number (Box and Muller, 1958).
    pub(super) fn normal(&mut self) -> f64 {
        // above 0, as the logarithm must be finite
        let share = ((self.next() >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
        let angle = TAU * (self.next() >> 11) as f64 / (1_u64 << 53) as f64;
        (-2.0 * share.ln()).sqrt() * angle.cos()
    }
}
