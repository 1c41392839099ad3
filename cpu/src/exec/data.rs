//! Moves, exchanges, conversions and bit operations.

use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

use crate::alu;
use crate::exec::Exec;
use crate::fault::Exception;
use crate::flags::{self, sign, zero};
use crate::operand::{address_bits, operand_size, segment_number};
use crate::paging::{READ, WRITE};
use crate::segment::{CS, ES, SS};
use crate::state::{Core, R};

pub(super) fn select(m: M) -> Option<Exec> {
    Some(match m {
        M::Mov => mov,
        M::Movzx => |c, i| {
            let v = c.get(i, 1)?;
            c.put(i, 0, v)
        },
        M::Movsx | M::Movsxd => |c, i| {
            let v = c.get(i, 1)?;
            c.put(i, 0, sign(v, operand_size(i, 1)))
        },
        M::Movbe => movbe,
        M::Movnti | M::Movdiri => |c, i| {
            let v = c.get(i, 1)?;
            c.put(i, 0, v)
        },
        M::Movdir64b => direct_store,
        M::Xchg => xchg,
        M::Cmpxchg => cmpxchg,
        M::Cmpxchg8b | M::Cmpxchg16b => cmpxchg_wide,
        M::Xadd => xadd,
        M::Bswap => bswap,
        M::Lea => lea,
        M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => far_pointer,
        M::Cbw | M::Cwde | M::Cdqe | M::Cwd | M::Cdq | M::Cqo => convert,
        M::Xlatb => xlat,
        M::Lahf => |c, _| {
            let ah = c.f.get() & 0xff | 2;
            c.r[0] = c.r[0] & !0xff00 | ah << 8;
            Ok(())
        },
        M::Sahf => |c, _| {
            let of = c.f.get() & flags::OF;
            c.f.set(c.r[0] >> 8 & 0xff | of);
            Ok(())
        },
        M::Salc => |c, _| {
            let al = if c.f.cf() { 0xff } else { 0 };
            c.set_gpr(0, 1, al);
            Ok(())
        },
        M::Clc => |c, _| {
            c.f.set_cf(false);
            Ok(())
        },
        M::Stc => |c, _| {
            c.f.set_cf(true);
            Ok(())
        },
        M::Cmc => |c, _| {
            let cf = c.f.cf();
            c.f.set_cf(!cf);
            Ok(())
        },
        M::Cld => |c, _| {
            c.system_flags &= !flags::DF;
            Ok(())
        },
        M::Std => |c, _| {
            c.system_flags |= flags::DF;
            Ok(())
        },
        M::Bt | M::Bts | M::Btr | M::Btc => bit_test,
        M::Bsf | M::Bsr => bit_scan,
        M::Tzcnt | M::Lzcnt | M::Popcnt => count,
        M::Andn | M::Bextr | M::Blsi | M::Blsmsk | M::Blsr | M::Bzhi | M::Pdep | M::Pext => bmi,
        M::Crc32 => |c, i| {
            let data = c.get(i, 1)?;
            let crc = c.reg(i.op0_register()) as u32;
            let r = alu::crc32(crc, data, operand_size(i, 1));
            c.put(i, 0, r.into())
        },
        M::Nop
        | M::Endbr32
        | M::Endbr64
        | M::Rdsspd
        | M::Rdsspq
        | M::Reservednop
        | M::Cldemote
        | M::Prefetchit0
        | M::Prefetchit1
        | M::Prefetchwt1
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchw
        | M::Prefetch
        | M::Lfence
        | M::Sfence => |_, _| Ok(()),
        M::Mfence => |c, _| {
            c.barrier();
            Ok(())
        },
        M::Clflush | M::Clflushopt | M::Clwb => |c, i| {
            // The line is read: the access faults as a load does.
            let at = c.offset(i);
            c.read(Core::operand_segment(i), at, 1).map(drop)
        },
        _ => {
            return conditional(m);
        }
    })
}

