//! Random numbers with a fixed seed, and edge values.

pub(crate) struct Random(pub u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// Zero, ones, a power of two and its neighbours at several sizes, or anything.
    pub(crate) fn edge(&mut self) -> u64 {
        let bit = 1u64 << self.below(64);
        match self.below(12) {
            0 => 0,
            1 => u64::MAX,
            2 => 1,
            3 => bit,
            4 => bit - 1,
            5 => bit.wrapping_neg(),
            6 => 0x8000_0000_8000_8080,
            7 => 0x7fff_ffff_7fff_7f7f,
            8 => self.below(70),
            _ => self.next(),
        }
    }
}
