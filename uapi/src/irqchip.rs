//! The registers of interrupt controllers and timer.

use crate::layout::layout;
use crate::{U16, U32, U64};

/// Values of [`Irqchip`]'s `chip_id`, and of routes.
pub mod chip {
    /// The first 8259A.
    pub const PIC_MASTER: u32 = 0;
    /// The second.
    pub const PIC_SLAVE: u32 = 1;
    /// The I/O APIC.
    pub const IOAPIC: u32 = 2;
}

/// Inputs of each 8259A.
pub const PIC_PINS: u32 = 8;
/// Inputs of the I/O APIC.
pub const IOAPIC_PINS: u32 = 24;

layout! {
    /// `struct kvm_irqchip`: `state` is [`PicState`] or [`IoapicState`].
    Irqchip 520 { 0 chip_id: U32, 4 pad: U32, 8 state: [u8; 512], }
}

layout! {
    /// `struct kvm_pic_state`.
    PicState 16 {
        0 last_irr: u8, 1 irr: u8, 2 imr: u8, 3 isr: u8, 4 priority_add: u8, 5 irq_base: u8,
        6 read_reg_select: u8, 7 poll: u8, 8 special_mask: u8, 9 init_state: u8, 10 auto_eoi: u8,
        11 rotate_on_auto_eoi: u8, 12 special_fully_nested_mode: u8, 13 init4: u8, 14 elcr: u8,
        15 elcr_mask: u8,
    }
}

layout! {
    /// `struct kvm_ioapic_state`.
    IoapicState 216 {
        0 base_address: U64, 8 ioregsel: U32, 12 id: U32, 16 irr: U32, 20 pad: U32,
        24 redirtbl: [U64; 24],
    }
}

layout! {
    /// `struct kvm_lapic_state`: the register page.
    LapicState 1024 { 0 regs: [u8; 1024], }
}

layout! {
    /// `struct kvm_pit_channel_state`. `count_load_time` is signed.
    PitChannelState 24 {
        0 count: U32, 4 latched_count: U16, 6 count_latched: u8, 7 status_latched: u8, 8 status: u8,
        9 read_state: u8, 10 write_state: u8, 11 write_latch: u8, 12 rw_mode: u8, 13 mode: u8,
        14 bcd: u8, 15 gate: u8, 16 count_load_time: U64,
    }
}

layout! {
    /// `struct kvm_pit_state2`.
    PitState2 112 { 0 channels: [PitChannelState; 3], 72 flags: U32, 76 reserved: [U32; 9], }
}

/// Bits of [`PitState2`]'s `flags`.
pub mod pit_flags {
    /// A HPET has the place of channel 0.
    pub const HPET_LEGACY: u32 = 1;
    /// The speaker is connected.
    pub const SPEAKER_DATA_ON: u32 = 2;
}
