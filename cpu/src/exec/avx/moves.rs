//! Moves, broadcasts, and parts of vectors.

use iced_x86::{Instruction, Mnemonic as M, OpKind};

use super::{Halves, halves, is_vector, wide};
use crate::exec::Exec;
use crate::fpu::SCRATCH;
use crate::state::{Core, R};

const LOW: u128 = u64::MAX as u128;

pub(super) fn select(i: &Instruction) -> Option<Exec> {
    Some(match i.mnemonic() {
        M::Vmovaps
        | M::Vmovapd
        | M::Vmovdqa
        | M::Vmovntps
        | M::Vmovntpd
        | M::Vmovntdq
        | M::Vmovntdqa => aligned,
        M::Vmovups | M::Vmovupd | M::Vmovdqu | M::Vlddqu => whole,
        M::Vmovss | M::Vmovsd => scalar,
        M::Vmovd | M::Vmovq => low,
        M::Vmovlps | M::Vmovlpd | M::Vmovhps | M::Vmovhpd => half,
        M::Vmovhlps | M::Vmovlhps => cross,
        M::Vmovddup | M::Vmovshdup | M::Vmovsldup => duplicate,
        M::Vmovmskps | M::Vmovmskpd | M::Vpmovmskb => mask,
        M::Vbroadcastss
        | M::Vbroadcastsd
        | M::Vpbroadcastb
        | M::Vpbroadcastw
        | M::Vpbroadcastd
        | M::Vpbroadcastq
        | M::Vbroadcastf128
        | M::Vbroadcasti128 => broadcast,
        M::Vinsertf128 | M::Vinserti128 => insert_half,
        M::Vextractf128 | M::Vextracti128 => extract_half,
        M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq => masked,
        M::Vzeroupper => |c, _| {
            c.avx()?;
            let count = if c.bits == 64 { 16 } else { 8 };
            c.fpu.high[..count].fill(0);
            Ok(())
        },
        M::Vzeroall => |c, _| {
            c.avx()?;
            let count = if c.bits == 64 { SCRATCH } else { 8 };
            c.fpu.xmm[..count].fill(0);
            c.fpu.high[..count].fill(0);
            Ok(())
        },
        M::Vldmxcsr => |c, i| {
            c.avx()?;
            let v = c.get(i, 0)? as u32;
            c.load_mxcsr(v)
        },
        M::Vstmxcsr => |c, i| {
            c.avx()?;
            let v = c.fpu.mxcsr;
            c.put(i, 0, v.into())
        },
        _ => return None,
    })
}

fn bytes(i: &Instruction) -> usize {
    if wide(i) { 32 } else { 16 }
}

fn aligned(c: &mut Core, i: &Instruction) -> R<()> {
    c.avx()?;
    if i.op0_kind() == OpKind::Memory || i.op1_kind() == OpKind::Memory {
        c.aligned_to(i, bytes(i) as u64)?;
    }
    whole(c, i)
}

fn whole(c: &mut Core, i: &Instruction) -> R<()> {
    c.avx()?;
    if i.op0_kind() == OpKind::Memory {
        let v = c.vector(i.op1_register());
        return c.write_halves(i, bytes(i), v);
    }
    let v = match i.op1_kind() {
        OpKind::Memory => c.read_halves(i, bytes(i))?,
        _ => c.vector(i.op1_register()),
    };
    c.set_vector(i.op0_register(), v);
    Ok(())
}

/// VMOVSS and VMOVSD: of registers the rest comes from the second operand, of memory it is zero.
fn scalar(c: &mut Core, i: &Instruction) -> R<()> {
    c.avx()?;
    let size = if i.mnemonic() == M::Vmovss { 4 } else { 8 };
    if i.op0_kind() == OpKind::Memory {
        let v = c.vector(i.op1_register());
        return c.write_halves(i, size, v);
    }
    let v = if i.op_count() == 2 {
        c.read_halves(i, size)?[0]
    } else {
        let rest = u128::MAX << (size * 8);
        let (a, b) = (c.vector(i.op1_register())[0], c.vector(i.op2_register())[0]);
        a & rest | b & !rest
    };
    c.set_vector(i.op0_register(), [v, 0]);
    Ok(())
}

/// VMOVD and VMOVQ.
fn low(c: &mut Core, i: &Instruction) -> R<()> {
    c.avx()?;
    if i.op0_kind() == OpKind::Register && is_vector(i.op0_register()) {
        let v = match i.op1_kind() {
            OpKind::Register if is_vector(i.op1_register()) => c.vector(i.op1_register())[0],
            _ => c.get(i, 1)?.into(),
        };
        c.set_vector(i.op0_register(), [v & LOW, 0]);
        return Ok(());
    }
    let v = c.vector(i.op1_register())[0] as u64;
    c.put(i, 0, v)
}

