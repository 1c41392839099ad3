//! The arithmetic flags, kept as the result and the carries of the last operation.
//!
//! An operation stores three words and computes no flag; a reader takes what it needs:
//! * `result`, sign-extended to 64 bits: ZF is `result == 0`, SF its top bit, PF its low byte;
//! * `carries`: the carry out of each bit, shifted so that the operand's top bit is bit 63. Bit 63
//!   is CF, and bit 62, the carry into the top bit, is CF xor OF;
//! * `fix`: bit 4 is AF, and bit 63 and bits 15:8 are xored into SF and the parity byte, so that
//!   POPF can set combinations that no result has.

/// Carry flag in RFLAGS.
pub(crate) const CF: u64 = 1 << 0;
/// Parity flag.
pub(crate) const PF: u64 = 1 << 2;
/// Auxiliary carry flag.
pub(crate) const AF: u64 = 1 << 4;
/// Zero flag.
pub(crate) const ZF: u64 = 1 << 6;
/// Sign flag.
pub(crate) const SF: u64 = 1 << 7;
/// Trap flag.
pub(crate) const TF: u64 = 1 << 8;
/// Interrupt flag.
pub(crate) const IF: u64 = 1 << 9;
/// Direction flag.
pub(crate) const DF: u64 = 1 << 10;
/// Overflow flag.
pub(crate) const OF: u64 = 1 << 11;
/// I/O privilege level, two bits.
pub(crate) const IOPL: u64 = 3 << 12;
/// Nested task.
pub(crate) const NT: u64 = 1 << 14;
/// Resume flag.
pub(crate) const RF: u64 = 1 << 16;
/// Virtual-8086 mode.
pub(crate) const VM: u64 = 1 << 17;
/// Alignment check, and SMAP's override at CPL 0 to 2.
pub(crate) const AC: u64 = 1 << 18;
/// Virtual interrupt flag.
pub(crate) const VIF: u64 = 1 << 19;
/// Virtual interrupt pending.
pub(crate) const VIP: u64 = 1 << 20;
/// CPUID can be used.
pub(crate) const ID: u64 = 1 << 21;

/// Shift that moves the sign bit of an operand of `size` bytes to bit 63.
#[inline(always)]
pub(crate) const fn shift(size: u32) -> u32 {
    64 - size * 8
}

/// Sign-extends the low `size` bytes of `value`.
#[inline(always)]
pub(crate) const fn sign(value: u64, size: u32) -> u64 {
    (((value << shift(size)) as i64) >> shift(size)) as u64
}

/// Zero-extends the low `size` bytes of `value`.
#[inline(always)]
pub(crate) const fn zero(value: u64, size: u32) -> u64 {
    (value << shift(size)) >> shift(size)
}

/// The arithmetic flags as the last operation left them.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Flags {
    result: u64,
    carries: u64,
    fix: u64,
}

impl Flags {
    #[inline(always)]
    pub(crate) fn add(&mut self, a: u64, b: u64, r: u64, size: u32) {
        self.result = sign(r, size);
        self.carries = ((a & b) | ((a | b) & !r)) << shift(size);
        self.fix = (a ^ b ^ r) & AF;
    }

    #[inline(always)]
    pub(crate) fn sub(&mut self, a: u64, b: u64, r: u64, size: u32) {
        self.result = sign(r, size);
        self.carries = ((!a & b) | ((!a | b) & r)) << shift(size);
        self.fix = (a ^ b ^ r) & AF;
    }

    #[inline(always)]
    pub(crate) fn logic(&mut self, r: u64, size: u32) {
        self.result = sign(r, size);
        self.carries = 0;
        self.fix = 0;
    }

    /// Sets SF, ZF and PF from `r` and the rest as given; AF is cleared.
    #[inline(always)]
    pub(crate) fn result(&mut self, r: u64, size: u32, cf: bool, of: bool) {
        self.logic(r, size);
        self.carry_overflow(cf, of);
    }

    /// Writes CF and OF alone.
    #[inline(always)]
    pub(crate) fn carry_overflow(&mut self, cf: bool, of: bool) {
        self.carries = u64::from(cf) << 63 | u64::from(cf ^ of) << 62;
    }

