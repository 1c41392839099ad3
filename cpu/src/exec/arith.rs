//! Integer arithmetic, shifts and multiplication, for all operand forms.

use iced_x86::{Instruction, Mnemonic as M};

use crate::alu;
use crate::exec::Exec;
use crate::fault::Exception;
use crate::flags::zero;
use crate::operand::operand_size;
use crate::select::alu_op;
use crate::state::{Core, R};

pub(super) fn select(m: M) -> Option<Exec> {
    Some(match m {
        M::Add | M::Or | M::Adc | M::Sbb | M::And | M::Sub | M::Xor | M::Cmp | M::Test => binary,
        M::Inc | M::Dec | M::Neg | M::Not => unary,
        M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shl | M::Sal | M::Shr | M::Sar => shift,
        M::Shld | M::Shrd => double_shift,
        M::Imul => imul,
        M::Mul => mul,
        M::Div | M::Idiv => divide,
        M::Adcx | M::Adox => carry_chain,
        M::Mulx => mulx,
        M::Rorx | M::Shlx | M::Shrx | M::Sarx => shift_no_flags,
        M::Daa | M::Das | M::Aaa | M::Aas | M::Aam | M::Aad => decimal,
        _ => return None,
    })
}

fn binary(c: &mut Core, i: &Instruction) -> R<()> {
    let op = alu_op(i.mnemonic()).unwrap_or(alu::TEST);
    let size = operand_size(i, 0);
    let a = if alu::writes(op) {
        c.get_update(i, 0)?
    } else {
        c.get(i, 0)?
    };
    let b = c.get_sized(i, 1, size)?;
    let mut f = c.f;
    let r = alu::binary(&mut f, op, a, b, size);
    if alu::writes(op) {
        c.put(i, 0, r)?;
    }
    c.f = f;
    Ok(())
}

fn unary(c: &mut Core, i: &Instruction) -> R<()> {
    let size = operand_size(i, 0);
    let a = c.get_update(i, 0)?;
    let mut f = c.f;
    let r = match i.mnemonic() {
        M::Inc => alu::inc(&mut f, a, size),
        M::Dec => alu::dec(&mut f, a, size),
        M::Neg => alu::neg(&mut f, a, size),
        _ => zero(!a, size),
    };
    c.put(i, 0, r)?;
    c.f = f;
    Ok(())
}

fn shift(c: &mut Core, i: &Instruction) -> R<()> {
    let op = match i.mnemonic() {
        M::Rol => alu::ROL,
        M::Ror => alu::ROR,
        M::Rcl => alu::RCL,
        M::Rcr => alu::RCR,
        M::Shr => alu::SHR,
        M::Sar => alu::SAR,
        _ => alu::SHL,
    };
    let size = operand_size(i, 0);
    let a = c.get_update(i, 0)?;
    let count = c.get(i, 1)? & 0xff;
    let mut f = c.f;
    let r = alu::rotate(&mut f, op, a, count, size);
    c.put(i, 0, r.unwrap_or(a))?;
    c.f = f;
    Ok(())
}

fn double_shift(c: &mut Core, i: &Instruction) -> R<()> {
    let size = operand_size(i, 0);
    let a = c.get_update(i, 0)?;
    let b = c.get(i, 1)?;
    let count = c.get(i, 2)? & 0xff;
    let mut f = c.f;
    let left = i.mnemonic() == M::Shld;
    let r = alu::double_shift(&mut f, left, a, b, count, size);
    c.put(i, 0, r.unwrap_or(a))?;
    c.f = f;
    Ok(())
}

fn imul(c: &mut Core, i: &Instruction) -> R<()> {
    if i.op_count() == 1 {
        return mul(c, i);
    }
    let size = operand_size(i, 0);
    let (x, y) = if i.op_count() == 2 { (0, 1) } else { (1, 2) };
    let a = c.get_sized(i, x, size)?;
    let b = c.get_sized(i, y, size)?;
    let r = alu::imul(&mut c.f, a, b, size);
    c.put(i, 0, r)
}

fn mul(c: &mut Core, i: &Instruction) -> R<()> {
    let size = operand_size(i, 0);
    let b = c.get(i, 0)?;
    let a = zero(c.r[0], size);
    let (low, high) = alu::wide_mul(&mut c.f, i.mnemonic() == M::Imul, a, b, size);
    if size == 1 {
        c.set_gpr(0, 2, low | high << 8);
    } else {
        c.set_gpr(0, size, low);
        c.set_gpr(2, size, high);
    }
    Ok(())
}

