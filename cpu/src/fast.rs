//! Handlers of the frequent integer instructions, generic over operation, size and operands.
//!
//! The order in each is: address, access, then registers and flags; so a fault leaves the state
//! before the instruction.

use crate::alu;
use crate::op::{End, Op, Out, Sem};
use crate::state::{Core, R};

/// Value of a general register by number.
#[inline(always)]
pub(crate) fn r(c: &Core, n: u8) -> u64 {
    c.r[usize::from(n & 31)]
}

/// Low `S` bytes of a register.
#[inline(always)]
pub(crate) fn get<const S: usize>(c: &Core, n: u8) -> u64 {
    match S {
        1 => u64::from(r(c, n) as u8),
        2 => u64::from(r(c, n) as u16),
        4 => u64::from(r(c, n) as u32),
        _ => r(c, n),
    }
}

/// Writes the low `S` bytes; 4 bytes clear the upper half.
#[inline(always)]
pub(crate) fn set<const S: usize>(c: &mut Core, n: u8, value: u64) {
    let to = &mut c.r[usize::from(n & 31)];
    *to = match S {
        1 => *to & !0xff | value & 0xff,
        2 => *to & !0xffff | value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    };
}

/// Address of a 64-bit memory operand.
#[inline(always)]
fn address(c: &Core, op: &Op) -> u64 {
    let index = r(c, op.index) << (op.scale & 3);
    r(c, op.base)
        .wrapping_add(index)
        .wrapping_add(op.disp as i64 as u64)
        .wrapping_add(c.base[usize::from(op.seg & 7)])
}

#[inline(always)]
pub(crate) fn load<const S: usize, const SLOW: bool>(c: &mut Core, op: &Op) -> R<u64> {
    let at = address(c, op);
    c.load_by::<S, SLOW>(op.seg.into(), at)
}

#[inline(always)]
fn store<const S: usize, const SLOW: bool>(c: &mut Core, op: &Op, value: u64) -> R<()> {
    let at = address(c, op);
    c.store_by::<S, SLOW>(op.seg.into(), at, value)
}

pub(crate) struct Nop;
impl Sem for Nop {
    #[inline(always)]
    fn exec<const SLOW: bool>(_: &mut Core, _: &Op) -> R<()> {
        Ok(())
    }
}

pub(crate) struct MovRR<const S: usize>;
impl<const S: usize> Sem for MovRR<S> {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<()> {
        let v = get::<S>(c, op.src);
        set::<S>(c, op.dst, v);
        Ok(())
    }
}

pub(crate) struct MovRI<const S: usize>;
impl<const S: usize> Sem for MovRI<S> {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<()> {
        set::<S>(c, op.dst, op.imm);
        Ok(())
    }
}

pub(crate) struct Load<const S: usize>;
impl<const S: usize> Sem for Load<S> {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<()> {
        let v = load::<S, SLOW>(c, op)?;
        set::<S>(c, op.dst, v);
        Ok(())
    }
}

pub(crate) struct Store<const S: usize>;
impl<const S: usize> Sem for Store<S> {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<()> {
        let v = r(c, op.src);
        store::<S, SLOW>(c, op, v)
    }
}

pub(crate) struct StoreImm<const S: usize>;
impl<const S: usize> Sem for StoreImm<S> {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<()> {
        store::<S, SLOW>(c, op, op.imm)
    }
}

/// MOVZX, MOVSX, MOVSXD from `F` bytes to `T` bytes, registers.
pub(crate) struct ExtendR<const F: usize, const T: usize, const SIGNED: bool>;
impl<const F: usize, const T: usize, const SIGNED: bool> Sem for ExtendR<F, T, SIGNED> {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<()> {
        let v = get::<F>(c, op.src);
        let v = if SIGNED {
            crate::flags::sign(v, F as u32)
        } else {
            v
        };
        set::<T>(c, op.dst, v);
        Ok(())
    }
}

pub(crate) struct ExtendM<const F: usize, const T: usize, const SIGNED: bool>;
impl<const F: usize, const T: usize, const SIGNED: bool> Sem for ExtendM<F, T, SIGNED> {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<()> {
        let v = load::<F, SLOW>(c, op)?;
        let v = if SIGNED {
            crate::flags::sign(v, F as u32)
        } else {
            v
        };
        set::<T>(c, op.dst, v);
        Ok(())
    }
}

pub(crate) struct Lea<const S: usize>;
impl<const S: usize> Sem for Lea<S> {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<()> {
        let v = address(c, op);
        set::<S>(c, op.dst, v);
        Ok(())
    }
}

pub(crate) struct AluRR<const O: u8, const S: usize>;
impl<const O: u8, const S: usize> Sem for AluRR<O, S> {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<()> {
        let (a, b) = (get::<S>(c, op.dst), get::<S>(c, op.src));
        let v = alu::binary(&mut c.f, O, a, b, S as u32);
        if alu::writes(O) {
            set::<S>(c, op.dst, v);
        }
        Ok(())
    }
}

