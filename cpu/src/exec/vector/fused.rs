//! Products and sums with one rounding.

use rustc_apfloat::ieee::Quad;
use rustc_apfloat::{Float, FloatConvert, Round, Status};

use super::ieee::{Context, Format, INVALID, widen};

impl Context {
    /// `x * y + z`, rounded once. `signs` changes those of product and addend, but not those of NaNs.
    pub(in crate::exec) fn fused<F: Format>(
        &mut self,
        operands: [u128; 3],
        signs: (bool, bool),
    ) -> u128
    where
        Quad: FloatConvert<F>,
    {
        let [x, y, z] = operands.map(|bits| self.load::<F>(bits));
        if let Some(nan) = self.first_nan(&[x, y, z]) {
            return nan;
        }
        let (x, z) = (negated(x, signs.0), negated(z, signs.1));
        // All bits of the product, 106 at the most, fit in a quadruple.
        let product = widen(x).mul_r(widen(y), Round::TowardZero);
        let sum = product.value.add_r(widen(z), self.round());
        if (product.status | sum.status).contains(Status::INVALID_OP) {
            self.raised |= INVALID;
            return F::DEFAULT_NAN;
        }
        self.denormal(&[x, y, z]);
        let exact = if sum.status.contains(Status::INEXACT) {
            // Odd, so that rounding it again is right.
            let cut = product.value.add_r(widen(z), Round::TowardZero).value;
            Quad::from_bits(cut.to_bits() | 1)
        } else {
            sum.value
        };
        let rounded = exact.convert_r(self.round(), &mut false);
        self.finish::<F>(rounded.status, rounded.value, || exact)
    }
}

fn negated<F: Float>(v: F, negative: bool) -> F {
    if negative { -v } else { v }
}