    /// Writes CF alone.
    #[inline(always)]
    pub(crate) fn set_cf(&mut self, cf: bool) {
        let of = self.of();
        self.carry_overflow(cf, of);
    }

    /// Writes ZF alone.
    pub(crate) fn set_zf(&mut self, zf: bool) {
        let all = self.get();
        self.set(if zf { all | ZF } else { all & !ZF });
    }

    #[inline(always)]
    pub(crate) fn cf(self) -> bool {
        (self.carries as i64) < 0
    }

    #[inline(always)]
    pub(crate) fn of(self) -> bool {
        ((self.carries ^ (self.carries << 1)) as i64) < 0
    }

    #[inline(always)]
    pub(crate) fn zf(self) -> bool {
        self.result == 0
    }

    #[inline(always)]
    pub(crate) fn sf(self) -> bool {
        ((self.result ^ self.fix) as i64) < 0
    }

    #[inline(always)]
    pub(crate) fn pf(self) -> bool {
        (self.result as u8 ^ (self.fix >> 8) as u8).count_ones() & 1 == 0
    }

    #[inline(always)]
    pub(crate) fn af(self) -> bool {
        self.fix & AF != 0
    }

    /// The six flags at their places in RFLAGS.
    pub(crate) fn get(self) -> u64 {
        let bit = |on: bool, bit: u64| if on { bit } else { 0 };
        bit(self.cf(), CF)
            | bit(self.pf(), PF)
            | bit(self.af(), AF)
            | bit(self.zf(), ZF)
            | bit(self.sf(), SF)
            | bit(self.of(), OF)
    }

    /// Sets the six flags from their places in RFLAGS.
    pub(crate) fn set(&mut self, flags: u64) {
        self.result = u64::from(flags & ZF == 0);
        // The low byte is 0 (even) or 1 (odd).
        let odd = flags & PF == 0;
        let parity = u64::from(odd != (self.result == 1));
        self.fix = (flags & AF) | parity << 8 | (flags & SF) << 56;
        self.carry_overflow(flags & CF != 0, flags & OF != 0);
    }

    /// The condition `code` (0 to 15) as Jcc, SETcc and CMOVcc encode it.
    #[inline(always)]
    pub(crate) fn condition(self, code: u8) -> bool {
        let holds = match code >> 1 {
            0 => self.of(),
            1 => self.cf(),
            2 => self.zf(),
            3 => self.cf() || self.zf(),
            4 => self.sf(),
            5 => self.pf(),
            6 => self.sf() != self.of(),
            _ => self.zf() || self.sf() != self.of(),
        };
        holds ^ (code & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_of_the_six_flags_reads_back() {
        for bits in 0..64u64 {
            let mut flags = 0;
            for (i, flag) in [CF, PF, AF, ZF, SF, OF].into_iter().enumerate() {
                if bits & 1 << i != 0 {
                    flags |= flag;
                }
            }
            let mut kept = Flags::default();
            kept.set(flags);
            assert_eq!(kept.get(), flags);
        }
    }

    #[test]
    fn eight_bit_addition_and_subtraction_have_the_manuals_flags() {
        for a in 0..=255u8 {
            for b in 0..=255u8 {
                let mut f = Flags::default();
                f.add(a.into(), b.into(), a.wrapping_add(b).into(), 1);
                assert_eq!(f.cf(), a.checked_add(b).is_none());
                assert_eq!(f.of(), (a as i8).checked_add(b as i8).is_none());
                assert_eq!(f.af(), (a & 15) + (b & 15) > 15);
                f.sub(a.into(), b.into(), a.wrapping_sub(b).into(), 1);
                assert_eq!(f.cf(), a < b);
                assert_eq!(f.of(), (a as i8).checked_sub(b as i8).is_none());
                assert_eq!(f.af(), (a & 15) < (b & 15));
                assert_eq!(f.zf(), a == b);
                assert_eq!(f.sf(), (a.wrapping_sub(b) as i8) < 0);
            }
        }
    }
}
