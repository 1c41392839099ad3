//! Integer arithmetic and its flags. All sizes are 1, 2, 4 or 8 bytes; operands are
//! zero-extended, results too. Where the manuals leave a flag undefined, the comment says what
//! happens here.

use crate::flags::{Flags, shift, sign, zero};

/// The eight operations of the classic encoding, in its order.
pub(crate) const ADD: u8 = 0;
pub(crate) const OR: u8 = 1;
pub(crate) const ADC: u8 = 2;
pub(crate) const SBB: u8 = 3;
pub(crate) const AND: u8 = 4;
pub(crate) const SUB: u8 = 5;
pub(crate) const XOR: u8 = 6;
pub(crate) const CMP: u8 = 7;
/// TEST, numbered after them.
pub(crate) const TEST: u8 = 8;

/// True if the operation writes its first operand.
pub(crate) const fn writes(op: u8) -> bool {
    op < CMP
}

/// Two-operand arithmetic.
#[inline(always)]
pub(crate) fn binary(f: &mut Flags, op: u8, a: u64, b: u64, size: u32) -> u64 {
    match op {
        ADD | ADC => {
            let carry = u64::from(op == ADC && f.cf());
            let r = zero(a.wrapping_add(b).wrapping_add(carry), size);
            f.add(a, b, r, size);
            r
        }
        SUB | SBB | CMP => {
            let borrow = u64::from(op == SBB && f.cf());
            let r = zero(a.wrapping_sub(b).wrapping_sub(borrow), size);
            f.sub(a, b, r, size);
            r
        }
        _ => {
            let r = match op {
                OR => a | b,
                XOR => a ^ b,
                _ => a & b,
            };
            f.logic(r, size);
            r
        }
    }
}

/// INC: CF is kept.
#[inline(always)]
pub(crate) fn inc(f: &mut Flags, a: u64, size: u32) -> u64 {
    let cf = f.cf();
    let r = zero(a.wrapping_add(1), size);
    f.add(a, 1, r, size);
    f.set_cf(cf);
    r
}

/// DEC: CF is kept.
#[inline(always)]
pub(crate) fn dec(f: &mut Flags, a: u64, size: u32) -> u64 {
    let cf = f.cf();
    let r = zero(a.wrapping_sub(1), size);
    f.sub(a, 1, r, size);
    f.set_cf(cf);
    r
}

/// NEG.
#[inline(always)]
pub(crate) fn neg(f: &mut Flags, a: u64, size: u32) -> u64 {
    let r = zero(a.wrapping_neg(), size);
    f.sub(0, a, r, size);
    r
}

/// The eight shifts and rotates of the classic encoding; 6 is SHL's other encoding.
pub(crate) const ROL: u8 = 0;
pub(crate) const ROR: u8 = 1;
pub(crate) const RCL: u8 = 2;
pub(crate) const RCR: u8 = 3;
pub(crate) const SHL: u8 = 4;
pub(crate) const SHR: u8 = 5;
pub(crate) const SAR: u8 = 7;

/// Shifts and rotates. `None` if the masked count is zero: nothing is written, flags included.
/// OF after counts above one and AF are undefined: OF follows the formula for one (SHR clears it),
/// AF is cleared.
#[inline(always)]
pub(crate) fn rotate(f: &mut Flags, op: u8, a: u64, count: u64, size: u32) -> Option<u64> {
    let bits = size * 8;
    let count = count as u32 & if size == 8 { 63 } else { 31 };
    if count == 0 {
        return None;
    }
    let top = bits - 1;
    Some(match op {
        SHL | 6 => {
            let wide = u128::from(a) << count;
            let r = zero(wide as u64, size);
            let cf = wide >> bits & 1 != 0;
            f.result(r, size, cf, cf != (r >> top & 1 != 0));
            r
        }
        SHR => {
            let r = if count >= bits { 0 } else { a >> count };
            let cf = count <= bits && a >> (count - 1) & 1 != 0;
            // The top two bits of the result differ after a shift by one if the sign changed.
            let of = count == 1 && a >> top & 1 != 0;
            f.result(r, size, cf, of);
            r
        }
        SAR => {
            let s = sign(a, size) as i64;
            let cf = s >> (count - 1).min(63) & 1 != 0;
            let r = zero((s >> count.min(63)) as u64, size);
            f.result(r, size, cf, false);
            r
        }
        ROL => {
            let n = count % bits;
            let r = if n == 0 {
                a
            } else {
                zero(a << n | a >> (bits - n), size)
            };
            let cf = r & 1 != 0;
            f.carry_overflow(cf, cf != (r >> top & 1 != 0));
            r
        }
        ROR => {
            let n = count % bits;
            let r = if n == 0 {
                a
            } else {
                zero(a >> n | a << (bits - n), size)
            };
            let cf = r >> top & 1 != 0;
            f.carry_overflow(cf, cf != (r >> (top - 1) & 1 != 0));
            r
        }
        RCL => rotate_carry_left(f, a, count, size),
        _ => rotate_carry_right(f, a, count, size),
    })
}

