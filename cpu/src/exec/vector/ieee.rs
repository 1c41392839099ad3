//! IEEE arithmetic with MXCSR's rounding, masks and flags, one operation at a time.

use rustc_apfloat::ieee::{Double, Half, Quad, Single};
use rustc_apfloat::{Float, FloatConvert, Round, Status};

pub(super) const INVALID: u32 = 1 << 0;
pub(super) const DENORMAL: u32 = 1 << 1;
pub(super) const ZERO_DIVIDE: u32 = 1 << 2;
const OVERFLOW: u32 = 1 << 3;
const UNDERFLOW: u32 = 1 << 4;
const INEXACT: u32 = 1 << 5;
const DENORMALS_ARE_ZERO: u32 = 1 << 6;
const FLUSH_TO_ZERO: u32 = 1 << 15;

/// MXCSR's control bits, and the flags that an instruction raises.
pub(in crate::exec) struct Context {
    control: u32,
    pub(super) raised: u32,
}

/// A format with the constants that NaNs need.
pub(in crate::exec) trait Format: Float + FloatConvert<Quad>
where
    Quad: FloatConvert<Self>,
{
    const LARGEST_EXPONENT: i32;
    const SIZE: u32;
    /// Bits of the significand that are stored.
    const FRACTION: u32;
    const QUIET: u128 = 1 << (Self::FRACTION - 1);
    const EXPONENT: u128 = (1 << (Self::SIZE * 8 - 1)) - (1 << Self::FRACTION);
    const DEFAULT_NAN: u128 = 1 << (Self::SIZE * 8 - 1) | Self::EXPONENT | Self::QUIET;
}

impl Format for Half {
    const LARGEST_EXPONENT: i32 = 15;
    const SIZE: u32 = 2;
    const FRACTION: u32 = 10;
}

impl Format for Single {
    const LARGEST_EXPONENT: i32 = 127;
    const SIZE: u32 = 4;
    const FRACTION: u32 = 23;
}

impl Format for Double {
    const LARGEST_EXPONENT: i32 = 1023;
    const SIZE: u32 = 8;
    const FRACTION: u32 = 52;
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Op {
    Add,
    Sub,
    Mul,
    Div,
    Min,
    Max,
    Sqrt,
}

impl Context {
    pub(in crate::exec) fn new(control: u32) -> Self {
        Self { control, raised: 0 }
    }

    /// For operands of 16 bits: their denormals never are zeros.
    pub(in crate::exec) fn of_halves(control: u32) -> Self {
        Self::new(control & !DENORMALS_ARE_ZERO)
    }

    /// For results of 16 bits: tiny ones never are flushed. Bits 1:0 of `imm` are the rounding, unless bit 2
    /// leaves that to MXCSR.
    pub(in crate::exec) fn to_halves(control: u32, imm: u8) -> Self {
        let control = control & !FLUSH_TO_ZERO;
        Self::new(match imm & 4 {
            0 => control & !(3 << 13) | u32::from(imm & 3) << 13,
            _ => control,
        })
    }

    /// Takes the flag of denormal operands back.
    pub(in crate::exec) fn ignore_denormals(&mut self) {
        self.raised &= !DENORMAL;
    }

    pub(super) fn round(&self) -> Round {
        rounding(self.control >> 13)
    }

    /// An operand, with denormals as zeros if MXCSR says so.
    pub(super) fn load<F: Format>(&self, bits: u128) -> F
    where
        Quad: FloatConvert<F>,
    {
        let v = F::from_bits(bits);
        if self.control & DENORMALS_ARE_ZERO != 0 && v.is_denormal() {
            return if v.is_negative() { -F::ZERO } else { F::ZERO };
        }
        v
    }

    pub(super) fn denormal<F: Format>(&mut self, operands: &[F])
    where
        Quad: FloatConvert<F>,
    {
        if operands.iter().any(|v| v.is_denormal()) {
            self.raised |= DENORMAL;
        }
    }

    /// The NaN that an operation on `a` and `b` gives; flags SNaNs.
    fn nan<F: Format>(&mut self, a: F, b: F) -> Option<u128>
    where
        Quad: FloatConvert<F>,
    {
        self.first_nan(&[a, b])
    }

