//! Registers of the chips: `KVM_GET_IRQCHIP`, `KVM_SET_IRQCHIP`, `KVM_GET_PIT2`, `KVM_SET_PIT2`.

use kvm_ops::sim::{self, PitChannelState, Wires};
use kvm_ops_uapi::checks::{irqchip, pit2};
use kvm_ops_uapi::irqchip::{
    self as uapi, IoapicState, Irqchip, PicState, PitState2, chip, pit_flags,
};
use kvm_ops_uapi::{Errno, U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use crate::refusal::{Result, ensure};
use crate::vm::{IrqchipKind, Vm};
use crate::{Process, arg};

/// The page of the I/O APIC's registers, which does not move.
const IOAPIC_BASE: u64 = 0xfec0_0000;
/// The inputs of each 8259A that may be level-triggered.
const ELCR: [u8; 2] = [0xf8, 0xde];

fn to_pic(from: &sim::PicState, second: bool) -> PicState {
    PicState {
        last_irr: from.lines,
        irr: from.irr,
        imr: from.imr,
        isr: from.isr,
        priority_add: from.first,
        irq_base: from.base,
        read_reg_select: from.reads_isr.into(),
        poll: from.polls.into(),
        special_mask: from.special_mask.into(),
        init_state: from.expects,
        auto_eoi: from.auto_eoi.into(),
        rotate_on_auto_eoi: from.rotates.into(),
        special_fully_nested_mode: 0,
        init4: from.wants_icw4.into(),
        elcr: from.elcr,
        elcr_mask: ELCR[usize::from(second)],
    }
}

fn from_pic(from: &PicState) -> sim::PicState {
    sim::PicState {
        lines: from.last_irr,
        irr: from.irr,
        imr: from.imr,
        isr: from.isr,
        elcr: from.elcr,
        base: from.irq_base,
        first: from.priority_add,
        expects: from.init_state,
        wants_icw4: from.init4 != 0,
        auto_eoi: from.auto_eoi != 0,
        rotates: from.rotate_on_auto_eoi != 0,
        reads_isr: from.read_reg_select != 0,
        polls: from.poll != 0,
        special_mask: from.special_mask != 0,
    }
}

fn to_ioapic(from: &sim::IoApicState) -> IoapicState {
    IoapicState {
        base_address: U64::new(IOAPIC_BASE),
        ioregsel: U32::new(from.selected.into()),
        id: U32::new(from.id >> 24),
        irr: U32::new(from.lines),
        redirtbl: from.entries.map(U64::new),
        ..IoapicState::default()
    }
}

fn from_ioapic(from: &IoapicState) -> sim::IoApicState {
    sim::IoApicState {
        id: from.id.get() << 24,
        selected: from.ioregsel.get() as u8,
        lines: from.irr.get(),
        entries: from.redirtbl.map(U64::get),
    }
}

/// States of a channel's counter, as it is read and written.
const WORD0: u8 = 3;
const WORD1: u8 = 4;
/// The mode of a channel that was never programmed, and the count that it stands for.
const NO_MODE: u8 = 0xff;
const LONGEST: u32 = 0x1_0000;

fn to_channel(from: &PitChannelState) -> uapi::PitChannelState {
    let untouched = PitChannelState {
        gate: from.gate,
        bytes: WORD0,
        ..PitChannelState::default()
    };
    uapi::PitChannelState {
        count: U32::new(from.loaded.unwrap_or(LONGEST)),
        latched_count: U16::new(from.latched.unwrap_or(0)),
        count_latched: if from.latched.is_some() {
            from.bytes
        } else {
            0
        },
        status_latched: from.status.is_some().into(),
        status: from.status.unwrap_or(0),
        read_state: if from.reads_high { WORD1 } else { from.bytes },
        write_state: if from.low.is_some() {
            WORD1
        } else {
            from.bytes
        },
        write_latch: from.low.unwrap_or(0),
        rw_mode: from.bytes,
        mode: if *from == untouched {
            NO_MODE
        } else {
            from.mode
        },
        bcd: from.bcd.into(),
        gate: from.gate.into(),
        ..uapi::PitChannelState::default()
    }
}

fn from_channel(from: &uapi::PitChannelState) -> PitChannelState {
    let programmed = from.mode != NO_MODE;
    let count = match from.count.get() {
        0 => LONGEST,
        count => count,
    };
    PitChannelState {
        mode: if programmed { from.mode } else { 0 },
        bytes: if programmed { from.rw_mode } else { WORD0 },
        bcd: from.bcd != 0,
        low: (from.write_state == WORD1).then_some(from.write_latch),
        reads_high: from.read_state == WORD1,
        latched: (from.count_latched != 0).then_some(from.latched_count.get()),
        status: (from.status_latched != 0).then_some(from.status),
        loaded: programmed.then_some(count),
        gate: from.gate != 0,
    }
}

fn to_pit(from: &sim::PitState) -> PitState2 {
    let flag = |set: bool, flag: u32| if set { flag } else { 0 };
    let flags = flag(from.replaced, pit_flags::HPET_LEGACY)
        | flag(from.speaker, pit_flags::SPEAKER_DATA_ON);
    PitState2 {
        channels: from.channels.each_ref().map(to_channel),
        flags: U32::new(flags),
        ..PitState2::default()
    }
}

fn from_pit(from: &PitState2) -> sim::PitState {
    let flags = from.flags.get();
    sim::PitState {
        channels: from.channels.each_ref().map(from_channel),
        speaker: flags & pit_flags::SPEAKER_DATA_ON != 0,
        replaced: flags & pit_flags::HPET_LEGACY != 0,
    }
}

/// The chips, also of a VM without vCPUs.
fn wires_of(vm: &Vm) -> Result<Wires> {
    vm.require_wires()?;
    Ok(vm.irq().wires().ok_or(Errno::EIO)?)
}

/// The structure, and the chips that it is about.
fn chip_of(vm: &Vm, process: &dyn Process, argument: u64) -> Result<(Irqchip, Wires)> {
    use irqchip::{CHIP, COPY, FULL};
    let given: Irqchip = arg::read(process, argument, COPY)?;
    ensure(vm.lock().irqchip_kind() == IrqchipKind::Full, FULL)?;
    ensure(given.chip_id.get() <= chip::IOAPIC, CHIP)?;
    Ok((given, wires_of(vm)?))
}

/// `KVM_GET_IRQCHIP`.
pub(crate) fn get_chip(vm: &Vm, process: &dyn Process, argument: u64) -> Result<i64> {
    let (mut to, wires) = chip_of(vm, process, argument)?;
    let mut put = |bytes: &[u8]| to.state[..bytes.len()].copy_from_slice(bytes);
    match to.chip_id.get() {
        chip::IOAPIC => put(to_ioapic(&wires.ioapic()?).as_bytes()),
        number => {
            let second = number == chip::PIC_SLAVE;
            put(to_pic(&wires.pic(second)?, second).as_bytes());
        }
    }
    arg::write(process, argument, &to, irqchip::COPY_BACK)?;
    Ok(0)
}

/// `KVM_SET_IRQCHIP`.
pub(crate) fn set_chip(vm: &Vm, process: &dyn Process, argument: u64) -> Result<i64> {
    let (from, wires) = chip_of(vm, process, argument)?;
    match from.chip_id.get() {
        chip::IOAPIC => {
            let (state, _) = IoapicState::read_from_prefix(&from.state).map_err(|_| Errno::EIO)?;
            wires.set_ioapic(&from_ioapic(&state))?;
        }
        number => {
            let (state, _) = PicState::read_from_prefix(&from.state).map_err(|_| Errno::EIO)?;
            wires.set_pic(number == chip::PIC_SLAVE, &from_pic(&state))?;
        }
    }
    Ok(0)
}

/// The chips of a VM that has the timer.
fn timer_of(vm: &Vm) -> Result<Wires> {
    ensure(vm.lock().has_pit(), pit2::EXISTS)?;
    wires_of(vm)
}

/// `KVM_GET_PIT2`.
pub(crate) fn get_pit(vm: &Vm, process: &dyn Process, argument: u64) -> Result<i64> {
    let state = to_pit(&timer_of(vm)?.pit()?);
    arg::write(process, argument, &state, pit2::COPY_BACK)?;
    Ok(0)
}

/// `KVM_SET_PIT2`.
pub(crate) fn set_pit(vm: &Vm, process: &dyn Process, argument: u64) -> Result<i64> {
    let state: PitState2 = arg::read(process, argument, pit2::COPY)?;
    timer_of(vm)?.set_pit(&from_pit(&state))?;
    Ok(0)
}