fn rotate_carry_left(f: &mut Flags, a: u64, count: u32, size: u32) -> u64 {
    let bits = size * 8;
    // A count that is a multiple of the length changes nothing but OF, as on known processors.
    let n = count % (bits + 1);
    let wide = u128::from(f.cf()) << bits | u128::from(a);
    let turned = wide << n | wide >> (bits + 1 - n);
    let r = zero(turned as u64, size);
    let cf = turned >> bits & 1 != 0;
    f.carry_overflow(cf, cf != (r >> (bits - 1) & 1 != 0));
    r
}

fn rotate_carry_right(f: &mut Flags, a: u64, count: u32, size: u32) -> u64 {
    let bits = size * 8;
    // A count that is a multiple of the length changes nothing but OF, as on known processors.
    let n = count % (bits + 1);
    let wide = u128::from(f.cf()) << bits | u128::from(a);
    let turned = wide >> n | wide << (bits + 1 - n);
    let r = zero(turned as u64, size);
    let cf = turned >> bits & 1 != 0;
    f.carry_overflow(cf, (r >> (bits - 1) ^ r >> (bits - 2)) & 1 != 0);
    r
}

/// SHLX, SHRX and SARX.
#[inline(always)]
pub(crate) fn shift_alone(op: u8, a: u64, count: u64, size: u32) -> u64 {
    let count = count as u32 & (size * 8 - 1);
    let r = match op {
        SHL => a << count,
        SHR => a >> count,
        _ => (sign(a, size) as i64 >> count) as u64,
    };
    zero(r, size)
}

/// BZHI: clears the bits from number `from` on, of which the low byte counts.
#[inline(always)]
pub(crate) fn zero_high(f: &mut Flags, a: u64, from: u64, size: u32) -> u64 {
    let (n, bits) = (from & 0xff, u64::from(size) * 8);
    let r = if n < bits { a & ((1 << n) - 1) } else { a };
    f.result(r, size, n >= bits, false);
    r
}

/// SHLD and SHRD. `None` if the count is zero. Counts above 16 with 16-bit operands, which are
/// undefined, shift the three words destination, source, destination.
pub(crate) fn double_shift(
    f: &mut Flags,
    left: bool,
    a: u64,
    b: u64,
    count: u64,
    size: u32,
) -> Option<u64> {
    let bits = size * 8;
    let count = count as u32 & if size == 8 { 63 } else { 31 };
    if count == 0 {
        return None;
    }
    let top = bits - 1;
    let (r, cf) = if left {
        let wide = if size == 2 {
            u128::from(a) << 32 | u128::from(b) << 16 | u128::from(a)
        } else {
            u128::from(a) << bits | u128::from(b)
        };
        let width = if size == 2 { 3 * bits } else { 2 * bits };
        let shifted = wide << count >> (width - bits);
        (zero(shifted as u64, size), wide >> (width - count) & 1 != 0)
    } else {
        let wide = if size == 2 {
            u128::from(a) << 32 | u128::from(b) << 16 | u128::from(a)
        } else {
            u128::from(b) << bits | u128::from(a)
        };
        (
            zero((wide >> count) as u64, size),
            wide >> (count - 1) & 1 != 0,
        )
    };
    f.result(r, size, cf, (r ^ a) >> top & 1 != 0);
    Some(r)
}