    /// The first NaN among the operands, made quiet; flags SNaNs.
    pub(super) fn first_nan<F: Format>(&mut self, operands: &[F]) -> Option<u128>
    where
        Quad: FloatConvert<F>,
    {
        let first = operands.iter().find(|v| v.is_nan())?;
        if operands.iter().any(|v| v.is_signaling()) {
            self.raised |= INVALID;
        }
        Some(first.to_bits() | F::QUIET)
    }

    /// Result of an operation, with its flags and the flush to zero. `exact` gives the result
    /// before it was rounded, for results at the ends of the range.
    pub(super) fn finish<F: Format>(
        &mut self,
        status: Status,
        v: F,
        exact: impl FnOnce() -> Quad,
    ) -> u128
    where
        Quad: FloatConvert<F>,
    {
        if status.contains(Status::INVALID_OP) {
            self.raised |= INVALID;
            return F::DEFAULT_NAN;
        }
        if status.contains(Status::DIV_BY_ZERO) {
            self.raised |= ZERO_DIVIDE;
            return v.to_bits();
        }
        let inexact = status.contains(Status::INEXACT);
        let (overflow, tiny) = self.range(v, inexact, exact);
        if inexact {
            self.raised |= INEXACT;
        }
        if overflow {
            self.raised |= OVERFLOW;
        }
        let masked = self.control >> 7 & UNDERFLOW != 0;
        if tiny && (inexact || !masked) {
            self.raised |= UNDERFLOW;
        }
        if tiny && masked && self.control & FLUSH_TO_ZERO != 0 {
            self.raised |= UNDERFLOW | INEXACT;
            return if v.is_negative() {
                (-F::ZERO).to_bits()
            } else {
                0
            };
        }
        v.to_bits()
    }

    /// Overflow and tininess as the manuals define them: of the result rounded to the format's
    /// precision with an unbounded exponent.
    fn range<F: Format>(&self, v: F, inexact: bool, exact: impl FnOnce() -> Quad) -> (bool, bool)
    where
        Quad: FloatConvert<F>,
    {
        let exponent = v.ilogb();
        let smallest = 1 - F::LARGEST_EXPONENT;
        if !inexact {
            return (false, v.is_denormal());
        }
        if !v.is_zero() && exponent > smallest && exponent < F::LARGEST_EXPONENT {
            return (false, false);
        }
        let exact = exact();
        let shift = exact.ilogb();
        let mut lost = false;
        let rounded: F = exact
            .scalbn(-shift)
            .convert_r(self.round(), &mut lost)
            .value;
        let exponent = shift + rounded.ilogb();
        (exponent > F::LARGEST_EXPONENT, exponent < smallest)
    }

    pub(super) fn arithmetic<F: Format>(&mut self, op: Op, a: u128, b: u128) -> u128
    where
        Quad: FloatConvert<F>,
    {
        let (x, y) = (self.load::<F>(a), self.load::<F>(b));
        if matches!(op, Op::Min | Op::Max) {
            return self.extreme(op, x, y);
        }
        if op == Op::Sqrt {
            return self.square_root(y);
        }
        if let Some(nan) = self.nan(x, y) {
            return nan;
        }
        let round = self.round();
        let r = match op {
            Op::Add => x.add_r(y, round),
            Op::Sub => x.sub_r(y, round),
            Op::Mul => x.mul_r(y, round),
            _ => x.div_r(y, round),
        };
        if !r
            .status
            .intersects(Status::INVALID_OP | Status::DIV_BY_ZERO)
        {
            self.denormal(&[x, y]);
        }
        self.finish(r.status, r.value, || {
            let (x, y) = (widen(x), widen(y));
            let down = Round::TowardZero;
            let r = match op {
                Op::Add => x.add_r(y, down),
                Op::Sub => x.sub_r(y, down),
                Op::Mul => x.mul_r(y, down),
                _ => x.div_r(y, down),
            };
            // Odd if inexact, so that rounding it again is right.
            Quad::from_bits(r.value.to_bits() | u128::from(r.status.contains(Status::INEXACT)))
        })
    }

    /// MIN and MAX: the second operand if one is a NaN or both are zeros.
    fn extreme<F: Format>(&mut self, op: Op, x: F, y: F) -> u128
    where
        Quad: FloatConvert<F>,
    {
        if x.is_nan() || y.is_nan() {
            self.raised |= INVALID;
            return y.to_bits();
        }
        self.denormal(&[x, y]);
        let first = if op == Op::Min { x < y } else { x > y };
        if first { x.to_bits() } else { y.to_bits() }
    }