fn half(c: &mut Core, i: &Instruction) -> R<()> {
    c.avx()?;
    let high = matches!(i.mnemonic(), M::Vmovhps | M::Vmovhpd);
    if i.op0_kind() == OpKind::Memory {
        let v = c.vector(i.op1_register())[0] >> if high { 64 } else { 0 };
        return c.put(i, 0, v as u64);
    }
    let v = c.read_halves(i, 8)?[0];
    let a = c.vector(i.op1_register())[0];
    let r = if high {
        a & LOW | v << 64
    } else {
        a & !LOW | v
    };
    c.set_vector(i.op0_register(), [r, 0]);
    Ok(())
}

fn cross(c: &mut Core, i: &Instruction) -> R<()> {
    c.avx()?;
    let (a, b) = (c.vector(i.op1_register())[0], c.vector(i.op2_register())[0]);
    let r = match i.mnemonic() {
        M::Vmovhlps => a & !LOW | b >> 64,
        _ => a & LOW | b << 64,
    };
    c.set_vector(i.op0_register(), [r, 0]);
    Ok(())
}

fn duplicate(c: &mut Core, i: &Instruction) -> R<()> {
    c.avx()?;
    let even = 0x0000_0000_ffff_ffff_0000_0000_ffff_ffff;
    let r = c.source(i, 1)?.map(|v| match i.mnemonic() {
        M::Vmovddup => v & LOW | v << 64,
        M::Vmovsldup => v & even | (v & even) << 32,
        _ => v & !even | (v & !even) >> 32,
    });
    c.set_vector(i.op0_register(), r);
    Ok(())
}

/// The sign bits of all lanes.
fn mask(c: &mut Core, i: &Instruction) -> R<()> {
    c.avx()?;
    let v = c.vector(i.op1_register());
    let size = match i.mnemonic() {
        M::Vmovmskps => 32,
        M::Vmovmskpd => 64,
        _ => 8,
    };
    let lanes = 128 / size;
    let mut mask = 0;
    for (n, half) in v[..halves(i)].iter().enumerate() {
        for k in 0..lanes {
            let bit = half >> (k * size + size - 1) & 1;
            mask |= (bit as u64) << (n as u32 * lanes + k);
        }
    }
    c.put(i, 0, mask)
}

fn broadcast(c: &mut Core, i: &Instruction) -> R<()> {
    c.avx()?;
    let size = match i.mnemonic() {
        M::Vpbroadcastb => 1,
        M::Vpbroadcastw => 2,
        M::Vbroadcastss | M::Vpbroadcastd => 4,
        M::Vbroadcastsd | M::Vpbroadcastq => 8,
        _ => 16,
    };
    let v = c.source(i, 1)?[0];
    let lane = v & u128::MAX >> (128 - size * 8);
    let all = (0..16 / size).fold(0, |all, n| all | lane << (n * size * 8));
    c.set_vector(i.op0_register(), [all; 2]);
    Ok(())
}

fn insert_half(c: &mut Core, i: &Instruction) -> R<()> {
    c.avx()?;
    let v = c.source(i, 2)?[0];
    let mut r = c.vector(i.op1_register());
    r[usize::from(i.immediate8() & 1)] = v;
    c.set_vector(i.op0_register(), r);
    Ok(())
}

fn extract_half(c: &mut Core, i: &Instruction) -> R<()> {
    c.avx()?;
    let v = c.vector(i.op1_register())[usize::from(i.immediate8() & 1)];
    if i.op0_kind() == OpKind::Memory {
        return c.write_halves(i, 16, [v, 0]);
    }
    c.set_vector(i.op0_register(), [v, 0]);
    Ok(())
}

/// Loads and stores of the lanes whose sign bit in the mask is set. The others are not touched, and do not
/// fault.
fn masked(c: &mut Core, i: &Instruction) -> R<()> {
    c.avx()?;
    let size: u32 = match i.mnemonic() {
        M::Vmaskmovps | M::Vpmaskmovd => 4,
        _ => 8,
    };
    let store = i.op0_kind() == OpKind::Memory;
    let mask = c.vector(i.op1_register());
    let lanes = 16 / size;
    let seg = Core::operand_segment(i);
    let offset = c.offset(i);
    let chosen = (0..lanes * halves(i) as u32).filter(|n| {
        let shift = n % lanes * size * 8 + size * 8 - 1;
        mask[(n / lanes) as usize] >> shift & 1 != 0
    });
    let place = |n: u32| offset.wrapping_add(u64::from(n * size));
    if !store {
        let mut r: Halves = [0; 2];
        for n in chosen {
            let v = c.read(seg, place(n), size)?;
            r[(n / lanes) as usize] |= u128::from(v) << (n % lanes * size * 8);
        }
        c.set_vector(i.op0_register(), r);
        return Ok(());
    }
    let v = c.vector(i.op2_register());
    // Nothing is written if one of them faults.
    for n in chosen.clone() {
        let at = c.linear(seg, place(n), size.into(), true)?;
        c.probe_write(seg, at, size as usize)?;
    }
    for n in chosen {
        let lane = v[(n / lanes) as usize] >> (n % lanes * size * 8);
        c.write(seg, place(n), size, lane as u64)?;
    }
    Ok(())
}
