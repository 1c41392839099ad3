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

    /// A number of 80 bits: ordinary ones, the limits of all formats, integers, and what is not a number.
    pub(crate) fn extended(&mut self) -> [u64; 2] {
        const TOP: u64 = 1 << 63;
        let sign = self.next() & 0x8000;
        let significand = match self.below(8) {
            0 => TOP,
            1 => u64::MAX,
            2 => TOP | 1 << self.below(63),
            3 => u64::MAX << self.below(64) | TOP,
            4 => TOP | self.next() << 40,
            5 => TOP | self.next() << 11,
            _ => TOP | self.next(),
        };
        let (significand, exponent) = match self.below(24) {
            0 => (0, 0),
            1 => (self.next() >> self.below(64), 0),
            2 => (TOP, 0x7fff),
            3 => (significand, 0x7fff),
            4 => (self.edge(), self.below(0x8000)),
            5 => (significand, 1 + self.below(70)),
            6 => (significand, 0x7ffe - self.below(70)),
            // Around the least and largest singles and doubles.
            7 => (significand, 0x3fff - 160 + self.below(40)),
            8 => (significand, 0x3fff + 110 + self.below(40)),
            9 => (significand, 0x3fff - 1090 + self.below(80)),
            10 => (significand, 0x3fff + 1000 + self.below(60)),
            11..16 => (significand, 0x3fff - 4 + self.below(8)),
            16..20 => (significand, 0x3fff + self.below(66)),
            _ => (significand, 0x3fff - 70 + self.below(140)),
        };
        [significand, sign | exponent]
    }

    /// Two singles or a double: ordinary ones, and zeros, infinities, NaNs, denormals, limits.
    pub fn float(&mut self) -> u64 {
        const SINGLES: [u32; 12] = [
            0,
            1,
            0x007f_ffff,
            0x0080_0000,
            0x3f80_0000,
            0x4f00_0000,
            0x7f7f_ffff,
            0x7f80_0000,
            0x7f80_0001,
            0x7fc0_1234,
            0x0012_3456,
            0x3380_0000,
        ];
        const DOUBLES: [u64; 12] = [
            0,
            1,
            0x000f_ffff_ffff_ffff,
            0x0010_0000_0000_0000,
            0x3ff0_0000_0000_0000,
            0x41e0_0000_0000_0000,
            0x7fef_ffff_ffff_ffff,
            0x7ff0_0000_0000_0000,
            0x7ff0_0000_0000_0001,
            0x7ff8_0000_0000_1234,
            0x0001_2345_6789_abcd,
            0x43e0_0000_0000_0000,
        ];
        let sign = self.next();
        match self.below(7) {
            0 => self.edge(),
            1 => {
                let pick = |n: u64| u64::from(SINGLES[n as usize % 12]);
                let both = pick(self.below(12)) | pick(self.below(12)) << 32;
                both | sign & 0x8000_0000_8000_0000
            }
            2 => DOUBLES[self.below(12) as usize] | sign & 1 << 63,
            3 => {
                // Near one, so that results are ordinary.
                let single = |r: u64| 0x3d00_0000 | r & 0x83ff_ffff;
                single(self.next()) | single(self.next()) << 32
            }
            4 => (f64::from(self.next() as i32) / 256.0).to_bits(),
            5 => {
                // NaNs, or an infinity, as two singles or as a double.
                let exponents = [0x7f80_0000_7f80_0000, 0x7ff0_0000_0000_0000];
                exponents[self.below(2) as usize] | self.next()
            }
            _ => self.next(),
        }
    }
}
