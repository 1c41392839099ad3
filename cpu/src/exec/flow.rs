//! Jumps, calls, returns, stack instructions and software interrupts.

use iced_x86::{Code, Instruction, Mnemonic as M, OpKind, Register};

use crate::exec::Exec;
use crate::exec::data::condition_number;
use crate::fault::{Event, EventKind, Exception};
use crate::flags::{self, zero};
use crate::operand::segment_number;
use crate::segment::{CS, SS};
use crate::state::{Core, Pending, R, Stop};

/// Instructions that set RIP and end a block.
pub(super) fn select_end(i: &Instruction) -> Option<Exec> {
    use iced_x86::FlowControl as F;
    Some(match i.mnemonic() {
        M::Jmp if i.is_jmp_far() || i.is_jmp_far_indirect() => far,
        M::Call if i.is_call_far() || i.is_call_far_indirect() => far,
        M::Jmp => jmp,
        M::Call => call,
        M::Ret => ret,
        M::Retf => |c, i| {
            let size = width(
                i.code(),
                Code::Retfw,
                Code::Retfd,
                Code::Retfw_imm16,
                Code::Retfd_imm16,
            );
            let extra = if i.op_count() == 1 {
                u64::from(i.immediate16())
            } else {
                0
            };
            c.far_return(size, extra)
        },
        M::Iret | M::Iretd | M::Iretq => |c, i| {
            c.iret(match i.mnemonic() {
                M::Iret => 2,
                M::Iretd => 4,
                _ => 8,
            })
        },
        M::Loop | M::Loope | M::Loopne | M::Jcxz | M::Jecxz | M::Jrcxz => count_branch,
        M::Int => |c, i| c.software_interrupt(i, EventKind::Software, i.immediate8()),
        M::Int3 => |c, i| c.software_interrupt(i, EventKind::SoftwareException, Exception::BP),
        M::Int1 => |c, i| c.software_interrupt(i, EventKind::Privileged, Exception::DB),
        M::Into => |c, i| {
            if !c.f.of() {
                return Ok(());
            }
            c.software_interrupt(i, EventKind::SoftwareException, Exception::OF)
        },
        M::Syscall => |c, _| c.syscall(),
        M::Sysret | M::Sysretq => |c, i| c.sysret(if i.mnemonic() == M::Sysretq { 8 } else { 4 }),
        M::Sysenter => |c, _| c.sysenter(),
        M::Sysexit | M::Sysexitq => {
            |c, i| c.sysexit(if i.mnemonic() == M::Sysexitq { 8 } else { 4 })
        }
        _ if i.flow_control() == F::ConditionalBranch && i.is_jcc_short_or_near() => |c, i| {
            if c.f.condition(condition_number(i)) {
                c.jump(i.near_branch_target())
            } else {
                Ok(())
            }
        },
        M::Popf | M::Popfd | M::Popfq => popf,
        _ => return None,
    })
}

/// Instructions of the stack that do not end a block.
pub(super) fn select(m: M) -> Option<Exec> {
    Some(match m {
        M::Push => |c, i| {
            let v = c.get(i, 0)?;
            c.push(stack_size(i), v)
        },
        M::Pop => pop,
        M::Pushf | M::Pushfd | M::Pushfq => pushf,
        M::Pusha | M::Pushad => pusha,
        M::Popa | M::Popad => popa,
        M::Enter => enter,
        M::Leave => leave,
        _ => return None,
    })
}

/// 2 or 4 bytes for the codes given, else 8.
fn width(code: Code, word: Code, double: Code, word_imm: Code, double_imm: Code) -> u32 {
    if code == word || code == word_imm {
        2
    } else if code == double || code == double_imm {
        4
    } else {
        8
    }
}

/// Bytes that a push or pop moves.
pub(crate) fn stack_size(i: &Instruction) -> u32 {
    i.stack_pointer_increment().unsigned_abs()
}

impl Core {
    /// A near jump; the target must be inside of the code segment.
    pub(crate) fn jump(&mut self, target: u64) -> R<()> {
        let inside = if self.bits == 64 {
            self.canonical(target)
        } else {
            target <= u64::from(self.seg[CS].limit)
        };
        if !inside {
            return Err(self.gp(0));
        }
        self.rip = target;
        Ok(())
    }