/// MOVDIR64B: 64 bytes to an aligned address in ES.
fn direct_store(c: &mut Core, i: &Instruction) -> R<()> {
    const BYTES: usize = 64;
    let mut data = [0; BYTES];
    let from = Core::operand_segment(i);
    let offset = c.offset(i);
    let at = c.linear(from, offset, BYTES as u64, false)?;
    c.read_linear(from, at, &mut data, READ)?;
    let target = c.reg(i.op0_register());
    let at = c.linear(ES, target, BYTES as u64, true)?;
    if at & (BYTES as u64 - 1) != 0 {
        return Err(c.gp(0));
    }
    c.write_linear(ES, at, &data, WRITE)
}

/// SETcc and CMOVcc.
fn conditional(m: M) -> Option<Exec> {
    use M::*;
    match m {
        Seto | Setno | Setb | Setae | Sete | Setne | Setbe | Seta | Sets | Setns | Setp | Setnp
        | Setl | Setge | Setle | Setg => Some(|c, i| {
            let holds = c.f.condition(condition_number(i));
            c.put(i, 0, holds.into())
        }),
        Cmovo | Cmovno | Cmovb | Cmovae | Cmove | Cmovne | Cmovbe | Cmova | Cmovs | Cmovns
        | Cmovp | Cmovnp | Cmovl | Cmovge | Cmovle | Cmovg => Some(|c, i| {
            let v = c.get(i, 1)?;
            let old = c.reg(i.op0_register());
            let holds = c.f.condition(condition_number(i));
            c.put(i, 0, if holds { v } else { old })
        }),
        _ => None,
    }
}

/// Condition of Jcc, SETcc and CMOVcc as it is encoded.
pub(crate) fn condition_number(i: &Instruction) -> u8 {
    use iced_x86::ConditionCode as C;
    match i.condition_code() {
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        _ => 15,
    }
}

fn mov(c: &mut Core, i: &Instruction) -> R<()> {
    let (to, from) = (i.op0_register(), i.op1_register());
    if i.op0_kind() == OpKind::Register {
        if to.is_segment_register() {
            let seg = segment_number(to);
            if seg == CS {
                return Err(c.ud());
            }
            let selector = c.get(i, 1)? as u16;
            c.load_segment(seg, selector)?;
            c.shadow |= seg == SS;
            c.quiet |= seg == SS;
            return Ok(());
        }
        if to.is_cr() || to.is_dr() || to.is_tr() {
            return super::control::mov_to(c, i);
        }
    }
    if i.op1_kind() == OpKind::Register && (from.is_cr() || from.is_dr() || from.is_tr()) {
        return super::control::mov_from(c, i);
    }
    let v = c.get(i, 1)?;
    c.put(i, 0, v)
}

fn movbe(c: &mut Core, i: &Instruction) -> R<()> {
    let size = operand_size(i, 0);
    let v = c.get(i, 1)?.swap_bytes() >> (64 - size * 8);
    c.put(i, 0, v)
}

fn xchg(c: &mut Core, i: &Instruction) -> R<()> {
    let (a, b) = (c.get_update(i, 0)?, c.get_update(i, 1)?);
    // Memory is written first: it can fault.
    if i.op1_kind() == OpKind::Memory {
        c.put(i, 1, a)?;
        c.put(i, 0, b)
    } else {
        c.put(i, 0, b)?;
        c.put(i, 1, a)
    }
}

fn cmpxchg(c: &mut Core, i: &Instruction) -> R<()> {
    let size = operand_size(i, 0);
    let old = c.get_update(i, 0)?;
    let new = c.get(i, 1)?;
    let expected = zero(c.r[0], size);
    let mut f = c.f;
    alu::binary(&mut f, alu::CMP, expected, old, size);
    if old == expected {
        c.put(i, 0, new)?;
    } else {
        // The destination is written back in both cases.
        if i.op0_kind() == OpKind::Memory {
            c.put(i, 0, old)?;
        }
        c.set_gpr(0, size, old);
    }
    c.f = f;
    Ok(())
}

