//! A small mutator with a fixed seed, for runs without a fuzzer.

/// Makes inputs of seeds and a dictionary. Equal seeds give equal inputs.
#[derive(Debug)]
pub struct Mutator {
    state: u64,
    max_bytes: usize,
}

impl Mutator {
    /// A mutator whose inputs are given by `seed` and have at most `max_bytes`.
    #[must_use]
    pub fn new(seed: u64, max_bytes: usize) -> Self {
        Self { state: seed, max_bytes }
    }

    /// A number below `bound`, 0 if that is 0.
    fn below(&mut self, bound: usize) -> usize {
        // SplitMix64
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % (bound.max(1) as u64)) as usize
    }

    fn range(&mut self, length: usize, longest: usize) -> std::ops::Range<usize> {
        let start = self.below(length + 1);
        let end = start + self.below((length - start).min(longest) + 1);
        start..end
    }

    /// The next input.
    pub fn next_input(&mut self, seeds: &[Vec<u8>], dictionary: &[&[u8]]) -> Vec<u8> {
        let number = self.below(seeds.len());
        let mut input = seeds.get(number).cloned().unwrap_or_default();
        // half of the inputs are changed once, so that they get far
        let most = if self.below(2) == 0 { 1 } else { 5 };
        for _ in 0..=self.below(most) {
            self.change(&mut input, seeds, dictionary);
        }
        input.truncate(self.max_bytes);
        input
    }

    fn change(&mut self, input: &mut Vec<u8>, seeds: &[Vec<u8>], dictionary: &[&[u8]]) {
        match self.below(11) {
            0 | 1 if !input.is_empty() => {
                let at = self.below(input.len());
                input[at] ^= 1 << self.below(8);
            }
            2 if !input.is_empty() => {
                let at = self.below(input.len());
                input[at] = self.below(256) as u8;
            }
            3 => input.truncate(self.below(input.len() + 1)),
            4 => drop(input.drain(self.range(input.len(), 64))),
            5 => {
                // a piece repeated, seldom often
                let range = self.range(input.len(), 200);
                let count = if self.below(4) == 0 { self.below(2000) } else { 1 + self.below(4) };
                let piece = input[range.clone()].repeat(count);
                input.splice(range.end..range.end, piece);
            }
            6 if !seeds.is_empty() => {
                let other = &seeds[self.below(seeds.len())];
                let from = self.range(other.len(), other.len());
                let to = self.range(input.len(), input.len());
                input.splice(to, other[from].iter().copied());
            }
            7 | 8 if !dictionary.is_empty() => {
                let token = dictionary[self.below(dictionary.len())];
                let count = if self.below(20) == 0 { self.below(3000) } else { 1 };
                let longest = if self.below(2) == 0 { 0 } else { 8 };
                let to = self.range(input.len(), longest);
                input.splice(to, token.repeat(count));
            }
            9 => {
                // another number in place of one
                let digits: Vec<usize> = (0..input.len()).filter(|&i| input[i].is_ascii_digit()).collect();
                if let Some(&start) = digits.get(self.below(digits.len())) {
                    let end = (start..input.len()).find(|&i| !input[i].is_ascii_digit()).unwrap_or(input.len());
                    let numbers: [&[u8]; 10] = [
                        b"0",
                        b"1",
                        b"-1",
                        b"65536",
                        b"2147483648",
                        b"4294967296",
                        b"9223372036854775808",
                        b"18446744073709551615",
                        b"1e308",
                        b"0.5",
                    ];
                    let number = numbers[self.below(numbers.len())];
                    input.splice(start..end, number.iter().copied());
                }
            }
            _ => {
                let (a, b) = (self.range(input.len(), 64), self.range(input.len(), 64));
                let piece = input[a].to_vec();
                input.splice(b, piece);
            }
        }
        input.truncate(self.max_bytes);
    }
}