pub(crate) struct AluRI<const O: u8, const S: usize>;
impl<const O: u8, const S: usize> Sem for AluRI<O, S> {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<()> {
        let a = get::<S>(c, op.dst);
        let v = alu::binary(&mut c.f, O, a, op.imm, S as u32);
        if alu::writes(O) {
            set::<S>(c, op.dst, v);
        }
        Ok(())
    }
}

pub(crate) struct AluRM<const O: u8, const S: usize>;
impl<const O: u8, const S: usize> Sem for AluRM<O, S> {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<()> {
        let b = load::<S, SLOW>(c, op)?;
        let a = get::<S>(c, op.dst);
        let v = alu::binary(&mut c.f, O, a, b, S as u32);
        if alu::writes(O) {
            set::<S>(c, op.dst, v);
        }
        Ok(())
    }
}

#[inline(always)]
fn alu_memory<const O: u8, const S: usize, const SLOW: bool>(
    c: &mut Core,
    op: &Op,
    b: u64,
) -> R<()> {
    let at = address(c, op);
    let a = if alu::writes(O) {
        c.load_update_by::<S, SLOW>(op.seg.into(), at)?
    } else {
        c.load_by::<S, SLOW>(op.seg.into(), at)?
    };
    let mut f = c.f;
    let v = alu::binary(&mut f, O, a, b, S as u32);
    if alu::writes(O) {
        c.store_by::<S, SLOW>(op.seg.into(), at, v)?;
    }
    c.f = f;
    Ok(())
}

pub(crate) struct AluMR<const O: u8, const S: usize>;
impl<const O: u8, const S: usize> Sem for AluMR<O, S> {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<()> {
        let b = get::<S>(c, op.src);
        alu_memory::<O, S, SLOW>(c, op, b)
    }
}

pub(crate) struct AluMI<const O: u8, const S: usize>;
impl<const O: u8, const S: usize> Sem for AluMI<O, S> {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<()> {
        alu_memory::<O, S, SLOW>(c, op, op.imm)
    }
}

pub(crate) const INC: u8 = 0;
pub(crate) const DEC: u8 = 1;
pub(crate) const NEG: u8 = 2;
pub(crate) const NOT: u8 = 3;

pub(crate) struct Unary<const O: u8, const S: usize>;
impl<const O: u8, const S: usize> Sem for Unary<O, S> {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<()> {
        let a = get::<S>(c, op.dst);
        let v = match O {
            INC => alu::inc(&mut c.f, a, S as u32),
            DEC => alu::dec(&mut c.f, a, S as u32),
            NEG => alu::neg(&mut c.f, a, S as u32),
            _ => !a,
        };
        set::<S>(c, op.dst, v);
        Ok(())
    }
}

pub(crate) struct UnaryM<const O: u8, const S: usize>;
impl<const O: u8, const S: usize> Sem for UnaryM<O, S> {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<()> {
        let at = address(c, op);
        let a = c.load_update_by::<S, SLOW>(op.seg.into(), at)?;
        let mut f = c.f;
        let v = match O {
            INC => alu::inc(&mut f, a, S as u32),
            DEC => alu::dec(&mut f, a, S as u32),
            NEG => alu::neg(&mut f, a, S as u32),
            _ => !a,
        };
        c.store_by::<S, SLOW>(op.seg.into(), at, v)?;
        c.f = f;
        Ok(())
    }
}

/// A shift or rotate by an immediate that is not zero after masking.
pub(crate) struct ShiftRI<const O: u8, const S: usize>;
impl<const O: u8, const S: usize> Sem for ShiftRI<O, S> {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<()> {
        let a = get::<S>(c, op.dst);
        let v = alu::rotate(&mut c.f, O, a, op.imm, S as u32).unwrap_or(a);
        set::<S>(c, op.dst, v);
        Ok(())
    }
}

/// A shift or rotate by CL.
pub(crate) struct ShiftRC<const O: u8, const S: usize>;
impl<const O: u8, const S: usize> Sem for ShiftRC<O, S> {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<()> {
        let (a, count) = (get::<S>(c, op.dst), get::<1>(c, 1));
        let v = alu::rotate(&mut c.f, O, a, count, S as u32).unwrap_or(a);
        set::<S>(c, op.dst, v);
        Ok(())
    }
}

pub(crate) struct ImulRR<const S: usize>;
impl<const S: usize> Sem for ImulRR<S> {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<()> {
        let (a, b) = (get::<S>(c, op.dst), get::<S>(c, op.src));
        let v = alu::imul(&mut c.f, a, b, S as u32);
        set::<S>(c, op.dst, v);
        Ok(())
    }
}

