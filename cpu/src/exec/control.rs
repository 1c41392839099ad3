//! System instructions: control registers, tables, MSRs, ports, CPUID, time.

use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

use crate::breakpoint::Watched;
use crate::exec::Exec;
use crate::exec::tables::{arpl, load_system, load_table, store_system, store_table, verify};
use crate::exit::{Cause, PortAccess};
use crate::flags;
use crate::operand::operand_size;
use crate::segment::{FS, GS};
use crate::state::{
    CR0_ET, CR0_TS, CR4_DE, CR4_FSGSBASE, CR4_OSXSAVE, CR4_PCE, CR4_PCIDE, CR4_PKE, CR4_TSD, Core,
    R,
};

/// Ticks of the clock that PAUSE takes besides its own: loops that wait for a time have fewer rounds, as on
/// processors since Skylake (Intel's optimization manual, 2.16.4: up to 140 cycles).
const PAUSE_TICKS: u64 = 139;

/// All of these end a block: they exit, change the mode, or look at the time.
pub(super) fn select_end(i: &Instruction) -> Option<Exec> {
    Some(match i.mnemonic() {
        M::Mov if is_system_move(i) => |c, i| {
            if super::data::is_control(i.op0_register()) {
                mov_to(c, i)
            } else {
                mov_from(c, i)
            }
        },
        M::Cpuid => cpuid,
        M::Hlt => hlt,
        M::Cli | M::Sti => |c, i| c.set_interrupt_flag(i.mnemonic() == M::Sti),
        M::Lgdt | M::Lidt => load_table,
        M::Lldt | M::Ltr => load_system,
        M::Lmsw => lmsw,
        M::Clts => |c, i| {
            c.privileged()?;
            if c.controls.control_registers {
                return Err(c.exit(Cause::Clts, i.len() as u8));
            }
            c.cr0 &= !CR0_TS;
            Ok(())
        },
        M::Invlpg => |c, i| {
            c.privileged()?;
            let seg = Core::operand_segment(i);
            let at = c.offset(i).wrapping_add(if c.bits == 64 {
                c.base[seg]
            } else {
                c.seg[seg].base
            });
            let at = c.wrap(at);
            c.flush_page(at);
            Ok(())
        },
        M::Invpcid => invpcid,
        M::Wbinvd | M::Wbnoinvd | M::Invd => |c, i| {
            c.privileged()?;
            if c.controls.wbinvd {
                let cause = if i.mnemonic() == M::Invd {
                    Cause::Invd
                } else {
                    Cause::Wbinvd
                };
                return Err(c.exit(cause, i.len() as u8));
            }
            Ok(())
        },
        M::Rdtsc | M::Rdtscp => rdtsc,
        // Every instruction is over before the next one begins.
        M::Serialize => |_, _| Ok(()),
        M::Rdpmc => rdpmc,
        M::Rdmsr | M::Wrmsr => msr,
        M::Xsetbv => xsetbv,
        M::Stac | M::Clac => |c, i| {
            if c.cpl != 0 {
                return Err(c.ud());
            }
            if i.mnemonic() == M::Stac {
                c.system_flags |= flags::AC;
            } else {
                c.system_flags &= !flags::AC;
            }
            c.update_set();
            Ok(())
        },
        M::Wrpkru => |c, _| {
            if c.cr4 & CR4_PKE == 0 {
                return Err(c.ud());
            }
            if c.r[1] as u32 != 0 || c.r[2] as u32 != 0 {
                return Err(c.gp(0));
            }
            c.set_pkru(c.r[0] as u32);
            Ok(())
        },
        M::In | M::Out => port,
        M::Pause => |c, i| {
            if c.controls.pause {
                return Err(c.exit(Cause::Pause, i.len() as u8));
            }
            c.yielded = true;
            if !c.parallel.on {
                c.skipped = c.skipped.wrapping_add(PAUSE_TICKS);
            }
            Ok(())
        },
        M::Vmcall => |c, i| c.guest_call(i, Cause::Vmcall),
        M::Vmmcall => |c, i| c.guest_call(i, Cause::Vmmcall),
        M::Vmgexit => |c, i| c.guest_call(i, Cause::Vmgexit),
        M::Tdcall => |c, i| c.guest_call(i, Cause::Tdcall),
        M::Seamcall => |c, i| c.guest_call(i, Cause::Seamcall),
        M::Pvalidate => |c, i| c.guest_call(i, Cause::Pvalidate),
        M::Rmpadjust => |c, i| c.guest_call(i, Cause::Rmpadjust),
        M::Rmpupdate => |c, i| c.guest_call(i, Cause::Rmpupdate),
        M::Psmash => |c, i| c.guest_call(i, Cause::Psmash),
        _ => return None,
    })
}