fn divide(c: &mut Core, i: &Instruction) -> R<()> {
    let size = operand_size(i, 0);
    let divisor = c.get(i, 0)?;
    let (high, low) = if size == 1 {
        (c.r[0] >> 8 & 0xff, c.r[0] & 0xff)
    } else {
        (zero(c.r[2], size), zero(c.r[0], size))
    };
    let signed = i.mnemonic() == M::Idiv;
    let Some((q, r)) = alu::divide(signed, high, low, divisor, size) else {
        return Err(c.fault(Exception::plain(Exception::DE)));
    };
    if size == 1 {
        c.set_gpr(0, 2, q | r << 8);
    } else {
        c.set_gpr(0, size, q);
        c.set_gpr(2, size, r);
    }
    Ok(())
}

/// ADCX and ADOX: one flag is carry in and out, the others are kept.
fn carry_chain(c: &mut Core, i: &Instruction) -> R<()> {
    let size = operand_size(i, 0);
    let a = c.get(i, 0)?;
    let b = c.get(i, 1)?;
    let (cf, of) = (c.f.cf(), c.f.of());
    let adcx = i.mnemonic() == M::Adcx;
    let wide = u128::from(a) + u128::from(b) + u128::from(if adcx { cf } else { of });
    let carry = wide >> (size * 8) != 0;
    if adcx {
        c.f.carry_overflow(carry, of);
    } else {
        c.f.carry_overflow(cf, carry);
    }
    c.put(i, 0, zero(wide as u64, size))
}

fn mulx(c: &mut Core, i: &Instruction) -> R<()> {
    let size = operand_size(i, 0);
    let wide = u128::from(zero(c.r[2], size)) * u128::from(c.get(i, 2)?);
    c.put(i, 1, zero(wide as u64, size))?;
    c.put(i, 0, zero((wide >> (size * 8)) as u64, size))
}

fn shift_no_flags(c: &mut Core, i: &Instruction) -> R<()> {
    let size = operand_size(i, 0);
    let a = c.get(i, 1)?;
    let count = c.get(i, 2)?;
    let r = match i.mnemonic() {
        M::Shlx => alu::shift_alone(alu::SHL, a, count, size),
        M::Shrx => alu::shift_alone(alu::SHR, a, count, size),
        M::Sarx => alu::shift_alone(alu::SAR, a, count, size),
        _ => match count as u32 & (size * 8 - 1) {
            0 => a,
            n => a >> n | a << (size * 8 - n),
        },
    };
    c.put(i, 0, zero(r, size))
}

/// The adjustments of packed and unpacked decimals; not in 64-bit mode.
fn decimal(c: &mut Core, i: &Instruction) -> R<()> {
    match i.mnemonic() {
        M::Daa | M::Das => decimal_packed(c, i.mnemonic() == M::Das),
        M::Aaa | M::Aas => decimal_unpacked(c, i.mnemonic() == M::Aas),
        M::Aam => {
            let base = u64::from(i.immediate8());
            if base == 0 {
                return Err(c.fault(Exception::plain(Exception::DE)));
            }
            let al = c.r[0] & 0xff;
            c.set_gpr(0, 2, ((al / base) << 8) | (al % base));
            c.f.logic(al % base, 1);
        }
        _ => {
            let base = u64::from(i.immediate8());
            let al = (c.r[0] & 0xff).wrapping_add((c.r[0] >> 8 & 0xff) * base) & 0xff;
            c.set_gpr(0, 2, al);
            c.f.logic(al, 1);
        }
    }
    Ok(())
}

fn decimal_packed(c: &mut Core, subtract: bool) {
    use crate::flags::{AF, CF};
    let old = c.r[0] & 0xff;
    let (old_cf, af) = (c.f.cf(), c.f.af());
    let (mut al, mut cf) = (old, old_cf);
    let low = old & 15 > 9 || af;
    let high = old > 0x99 || old_cf;
    if low {
        let step = if subtract { al.wrapping_sub(6) } else { al + 6 };
        cf |= subtract && al < 6;
        al = step & 0xff;
    }
    if high {
        al = if subtract {
            al.wrapping_sub(0x60)
        } else {
            al + 0x60
        } & 0xff;
    }
    cf = high || subtract && cf;
    c.set_gpr(0, 1, al);
    c.f.logic(al, 1);
    let rest = c.f.get() & !(AF | CF);
    c.f.set(rest | if low { AF } else { 0 } | if cf { CF } else { 0 });
}

fn decimal_unpacked(c: &mut Core, subtract: bool) {
    use crate::flags::{AF, CF};
    let adjust = c.r[0] & 15 > 9 || c.f.af();
    if adjust {
        let ax = c.r[0] & 0xffff;
        let ax = if subtract {
            ax.wrapping_sub(6).wrapping_sub(0x100)
        } else {
            ax.wrapping_add(0x106)
        };
        c.set_gpr(0, 2, ax);
    }
    c.r[0] &= !0xf0;
    c.f.logic(c.r[0] & 0xff, 1);
    let rest = c.f.get();
    c.f.set(rest | if adjust { AF | CF } else { 0 });
}