    fn square_root<F: Format>(&mut self, y: F) -> u128
    where
        Quad: FloatConvert<F>,
    {
        if let Some(nan) = self.nan(y, y) {
            return nan;
        }
        if y.is_zero() || y.is_infinite() && !y.is_negative() {
            return y.to_bits();
        }
        if y.is_negative() {
            self.raised |= INVALID;
            return F::DEFAULT_NAN;
        }
        self.denormal(&[y]);
        // The operand as an integer times an even power of two, with more bits than the result.
        let exponent = y.ilogb();
        let even = exponent & !1;
        let scaled = y.scalbn(110 - even);
        let mut exact = false;
        let integer = scaled.to_u128_r(128, Round::TowardZero, &mut exact).value;
        let root = integer.isqrt();
        let sticky = u128::from(root * root != integer);
        let r = F::from_u128_r(root << 1 | sticky, self.round());
        let v = r.value.scalbn(even / 2 - 56);
        self.finish(r.status, v, || widen(v))
    }

    pub(super) fn compare<F: Format>(
        &mut self,
        a: u128,
        b: u128,
        quiet: bool,
    ) -> Option<core::cmp::Ordering>
    where
        Quad: FloatConvert<F>,
    {
        let (x, y) = (self.load::<F>(a), self.load::<F>(b));
        if x.is_nan() || y.is_nan() {
            if !quiet || x.is_signaling() || y.is_signaling() {
                self.raised |= INVALID;
            }
            return None;
        }
        self.denormal(&[x, y]);
        x.partial_cmp(&y)
    }

    /// A signed integer of `size` bytes; the indefinite integer if it does not fit.
    pub(super) fn integer<F: Format>(&mut self, a: u128, size: u32, round: Round) -> u64
    where
        Quad: FloatConvert<F>,
    {
        let x = self.load::<F>(a);
        let mut exact = false;
        let r = x.to_i128_r(size as usize * 8, round, &mut exact);
        if x.is_nan() || r.status.contains(Status::INVALID_OP) {
            self.raised |= INVALID;
            return 1 << (size * 8 - 1);
        }
        if !exact && r.status.contains(Status::INEXACT) {
            self.raised |= INEXACT;
        }
        r.value as u64
    }

    pub(in crate::exec) fn convert<A: Format + FloatConvert<B>, B: Format>(
        &mut self,
        a: u128,
    ) -> u128
    where
        Quad: FloatConvert<A> + FloatConvert<B>,
    {
        let x = self.load::<A>(a);
        if self.nan(x, x).is_some() {
            let negative = u128::from(x.is_negative()) << (B::SIZE * 8 - 1);
            let bits = x.to_bits();
            let payload = if A::FRACTION < B::FRACTION {
                (bits & (A::QUIET - 1)) << (B::FRACTION - A::FRACTION)
            } else {
                bits >> (A::FRACTION - B::FRACTION) & (B::QUIET - 1)
            };
            return negative | B::EXPONENT | B::QUIET | payload;
        }
        self.denormal(&[x]);
        let mut lost = false;
        let r = x.convert_r(self.round(), &mut lost);
        self.finish::<B>(r.status, r.value, || widen(x))
    }

    pub(super) fn rounded<F: Format>(&mut self, a: u128, imm: u8) -> u128
    where
        Quad: FloatConvert<F>,
    {
        let x = self.load::<F>(a);
        if let Some(nan) = self.nan(x, x) {
            return nan;
        }
        let round = if imm & 4 != 0 {
            self.round()
        } else {
            rounding(imm.into())
        };
        let r = x.round_to_integral(round);
        if imm & 8 == 0 && r.value != x {
            self.raised |= INEXACT;
        }
        r.value.copy_sign(x).to_bits()
    }
}

pub(super) fn widen<F: Float + FloatConvert<Quad>>(v: F) -> Quad {
    v.convert(&mut false).value
}

fn rounding(rc: u32) -> Round {
    match rc & 3 {
        0 => Round::NearestTiesToEven,
        1 => Round::TowardNegative,
        2 => Round::TowardPositive,
        _ => Round::TowardZero,
    }
}