/// System instructions inside of a block.
pub(super) fn select(m: M) -> Option<Exec> {
    Some(match m {
        M::Sgdt | M::Sidt => store_table,
        M::Sldt | M::Str | M::Smsw => store_system,
        M::Lar | M::Lsl | M::Verr | M::Verw => verify,
        M::Arpl => arpl,
        M::Xgetbv => xgetbv,
        M::Rdpkru => |c, _| {
            if c.cr4 & CR4_PKE == 0 {
                return Err(c.ud());
            }
            if c.r[1] as u32 != 0 {
                return Err(c.gp(0));
            }
            c.set_gpr(0, 4, c.pkru.into());
            c.set_gpr(2, 4, 0);
            Ok(())
        },
        M::Rdpid => |c, i| {
            if !c.cpuid.has(7, 2, 22) {
                return Err(c.ud());
            }
            let aux = c.msrs.tsc_aux;
            c.put(i, 0, aux)
        },
        M::Swapgs => |c, _| {
            if c.bits != 64 {
                return Err(c.ud());
            }
            c.privileged()?;
            let base = c.seg[GS].base;
            c.seg[GS].base = c.msrs.kernel_gs_base;
            c.base[GS] = c.msrs.kernel_gs_base;
            c.msrs.kernel_gs_base = base;
            Ok(())
        },
        M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase => segment_base,
        M::Rdrand | M::Rdseed => |c, i| {
            let value = c.random();
            c.f.set(flags::CF);
            c.put(i, 0, value)
        },
        _ => return None,
    })
}

fn is_system_move(i: &Instruction) -> bool {
    use super::data::is_control;
    i.op0_kind() == OpKind::Register && is_control(i.op0_register())
        || i.op1_kind() == OpKind::Register && is_control(i.op1_register())
}

impl Core {
    /// #GP(0) unless at CPL 0.
    pub(crate) fn privileged(&mut self) -> R<()> {
        if self.cpl == 0 {
            Ok(())
        } else {
            Err(self.gp(0))
        }
    }

    fn guest_call(&mut self, i: &Instruction, cause: Cause) -> R<()> {
        let call = matches!(cause, Cause::Vmcall | Cause::Vmmcall);
        let left = self.controls.guest_instructions || call && self.controls.hypercalls;
        if !left {
            return Err(self.ud());
        }
        let len = i.len() as u8;
        if self.cpl != 0 && !matches!(cause, Cause::Vmcall | Cause::Vmmcall | Cause::Vmgexit) {
            return Err(self.gp(0));
        }
        Err(self.exit(cause, len))
    }