pub(crate) struct ImulRM<const S: usize>;
impl<const S: usize> Sem for ImulRM<S> {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<()> {
        let b = load::<S, SLOW>(c, op)?;
        let a = get::<S>(c, op.dst);
        let v = alu::imul(&mut c.f, a, b, S as u32);
        set::<S>(c, op.dst, v);
        Ok(())
    }
}

pub(crate) struct SetR<const CC: u8>;
impl<const CC: u8> Sem for SetR<CC> {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<()> {
        let v = c.f.condition(CC).into();
        set::<1>(c, op.dst, v);
        Ok(())
    }
}

/// CMOV; with 4 bytes the upper half is cleared even if the condition does not hold.
pub(crate) struct CmovRR<const CC: u8, const S: usize>;
impl<const CC: u8, const S: usize> Sem for CmovRR<CC, S> {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<()> {
        let v = if c.f.condition(CC) {
            get::<S>(c, op.src)
        } else {
            get::<S>(c, op.dst)
        };
        set::<S>(c, op.dst, v);
        Ok(())
    }
}

/// The same from memory, which is read whatever the condition says.
pub(crate) struct CmovRM<const CC: u8, const S: usize>;
impl<const CC: u8, const S: usize> Sem for CmovRM<CC, S> {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<()> {
        let loaded = load::<S, SLOW>(c, op)?;
        let v = if c.f.condition(CC) {
            loaded
        } else {
            get::<S>(c, op.dst)
        };
        set::<S>(c, op.dst, v);
        Ok(())
    }
}

/// PUSH of a register in 64-bit mode.
pub(crate) struct Push;
impl Sem for Push {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<()> {
        let sp = c.r[4].wrapping_sub(8);
        let v = r(c, op.src);
        c.store_by::<8, SLOW>(2, sp, v)?;
        c.r[4] = sp;
        Ok(())
    }
}

/// POP of a register in 64-bit mode.
pub(crate) struct Pop;
impl Sem for Pop {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<()> {
        let sp = c.r[4];
        let v = c.load_by::<8, SLOW>(2, sp)?;
        c.r[4] = sp.wrapping_add(8);
        set::<8>(c, op.dst, v);
        Ok(())
    }
}

/// A direct jump whose target was checked when the block was built.
pub(crate) struct Jmp;
impl End for Jmp {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<Out> {
        c.rip = op.imm;
        Ok(Out::Taken)
    }
}

/// A conditional branch; `disp` leads from the target to the next instruction.
#[inline(always)]
fn branch(c: &mut Core, op: &Op, taken: bool) -> Out {
    if taken {
        c.rip = op.imm;
        Out::Taken
    } else {
        c.rip = op.imm.wrapping_add(op.disp as i64 as u64);
        Out::Fall
    }
}

pub(crate) struct Jcc<const CC: u8>;
impl<const CC: u8> End for Jcc<CC> {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<Out> {
        let taken = c.f.condition(CC);
        Ok(branch(c, op, taken))
    }
}

/// CMP or TEST of registers, and the branch after it.
pub(crate) struct FusedRR<const O: u8, const CC: u8, const S: usize>;
impl<const O: u8, const CC: u8, const S: usize> End for FusedRR<O, CC, S> {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<Out> {
        let (a, b) = (get::<S>(c, op.dst), get::<S>(c, op.src));
        alu::binary(&mut c.f, O, a, b, S as u32);
        let taken = c.f.condition(CC);
        Ok(branch(c, op, taken))
    }
}

/// CMP with a small immediate (two bytes in `base` and `index`), and the branch after it.
pub(crate) struct FusedRI<const O: u8, const CC: u8, const S: usize>;
impl<const O: u8, const CC: u8, const S: usize> End for FusedRI<O, CC, S> {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<Out> {
        let a = get::<S>(c, op.dst);
        let imm = i16::from_le_bytes([op.base, op.index]) as i64 as u64;
        let b = crate::flags::zero(imm, S as u32);
        alu::binary(&mut c.f, O, a, b, S as u32);
        let taken = c.f.condition(CC);
        Ok(branch(c, op, taken))
    }
}

/// CALL of a fixed target in 64-bit mode.
pub(crate) struct Call;
impl End for Call {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<Out> {
        let sp = c.r[4].wrapping_sub(8);
        let next = op.imm.wrapping_add(op.disp as i64 as u64);
        c.store_by::<8, SLOW>(2, sp, next)?;
        c.r[4] = sp;
        c.rip = op.imm;
        Ok(Out::Taken)
    }
}

/// RET in 64-bit mode.
pub(crate) struct Ret;
impl End for Ret {
    #[inline(always)]
    fn exec<const SLOW: bool>(c: &mut Core, _: &Op) -> R<Out> {
        let sp = c.r[4];
        let to = c.load_by::<8, SLOW>(2, sp)?;
        if !c.canonical(to) {
            return Err(c.gp(0));
        }
        c.r[4] = sp.wrapping_add(8);
        c.rip = to;
        Ok(Out::Indirect)
    }
}