    #[cold]
    fn software_interrupt(&mut self, i: &Instruction, kind: EventKind, vector: u8) -> R<()> {
        if self.vm86() && kind == EventKind::Software && self.redirect_interrupt(vector)? {
            return Ok(());
        }
        self.pending = Pending::Software(Event::software(kind, vector, i.len() as u8));
        Err(Stop)
    }
}

fn target(c: &mut Core, i: &Instruction) -> R<u64> {
    match i.op0_kind() {
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
            Ok(i.near_branch_target())
        }
        _ => c.get(i, 0),
    }
}

fn jmp(c: &mut Core, i: &Instruction) -> R<()> {
    let to = target(c, i)?;
    c.jump(to)
}

fn call(c: &mut Core, i: &Instruction) -> R<()> {
    let to = target(c, i)?;
    let next = c.rip;
    c.jump(to)?;
    c.rip = next;
    c.push(stack_size(i), next)?;
    c.rip = to;
    Ok(())
}

fn ret(c: &mut Core, i: &Instruction) -> R<()> {
    let drop = if i.op_count() == 1 {
        u64::from(i.immediate16())
    } else {
        0
    };
    let size = match i.code() {
        Code::Retnw | Code::Retnw_imm16 => 2,
        Code::Retnd | Code::Retnd_imm16 => 4,
        _ => 8,
    };
    let sp = c.r[4] & c.stack_mask();
    let to = c.read(SS, sp, size)?;
    c.jump(to)?;
    c.set_sp(c.r[4].wrapping_add(u64::from(size) + drop));
    Ok(())
}

fn far(c: &mut Core, i: &Instruction) -> R<()> {
    let (selector, offset, size) = match i.op0_kind() {
        OpKind::FarBranch16 => (i.far_branch_selector(), u64::from(i.far_branch16()), 2),
        OpKind::FarBranch32 => (i.far_branch_selector(), u64::from(i.far_branch32()), 4),
        _ => {
            // 16:16, 16:32 or 16:64 in memory.
            let size = i.memory_size().size() as u32 - 2;
            let seg = Core::operand_segment(i);
            let at = c.offset(i);
            let offset = c.read(seg, at, size)?;
            let selector = c.read(seg, at.wrapping_add(size.into()), 2)?;
            (selector as u16, offset, size)
        }
    };
    let push = (i.mnemonic() == M::Call).then_some(size);
    c.far(selector, offset, push)
}

fn count_branch(c: &mut Core, i: &Instruction) -> R<()> {
    use Code as C;
    // The address size chooses the counter, whatever the operand size is.
    let size = match i.code() {
        C::Loop_rel8_16_CX
        | C::Loop_rel8_32_CX
        | C::Loope_rel8_16_CX
        | C::Loope_rel8_32_CX
        | C::Loopne_rel8_16_CX
        | C::Loopne_rel8_32_CX
        | C::Jcxz_rel8_16
        | C::Jcxz_rel8_32 => 2,
        C::Loop_rel8_16_RCX
        | C::Loop_rel8_64_RCX
        | C::Loope_rel8_16_RCX
        | C::Loope_rel8_64_RCX
        | C::Loopne_rel8_16_RCX
        | C::Loopne_rel8_64_RCX
        | C::Jrcxz_rel8_16
        | C::Jrcxz_rel8_64 => 8,
        _ => 4,
    };
    let count = zero(c.r[1], size);
    let (taken, count) = match i.mnemonic() {
        M::Loop => (count != 1, count.wrapping_sub(1)),
        M::Loope => (count != 1 && c.f.zf(), count.wrapping_sub(1)),
        M::Loopne => (count != 1 && !c.f.zf(), count.wrapping_sub(1)),
        _ => (count == 0, count),
    };
    if taken {
        c.jump(i.near_branch_target())?;
    }
    if matches!(i.mnemonic(), M::Loop | M::Loope | M::Loopne) {
        c.set_gpr(1, size, count);
    }
    Ok(())
}