fn cmpxchg_wide(c: &mut Core, i: &Instruction) -> R<()> {
    let half = if i.mnemonic() == M::Cmpxchg16b { 8 } else { 4 };
    let seg = Core::operand_segment(i);
    let offset = c.offset(i);
    let at = c.linear(seg, offset, u64::from(half) * 2, true)?;
    if half == 8 && at & 15 != 0 {
        return Err(c.gp(0));
    }
    let size = half as usize * 2;
    let mut data = [0; 16];
    match c.load_locked(seg, at, size)? {
        Some(value) => data = value.to_le_bytes(),
        None => {
            c.probe_write(seg, at, size)?;
            c.read_linear(seg, at, &mut data[..size], READ)?;
        }
    }
    let data = &mut data[..size];
    let word = |part: &[u8]| {
        let mut bytes = [0; 8];
        bytes[..part.len()].copy_from_slice(part);
        u64::from_le_bytes(bytes)
    };
    let (low, high) = data.split_at(half as usize);
    let (low, high) = (word(low), word(high));
    let equal = low == zero(c.r[0], half) && high == zero(c.r[2], half);
    let (new_low, new_high) = if equal { (c.r[3], c.r[1]) } else { (low, high) };
    data[..half as usize].copy_from_slice(&new_low.to_le_bytes()[..half as usize]);
    data[half as usize..].copy_from_slice(&new_high.to_le_bytes()[..half as usize]);
    let mut bytes = [0; 16];
    bytes[..size].copy_from_slice(data);
    match c.store_locked(at, size, u128::from_le_bytes(bytes)) {
        Some(done) => done?,
        None => c.write_linear(seg, at, data, WRITE)?,
    }
    if !equal {
        c.set_gpr(0, half, low);
        c.set_gpr(2, half, high);
    }
    c.f.set_zf(equal);
    Ok(())
}

fn xadd(c: &mut Core, i: &Instruction) -> R<()> {
    let size = operand_size(i, 0);
    let (a, b) = (c.get_update(i, 0)?, c.get(i, 1)?);
    let mut f = c.f;
    let sum = alu::binary(&mut f, alu::ADD, a, b, size);
    if i.op0_kind() == OpKind::Memory {
        c.put(i, 0, sum)?;
        c.put(i, 1, a)?;
    } else {
        c.put(i, 1, a)?;
        c.put(i, 0, sum)?;
    }
    c.f = f;
    Ok(())
}

/// BSWAP; with 16 bits, which is undefined, the register becomes zero as on known processors.
fn bswap(c: &mut Core, i: &Instruction) -> R<()> {
    let v = c.get(i, 0)?;
    let swapped = match operand_size(i, 0) {
        8 => v.swap_bytes(),
        4 => (v as u32).swap_bytes().into(),
        _ => 0,
    };
    c.put(i, 0, swapped)
}

fn lea(c: &mut Core, i: &Instruction) -> R<()> {
    let offset = c.offset(i);
    c.put(i, 0, offset)
}

fn far_pointer(c: &mut Core, i: &Instruction) -> R<()> {
    let size = operand_size(i, 0);
    let seg = Core::operand_segment(i);
    let offset = c.offset(i);
    let value = c.read(seg, offset, size)?;
    let selector = c.read(seg, offset.wrapping_add(size.into()), 2)? as u16;
    let target = match i.mnemonic() {
        M::Les => 0,
        M::Lss => SS,
        M::Lfs => 4,
        M::Lgs => 5,
        _ => 3,
    };
    c.load_segment(target, selector)?;
    c.put(i, 0, value)
}

fn convert(c: &mut Core, i: &Instruction) -> R<()> {
    let a = c.r[0];
    match i.mnemonic() {
        M::Cbw => c.set_gpr(0, 2, sign(a, 1)),
        M::Cwde => c.set_gpr(0, 4, sign(a, 2)),
        M::Cdqe => c.set_gpr(0, 8, sign(a, 4)),
        M::Cwd => c.set_gpr(2, 2, (sign(a, 2) as i64 >> 63) as u64),
        M::Cdq => c.set_gpr(2, 4, (sign(a, 4) as i64 >> 63) as u64),
        _ => c.set_gpr(2, 8, (a as i64 >> 63) as u64),
    }
    Ok(())
}

fn xlat(c: &mut Core, i: &Instruction) -> R<()> {
    let base = c.reg(i.memory_base());
    let mut offset = base.wrapping_add(c.r[0] & 0xff);
    match address_bits(i) {
        16 => offset &= 0xffff,
        32 => offset &= 0xffff_ffff,
        _ => {}
    }
    let v = c.read(Core::operand_segment(i), offset, 1)?;
    c.set_gpr(0, 1, v);
    Ok(())
}