/// IMUL with a truncated result. SF, ZF and PF, which are undefined, are kept.
#[inline(always)]
pub(crate) fn imul(f: &mut Flags, a: u64, b: u64, size: u32) -> u64 {
    let wide = i128::from(sign(a, size) as i64) * i128::from(sign(b, size) as i64);
    let r = zero(wide as u64, size);
    let lost = wide != i128::from(sign(r, size) as i64);
    f.carry_overflow(lost, lost);
    r
}

/// MUL and one-operand IMUL: low and high half.
#[inline(always)]
pub(crate) fn wide_mul(f: &mut Flags, signed: bool, a: u64, b: u64, size: u32) -> (u64, u64) {
    let wide = if signed {
        (i128::from(sign(a, size) as i64) * i128::from(sign(b, size) as i64)) as u128
    } else {
        u128::from(a) * u128::from(b)
    };
    let low = zero(wide as u64, size);
    let high = zero((wide >> (size * 8)) as u64, size);
    let extension = if signed {
        zero(((sign(low, size) as i64) >> 63) as u64, size)
    } else {
        0
    };
    let lost = high != extension;
    f.carry_overflow(lost, lost);
    (low, high)
}

/// DIV and IDIV: quotient and remainder; `None` is #DE.
pub(crate) fn divide(
    signed: bool,
    high: u64,
    low: u64,
    divisor: u64,
    size: u32,
) -> Option<(u64, u64)> {
    if divisor == 0 {
        return None;
    }
    let bits = size * 8;
    let dividend = u128::from(high) << bits | u128::from(low);
    if !signed {
        let q = dividend / u128::from(divisor);
        if q >> bits != 0 {
            return None;
        }
        return Some((q as u64, (dividend % u128::from(divisor)) as u64));
    }
    let unused = 128 - 2 * bits;
    let dividend = (dividend << unused) as i128 >> unused;
    let divisor = i128::from(sign(divisor, size) as i64);
    let q = dividend.checked_div(divisor)?;
    if q != i128::from(sign(q as u64, size) as i64) {
        return None;
    }
    Some((
        zero(q as u64, size),
        zero(dividend.wrapping_rem(divisor) as u64, size),
    ))
}

/// BSF. `None` if the source is zero: the destination is kept and only ZF is set.
pub(crate) fn scan(f: &mut Flags, reverse: bool, a: u64) -> Option<u64> {
    f.set_zf(a == 0);
    match (a, reverse) {
        (0, _) => None,
        (a, false) => Some(a.trailing_zeros().into()),
        (a, true) => Some(u64::from(63 - a.leading_zeros())),
    }
}

/// TZCNT and LZCNT.
pub(crate) fn count_zeros(f: &mut Flags, leading: bool, a: u64, size: u32) -> u64 {
    let bits = size * 8;
    let n = if leading {
        a.leading_zeros() - shift(size)
    } else {
        a.trailing_zeros().min(bits)
    };
    f.set_cf(a == 0);
    f.set_zf(n == 0);
    n.into()
}

/// PDEP.
pub(crate) fn deposit(mut source: u64, mask: u64) -> u64 {
    let mut r = 0;
    let mut rest = mask;
    while rest != 0 {
        let bit = rest & rest.wrapping_neg();
        if source & 1 != 0 {
            r |= bit;
        }
        source >>= 1;
        rest ^= bit;
    }
    r
}

/// PEXT.
pub(crate) fn extract(source: u64, mask: u64) -> u64 {
    let mut r = 0;
    let mut rest = mask;
    let mut n = 0;
    while rest != 0 {
        let bit = rest & rest.wrapping_neg();
        r |= u64::from(source & bit != 0) << n;
        n += 1;
        rest ^= bit;
    }
    r
}

/// CRC32 with the polynomial of iSCSI, `size` bytes of `data`.
pub(crate) fn crc32(crc: u32, data: u64, size: u32) -> u32 {
    let mut crc = crc;
    for i in 0..size {
        crc ^= u32::from((data >> (i * 8)) as u8);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 != 0 { 0x82f6_3b78 } else { 0 };
        }
    }
    crc
}