    /// A generator with a fixed seed, so that runs repeat: splitmix64.
    fn random(&mut self) -> u64 {
        self.entropy = self.entropy.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.entropy ^ self.entropy >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// CPL against IOPL, then the bitmap of the task state segment.
    pub(crate) fn port_allowed(&mut self, port: u16, size: u8) -> R<()> {
        if !self.protected() || self.cpl <= self.iopl() && !self.vm86() {
            return Ok(());
        }
        let limit = u64::from(self.tr.limit);
        let wide = self.tr.kind() & 8 != 0;
        if !self.tr.usable() || !wide || limit < 0x67 {
            return Err(self.gp(0));
        }
        let map = self.system_read(self.tr.base.wrapping_add(0x66), 2)?;
        let at = map + u64::from(port / 8);
        if at + 1 > limit {
            return Err(self.gp(0));
        }
        let bits = self.system_read(self.tr.base.wrapping_add(at), 2)?;
        let mask = (1 << size) - 1;
        if bits >> (port % 8) & mask != 0 {
            Err(self.gp(0))
        } else {
            Ok(())
        }
    }
}

/// Number of a control or debug register.
fn number(r: Register) -> usize {
    r.number()
}

pub(super) fn mov_from(c: &mut Core, i: &Instruction) -> R<()> {
    let from = i.op1_register();
    let n = existing(c, from)?;
    c.privileged()?;
    let value = if from.is_cr() {
        match n {
            // Whoever set the registers may have left out what is always set.
            0 => c.cr0 | CR0_ET,
            2 => c.cr2,
            3 => c.cr3,
            4 => c.cr4,
            8 => u64::from(c.apic.tpr() >> 4),
            _ => return Err(c.ud()),
        }
    } else if from.is_dr() {
        c.general_detect()?;
        c.dr[n]
    } else {
        return Err(c.ud());
    };
    c.put(i, 0, value)
}

/// Number of a register; DR4 and DR5 are DR6 and DR7 without CR4.DE, and #UD with it, at every CPL (Linux `handle_dr`).
fn existing(c: &mut Core, register: Register) -> R<usize> {
    match number(register) {
        n if !register.is_dr() => Ok(n),
        4 | 5 if c.cr4 & CR4_DE != 0 => Err(c.ud()),
        n @ (4 | 5) => Ok(n + 2),
        n @ 0..=7 => Ok(n),
        _ => Err(c.ud()),
    }
}

pub(super) fn mov_to(c: &mut Core, i: &Instruction) -> R<()> {
    let to = i.op0_register();
    let n = existing(c, to)?;
    c.privileged()?;
    let value = c.get(i, 1)?;
    if to.is_dr() {
        c.general_detect()?;
        if n >= 6 && value >> 32 != 0 {
            return Err(c.gp(0));
        }
        c.dr[n] = match n {
            6 => value & 0xe00f | 0xffff_0ff0,
            7 => value & 0xffff_2bff | 0x400,
            _ => value,
        };
        if n == 7 {
            c.update_watch();
        }
        return Ok(());
    }
    if !to.is_cr() {
        return Err(c.ud());
    }
    if c.controls.control_registers && matches!(n, 0 | 3 | 4) {
        let source = number(i.op1_register()) as u8;
        return Err(c.exit(
            Cause::WriteControl {
                register: n as u8,
                source,
            },
            i.len() as u8,
        ));
    }
    match n {
        0 => c.write_cr0(value),
        2 => {
            c.cr2 = value;
            Ok(())
        }
        3 => c.write_cr3(value),
        4 => c.write_cr4(value),
        8 if value > 15 => Err(c.gp(0)),
        8 => {
            c.apic.set_tpr((value as u8) << 4);
            Ok(())
        }
        _ => Err(c.ud()),
    }
}

fn cpuid(c: &mut Core, i: &Instruction) -> R<()> {
    if c.controls.cpuid {
        return Err(c.exit(Cause::Cpuid, i.len() as u8));
    }
    let r = c.cpuid_leaf(c.r[0] as u32, c.r[1] as u32);
    for (n, value) in [(0, r.eax), (3, r.ebx), (1, r.ecx), (2, r.edx)] {
        c.set_gpr(n, 4, value.into());
    }
    Ok(())
}

fn hlt(c: &mut Core, i: &Instruction) -> R<()> {
    c.privileged()?;
    if c.controls.hlt {
        return Err(c.exit(Cause::Hlt, i.len() as u8));
    }
    c.halted = true;
    c.halts += 1;
    Ok(())
}

fn lmsw(c: &mut Core, i: &Instruction) -> R<()> {
    c.privileged()?;
    let value = c.get(i, 0)? & 15;
    if c.controls.control_registers {
        return Err(c.exit(Cause::Lmsw(value as u16), i.len() as u8));
    }
    // PE can be set and not cleared.
    let cr0 = c.cr0 & !14 | value;
    c.write_cr0(cr0)
}

fn invpcid(c: &mut Core, i: &Instruction) -> R<()> {
    if !c.cpuid.has(7, 1, 10) {
        return Err(c.ud());
    }
    c.privileged()?;
    let seg = Core::operand_segment(i);
    let offset = c.offset(i);
    let pcid = c.read(seg, offset, 8)?;
    let linear = c.read(seg, offset.wrapping_add(8), 8)?;
    let kind = c.reg(i.op0_register());
    let bad_pcid = pcid >> 12 != 0 || c.cr4 & CR4_PCIDE == 0 && pcid != 0;
    let bad = match kind {
        0 => bad_pcid || !c.canonical_base(linear),
        1 => bad_pcid,
        2 | 3 => false,
        _ => true,
    };
    if bad {
        return Err(c.gp(0));
    }
    c.flush_linear();
    Ok(())
}

fn rdtsc(c: &mut Core, i: &Instruction) -> R<()> {
    if i.mnemonic() == M::Rdtscp && !c.cpuid.has(0x8000_0001, 3, 27) {
        return Err(c.ud());
    }
    if c.cr4 & CR4_TSD != 0 && c.cpl != 0 {
        return Err(c.gp(0));
    }
    let tsc = c.now().wrapping_add(c.msrs.tsc_offset);
    c.set_gpr(0, 4, tsc);
    c.set_gpr(2, 4, tsc >> 32);
    if i.mnemonic() == M::Rdtscp {
        c.set_gpr(1, 4, c.msrs.tsc_aux);
    }
    Ok(())
}

fn rdpmc(c: &mut Core, _: &Instruction) -> R<()> {
    if c.cr4 & CR4_PCE == 0 && c.cpl != 0 {
        return Err(c.gp(0));
    }
    let Some(value) = c.counter(c.r[1] as u32) else {
        return Err(c.gp(0));
    };
    c.set_gpr(0, 4, value);
    c.set_gpr(2, 4, value >> 32);
    Ok(())
}

fn msr(c: &mut Core, i: &Instruction) -> R<()> {
    c.privileged()?;
    let write = i.mnemonic() == M::Wrmsr;
    if c.controls.msr {
        return Err(c.exit(
            if write { Cause::Wrmsr } else { Cause::Rdmsr },
            i.len() as u8,
        ));
    }
    let index = c.r[1] as u32;
    // Some of them are times.
    let _ = c.now();
    if write {
        let value = c.r[2] << 32 | c.r[0] & 0xffff_ffff;
        if c.write_msr(index, value).is_none() {
            return Err(c.gp(0));
        }
        return Ok(());
    }
    let Some(value) = c.read_msr(index) else {
        return Err(c.gp(0));
    };
    c.set_gpr(0, 4, value);
    c.set_gpr(2, 4, value >> 32);
    Ok(())
}

fn xgetbv(c: &mut Core, _: &Instruction) -> R<()> {
    if c.cr4 & CR4_OSXSAVE == 0 {
        return Err(c.ud());
    }
    let value = match c.r[1] as u32 {
        0 => c.fpu.xcr0,
        1 => c.in_use() & c.fpu.xcr0,
        _ => return Err(c.gp(0)),
    };
    c.set_gpr(0, 4, value);
    c.set_gpr(2, 4, value >> 32);
    Ok(())
}

fn xsetbv(c: &mut Core, i: &Instruction) -> R<()> {
    if c.cr4 & CR4_OSXSAVE == 0 {
        return Err(c.ud());
    }
    c.privileged()?;
    if c.controls.xsetbv {
        return Err(c.exit(Cause::Xsetbv, i.len() as u8));
    }
    let value = c.r[2] << 32 | c.r[0] & 0xffff_ffff;
    if c.r[1] as u32 != 0 || !c.set_xcr0(value) {
        return Err(c.gp(0));
    }
    Ok(())
}

fn port(c: &mut Core, i: &Instruction) -> R<()> {
    let input = i.mnemonic() == M::In;
    let (data, number) = if input { (0, 1) } else { (1, 0) };
    let size = operand_size(i, data) as u8;
    let port = c.get_sized(i, number, 2)? as u16;
    c.port_allowed(port, size)?;
    let value = if input { 0 } else { c.get(i, data)? as u32 };
    if c.watched {
        c.watch(port.into(), size.into(), Watched::Port);
    }
    let inside = !c.controls.io;
    if input && inside {
        if let Some(value) = c.bus.port_in(port, size) {
            c.set_gpr(0, size.into(), value.into());
            return Ok(());
        }
    } else if inside && c.bus.port_out(port, size, value).is_some() {
        return Ok(());
    }
    let immediate = i.op_kind(number) != OpKind::Register;
    let io = PortAccess {
        port,
        size,
        input,
        string: false,
        repeat: false,
        immediate,
        address_size: c.bits / 8,
        segment: 0,
        value,
    };
    Err(c.exit(Cause::Io(io), i.len() as u8))
}

fn segment_base(c: &mut Core, i: &Instruction) -> R<()> {
    if c.cr4 & CR4_FSGSBASE == 0 || c.bits != 64 {
        return Err(c.ud());
    }
    let seg = if matches!(i.mnemonic(), M::Rdfsbase | M::Wrfsbase) {
        FS
    } else {
        GS
    };
    if matches!(i.mnemonic(), M::Rdfsbase | M::Rdgsbase) {
        let base = c.seg[seg].base;
        return c.put(i, 0, base);
    }
    let base = c.get(i, 0)?;
    if !c.canonical(base) {
        return Err(c.gp(0));
    }
    c.seg[seg].base = base;
    c.base[seg] = base;
    Ok(())
}