fn bit_test(c: &mut Core, i: &Instruction) -> R<()> {
    let size = operand_size(i, 0);
    let bits = u64::from(size) * 8;
    let seg = Core::operand_segment(i);
    let memory = i.op0_kind() == OpKind::Memory;
    let raw = c.get(i, 1)?;
    let mut offset = 0;
    let a = if memory {
        offset = c.offset(i);
        if i.op1_kind() == OpKind::Register {
            // The bit string reaches beyond the operand, in both directions.
            let words = sign(raw, size) as i64 >> bits.trailing_zeros();
            offset = offset.wrapping_add((words as u64).wrapping_mul(size.into()));
            match address_bits(i) {
                16 => offset &= 0xffff,
                32 => offset &= 0xffff_ffff,
                _ => {}
            }
        }
        if i.mnemonic() == M::Bt {
            c.read(seg, offset, size)?
        } else {
            c.read_update(seg, offset, size)?
        }
    } else {
        c.get(i, 0)?
    };
    let bit = 1 << (raw & (bits - 1));
    let r = match i.mnemonic() {
        M::Bts => a | bit,
        M::Btr => a & !bit,
        M::Btc => a ^ bit,
        _ => a,
    };
    if i.mnemonic() != M::Bt {
        if memory {
            c.write(seg, offset, size, r)?;
        } else {
            c.put(i, 0, r)?;
        }
    }
    c.f.set_cf(a & bit != 0);
    Ok(())
}

fn bit_scan(c: &mut Core, i: &Instruction) -> R<()> {
    let a = c.get(i, 1)?;
    match alu::scan(&mut c.f, i.mnemonic() == M::Bsr, a) {
        Some(r) => c.put(i, 0, r),
        None => Ok(()),
    }
}

fn count(c: &mut Core, i: &Instruction) -> R<()> {
    let size = operand_size(i, 0);
    let a = c.get(i, 1)?;
    let r = match i.mnemonic() {
        M::Popcnt => {
            c.f.logic(u64::from(a != 0), 1);
            c.f.set(if a == 0 { flags::ZF } else { 0 });
            a.count_ones().into()
        }
        m => alu::count_zeros(&mut c.f, m == M::Lzcnt, a, size),
    };
    c.put(i, 0, r)
}

fn bmi(c: &mut Core, i: &Instruction) -> R<()> {
    let size = operand_size(i, 0);
    let a = c.get(i, 1)?;
    let b = if i.op_count() == 3 { c.get(i, 2)? } else { 0 };
    let (r, cf) = match i.mnemonic() {
        M::Pdep => return c.put(i, 0, alu::deposit(a, b)),
        M::Pext => return c.put(i, 0, alu::extract(a, b)),
        M::Andn => (!a & b, false),
        M::Bextr => {
            let (start, len) = (b & 0xff, b >> 8 & 0xff);
            let shifted = if start < 64 { a >> start } else { 0 };
            let mask = if len < 64 { (1 << len) - 1 } else { u64::MAX };
            (shifted & mask, false)
        }
        M::Blsi => (a & a.wrapping_neg(), a != 0),
        M::Blsmsk => (a ^ a.wrapping_sub(1), a == 0),
        M::Blsr => (a & a.wrapping_sub(1), a == 0),
        _ => {
            let r = alu::zero_high(&mut c.f, a, b, size);
            return c.put(i, 0, r);
        }
    };
    let r = zero(r, size);
    c.f.result(r, size, cf, false);
    c.put(i, 0, r)
}

/// BOUND: #BR outside of the two signed limits in memory.
pub(super) fn bound(c: &mut Core, i: &Instruction) -> R<()> {
    let size = operand_size(i, 0);
    let seg = Core::operand_segment(i);
    let offset = c.offset(i);
    let low = sign(c.read(seg, offset, size)?, size) as i64;
    let high = sign(c.read(seg, offset.wrapping_add(size.into()), size)?, size) as i64;
    let index = sign(c.reg(i.op0_register()), size) as i64;
    if index < low || index > high {
        return Err(c.fault(Exception::plain(Exception::BR)));
    }
    Ok(())
}

/// True for registers that only privileged code reads or writes.
pub(super) fn is_control(r: Register) -> bool {
    r.is_cr() || r.is_dr() || r.is_tr()
}