fn pop(c: &mut Core, i: &Instruction) -> R<()> {
    let size = stack_size(i);
    let sp = c.r[4];
    let value = c.pop(size)?;
    if i.op0_kind() == OpKind::Register {
        let reg = i.op0_register();
        if reg.is_segment_register() {
            let result = c.load_segment(segment_number(reg), value as u16);
            if result.is_err() {
                c.r[4] = sp;
            }
            c.shadow |= reg == Register::SS && result.is_ok();
            c.quiet |= reg == Register::SS && result.is_ok();
            return result;
        }
        c.set_reg(reg, value);
        return Ok(());
    }
    // An RSP in the address counts after the pop.
    let result = c.put(i, 0, value);
    if result.is_err() {
        c.r[4] = sp;
    }
    result
}

fn pushf(c: &mut Core, i: &Instruction) -> R<()> {
    let size = stack_size(i);
    let value = c.flags_to_push(size)?;
    c.push(size, value)
}

fn popf(c: &mut Core, i: &Instruction) -> R<()> {
    let size = stack_size(i);
    c.require_flags_in_vm86(size)?;
    let sp = c.r[4];
    let image = c.pop(size)?;
    match c.check_virtual_flags(image) {
        Ok(None) => {}
        Ok(Some(image)) => {
            c.load_virtual_flags(image);
            return Ok(());
        }
        Err(stop) => {
            c.r[4] = sp;
            return Err(stop);
        }
    }
    let mut changed = !(flags::VM | flags::RF | flags::VIF | flags::VIP);
    if c.cpl != 0 {
        changed &= !flags::IOPL;
    }
    if c.cpl > c.iopl() {
        changed &= !flags::IF;
    }
    let image = image & !flags::RF;
    c.load_flags(image, size, changed | if size > 2 { flags::RF } else { 0 });
    Ok(())
}

fn pusha(c: &mut Core, i: &Instruction) -> R<()> {
    let size = stack_size(i) / 8;
    let sp = c.r[4];
    for n in 0..8 {
        let value = if n == 4 { sp } else { c.r[n] };
        if let Err(stop) = c.push(size, value) {
            c.r[4] = sp;
            return Err(stop);
        }
    }
    Ok(())
}

fn popa(c: &mut Core, i: &Instruction) -> R<()> {
    let size = stack_size(i) / 8;
    let sp = c.r[4];
    let mut values = [0; 8];
    for n in (0..8).rev() {
        match c.pop(size) {
            Ok(v) => values[n] = v,
            Err(stop) => {
                c.r[4] = sp;
                return Err(stop);
            }
        }
    }
    for (n, value) in values.into_iter().enumerate().filter(|(n, _)| *n != 4) {
        c.set_gpr(n, size, value);
    }
    Ok(())
}

fn enter(c: &mut Core, i: &Instruction) -> R<()> {
    let size = match i.code() {
        Code::Enterw_imm16_imm8 => 2,
        Code::Enterd_imm16_imm8 => 4,
        _ => 8,
    };
    let sp = c.r[4];
    let result = enter_inner(c, u64::from(i.immediate16()), i.immediate8_2nd() & 31, size);
    if result.is_err() {
        c.r[4] = sp;
    }
    result
}

fn enter_inner(c: &mut Core, locals: u64, level: u8, size: u32) -> R<()> {
    let mask = c.stack_mask();
    c.push(size, c.r[5])?;
    let frame = c.r[4];
    if level > 0 {
        let mut bp = c.r[5];
        for _ in 1..level {
            bp = bp.wrapping_sub(size.into()) & mask;
            let link = c.read(SS, bp, size)?;
            c.push(size, link)?;
        }
        c.push(size, frame)?;
    }
    let sp = c.r[4].wrapping_sub(locals);
    let at = c.linear(SS, sp & mask, size.into(), true)?;
    c.probe_write(SS, at, 1)?;
    c.set_gpr(5, size, frame);
    c.set_sp(sp);
    Ok(())
}

fn leave(c: &mut Core, i: &Instruction) -> R<()> {
    let size = match i.code() {
        Code::Leavew => 2,
        Code::Leaved => 4,
        _ => 8,
    };
    let bp = c.r[5] & c.stack_mask();
    let value = c.read(SS, bp, size)?;
    c.set_sp(c.r[5].wrapping_add(size.into()));
    c.set_gpr(5, size, value);
    Ok(())
}
