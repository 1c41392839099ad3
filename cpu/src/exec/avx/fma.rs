//! FMA: a product and a sum with one rounding.

use iced_x86::{Instruction, Mnemonic as M};
use rustc_apfloat::ieee::{Double, Single};

use super::{Halves, halves};
use crate::exec::Exec;
use crate::exec::vector::Context;
use crate::state::{Core, R};

/// The places of first factor, second factor and addend among the operands.
type Order = [usize; 3];

/// Of the forms 132, 213 and 231.
const ORDERS: [Order; 3] = [[0, 2, 1], [1, 0, 2], [1, 2, 0]];

/// Signs of product and addend in even and in odd lanes; true is minus.
type Signs = [(bool, bool); 2];

const ADD: Signs = [(false, false); 2];
const SUB: Signs = [(false, true); 2];
const NEG_ADD: Signs = [(true, false); 2];
const NEG_SUB: Signs = [(true, true); 2];
/// Even lanes subtract, odd ones add.
const ADD_SUB: Signs = [(false, true), (false, false)];
const SUB_ADD: Signs = [(false, false), (false, true)];

struct Form {
    order: Order,
    signs: Signs,
    size: u32,
    scalar: bool,
}

fn form(m: M) -> Option<Form> {
    macro_rules! table {
        ($($signs:ident $size:literal $scalar:literal: $m132:ident $m213:ident $m231:ident;)*) => {
            match m {
                $(
                    M::$m132 => (0, $signs, $size, $scalar),
                    M::$m213 => (1, $signs, $size, $scalar),
                    M::$m231 => (2, $signs, $size, $scalar),
                )*
                _ => return None,
            }
        };
    }
    let (n, signs, size, scalar): (usize, _, _, _) = table! {
        ADD 4 false: Vfmadd132ps Vfmadd213ps Vfmadd231ps;
        ADD 8 false: Vfmadd132pd Vfmadd213pd Vfmadd231pd;
        ADD 4 true: Vfmadd132ss Vfmadd213ss Vfmadd231ss;
        ADD 8 true: Vfmadd132sd Vfmadd213sd Vfmadd231sd;
        SUB 4 false: Vfmsub132ps Vfmsub213ps Vfmsub231ps;
        SUB 8 false: Vfmsub132pd Vfmsub213pd Vfmsub231pd;
        SUB 4 true: Vfmsub132ss Vfmsub213ss Vfmsub231ss;
        SUB 8 true: Vfmsub132sd Vfmsub213sd Vfmsub231sd;
        NEG_ADD 4 false: Vfnmadd132ps Vfnmadd213ps Vfnmadd231ps;
        NEG_ADD 8 false: Vfnmadd132pd Vfnmadd213pd Vfnmadd231pd;
        NEG_ADD 4 true: Vfnmadd132ss Vfnmadd213ss Vfnmadd231ss;
        NEG_ADD 8 true: Vfnmadd132sd Vfnmadd213sd Vfnmadd231sd;
        NEG_SUB 4 false: Vfnmsub132ps Vfnmsub213ps Vfnmsub231ps;
        NEG_SUB 8 false: Vfnmsub132pd Vfnmsub213pd Vfnmsub231pd;
        NEG_SUB 4 true: Vfnmsub132ss Vfnmsub213ss Vfnmsub231ss;
        NEG_SUB 8 true: Vfnmsub132sd Vfnmsub213sd Vfnmsub231sd;
        ADD_SUB 4 false: Vfmaddsub132ps Vfmaddsub213ps Vfmaddsub231ps;
        ADD_SUB 8 false: Vfmaddsub132pd Vfmaddsub213pd Vfmaddsub231pd;
        SUB_ADD 4 false: Vfmsubadd132ps Vfmsubadd213ps Vfmsubadd231ps;
        SUB_ADD 8 false: Vfmsubadd132pd Vfmsubadd213pd Vfmsubadd231pd;
    };
    Some(Form {
        order: ORDERS[n],
        signs,
        size,
        scalar,
    })
}

pub(super) fn select(i: &Instruction) -> Option<Exec> {
    form(i.mnemonic()).map(|_| fused as Exec)
}

fn fused(c: &mut Core, i: &Instruction) -> R<()> {
    c.avx()?;
    let Some(form) = form(i.mnemonic()) else {
        return Err(c.missing(i.code()));
    };
    let to = i.op0_register();
    let operands: [Halves; 3] = [c.vector(to), c.vector(i.op1_register()), c.source(i, 2)?];
    let [x, y, z] = form.order.map(|n| operands[n]);
    // The rest of a scalar's register stays.
    let mut result = operands[0];
    let mut context = Context::new(c.fpu.mxcsr);
    let lanes = if form.scalar {
        1
    } else {
        halves(i) as u32 * (16 / form.size)
    };
    for n in 0..lanes {
        let one = [x, y, z].map(|v| super::lanes::lane(&v, n, form.size).into());
        let signs = form.signs[n as usize & 1];
        let r = if form.size == 4 {
            context.fused::<Single>(one, signs)
        } else {
            context.fused::<Double>(one, signs)
        };
        super::lanes::put(&mut result, n, form.size, r as u64);
    }
    c.raise(&context)?;
    c.set_vector(to, result);
    Ok(())
}
