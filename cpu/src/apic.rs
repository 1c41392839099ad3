//! The local APIC: xAPIC and x2APIC registers, priorities, and the timer in virtual time.

mod page;

use crate::state::Core;

pub use page::APIC_PAGE_BYTES;

/// Clock ticks for one tick of the APIC timer's input clock, as the processor's CPUID leaf 15H says.
pub(crate) const TICKS: u64 = 40;

pub(crate) const X2APIC: u64 = 1 << 10;
const ENABLED: u64 = 1 << 11;
pub(crate) const BSP: u64 = 1 << 8;
/// Bits of the interrupt command that are reserved in x2APIC mode (Intel SDM volume 3, figure 11-28) and fault. Bit 12, the
/// delivery status of xAPIC mode, reads as zero and is ignored, as on Intel's processors.
const X2APIC_COMMAND_RESERVED: u64 = 0xfff << 20 | 3 << 16 | 1 << 13;
const MASKED: u32 = 1 << 16;
/// The delivery mode of an LVT entry, and the mode in which the vector comes from outside.
const MODE: u32 = 7 << 8;
const EXT_INT: u32 = 7 << 8;

const LVT_TIMER: usize = 0x32;
const LVT_LINT0: usize = 0x35;
const LVT_LINT1: usize = 0x36;

/// 256 bits, one for each vector.
#[derive(Clone, Copy, Debug, Default)]
struct Vectors([u32; 8]);

impl Vectors {
    fn set(&mut self, v: u8) {
        self.0[usize::from(v >> 5)] |= 1 << (v & 31);
    }

    fn clear(&mut self, v: u8) {
        self.0[usize::from(v >> 5)] &= !(1 << (v & 31));
    }

    fn highest(&self) -> Option<u8> {
        let (i, word) = self.0.iter().enumerate().rev().find(|(_, w)| **w != 0)?;
        Some((i as u32 * 32 + 31 - word.leading_zeros()) as u8)
    }
}

/// Something that the write of a register makes the machine around a local APIC do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApicEffect {
    /// Nothing.
    None,
    /// An interrupt command, in the format of x2APIC.
    Command(u64),
    /// The end of the interrupt of that vector, level-triggered or edge-triggered.
    End(u8),
}

/// The registers and the timer of a local APIC. Each [`Cpu`](crate::Cpu) has one; a host that emulates the
/// APIC of a guest has another, where the guest's requests change it and time passes as the host says.
///
/// Times are ticks of a clock of the caller's choice, which the TSC runs with.
#[derive(Clone, Debug)]
pub struct Apic {
    id: u32,
    /// The number in xAPIC mode, which software may change.
    xapic_id: u8,
    /// The processor has none: neither page nor MSRs answer, and nothing is delivered.
    pub(crate) absent: bool,
    base: u64,
    tpr: u8,
    ldr: u32,
    dfr: u32,
    svr: u32,
    esr: u32,
    icr: u64,
    /// LVT entries at register numbers 2FH (CMCI) to 37H.
    lvt: [u32; 9],
    irr: Vectors,
    isr: Vectors,
    tmr: Vectors,
    initial: u32,
    divide: u32,
    /// Clock at which the timer fires.
    expires: Option<u64>,
    /// Value of IA32_TSC_DEADLINE, zero if not armed.
    deadline: u64,
    /// Clock ticks for one tick of the timer's input clock.
    ticks: u64,
}

impl Apic {
    /// An APIC after RESET: enabled in xAPIC mode, with all interrupts masked. Number 0 is the boot processor's.
    pub fn new(id: u32) -> Self {
        let mut apic = Self {
            id,
            xapic_id: id as u8,
            absent: false,
            base: 0xfee0_0000 | ENABLED | if id == 0 { BSP } else { 0 },
            tpr: 0,
            ldr: 0,
            dfr: u32::MAX,
            svr: 0xff,
            esr: 0,
            icr: 0,
            lvt: [MASKED; 9],
            irr: Vectors::default(),
            isr: Vectors::default(),
            tmr: Vectors::default(),
            initial: 0,
            divide: 0,
            expires: None,
            deadline: 0,
            ticks: TICKS,
        };
        apic.lvt[LVT_LINT0 - 0x2f] = MASKED;
        apic.lvt[LVT_LINT1 - 0x2f] = MASKED;
        apic
    }

    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// Sets how many clock ticks make one tick of the timer's input clock: the ratio of CPUID leaf 15H. 0 counts as 1.
    #[must_use]
    pub fn ticks(mut self, ticks: u64) -> Self {
        self.set_ticks(ticks);
        self
    }

    /// The same in place.
    pub(crate) fn set_ticks(&mut self, ticks: u64) {
        self.ticks = ticks.max(1);
    }

    /// IA32_APIC_BASE.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Guest-physical page of the registers, in xAPIC mode.
    pub(crate) fn page(&self) -> Option<u64> {
        (!self.absent && self.base & (ENABLED | X2APIC) == ENABLED).then_some(self.base & !0xfff)
    }

    fn x2(&self) -> bool {
        !self.absent && self.base & (ENABLED | X2APIC) == ENABLED | X2APIC
    }

    /// The APIC after RESET, if the processor has one.
    pub(crate) fn reset(&mut self) {
        let absent = self.absent;
        *self = Self::new(self.id).ticks(self.ticks);
        self.absent = absent;
    }

    /// Writes IA32_APIC_BASE as a host does that loads a state: any mode follows any other. `None` for a value that the
    /// register can not hold.
    pub fn load_base(&mut self, value: u64, phys_bits: u8) -> Option<()> {
        let reserved = 0x2ff | !((1 << phys_bits) - 1);
        if value & reserved != 0 || value & (ENABLED | X2APIC) == X2APIC {
            return None;
        }
        self.base = value;
        Some(())
    }

    /// The names under which interrupt commands reach it.
    pub fn address(&self) -> ApicAddress {
        ApicAddress {
            id: match self.x2() {
                true => self.id,
                false => self.xapic_id.into(),
            },
            x2: self.x2(),
            ldr: self.ldr,
            flat: self.dfr >> 28 == 15,
        }
    }

    /// Connects the interrupt controller of a PC to LINT0, as its firmware does ("virtual wire").
    pub(crate) fn connect_pic(&mut self) {
        self.lvt[LVT_LINT0 - 0x2f] = EXT_INT;
    }

    /// True if interrupts of that controller are let through to the processor.
    pub(crate) fn passes_pic(&self) -> bool {
        self.base & ENABLED == 0 || self.lvt[LVT_LINT0 - 0x2f] & (MASKED | MODE) == EXT_INT
    }

    /// Clock of the next timer interrupt that can be delivered.
    pub(crate) fn interrupts_at(&self) -> Option<u64> {
        let masked = self.lvt[LVT_TIMER - 0x2f] & MASKED != 0;
        self.expires.filter(|_| self.enabled() && !masked)
    }

    pub(crate) fn set_base(&mut self, value: u64, phys_bits: u8) -> Option<()> {
        let reserved = 0x2ff | !((1 << phys_bits) - 1);
        let from = self.base & (ENABLED | X2APIC);
        let to = value & (ENABLED | X2APIC);
        let legal = match (from, to) {
            (_, X2APIC) => false,
            (0, t) => t != ENABLED | X2APIC,
            (f, ENABLED) => f & X2APIC == 0,
            _ => true,
        };
        if value & reserved != 0 || !legal {
            return None;
        }
        if to == 0 && from != 0 {
            self.reset();
        }
        self.base = value;
        Some(())
    }

    pub(crate) fn tpr(&self) -> u8 {
        self.tpr
    }

    pub(crate) fn set_tpr(&mut self, value: u8) {
        self.tpr = value;
    }

    fn ppr(&self) -> u8 {
        let isr = self.isr.highest().unwrap_or(0);
        if self.tpr >> 4 >= isr >> 4 {
            self.tpr
        } else {
            isr & 0xf0
        }
    }

    /// True if it accepts interrupts: enabled by its base and by the spurious-interrupt vector register.
    pub fn enabled(&self) -> bool {
        !self.absent && self.base & ENABLED != 0 && self.svr & 1 << 8 != 0
    }

    /// Accepts an interrupt; vectors below 16 are an error.
    pub(crate) fn request(&mut self, vector: u8) {
        if vector < 16 {
            self.esr |= 1 << 6;
        } else if self.enabled() {
            self.irr.set(vector);
            self.tmr.clear(vector);
        }
    }

    /// The same for an interrupt with a level.
    pub(crate) fn request_level(&mut self, vector: u8) {
        self.request(vector);
        if vector >= 16 && self.enabled() {
            self.tmr.set(vector);
        }
    }

    /// Vector that would be delivered now.
    pub(crate) fn pending(&self) -> Option<u8> {
        self.irr
            .highest()
            .filter(|v| self.enabled() && v >> 4 > self.ppr() >> 4)
    }

    /// Moves a vector from requested to in service.
    pub(crate) fn accept(&mut self, vector: u8) {
        self.irr.clear(vector);
        self.isr.set(vector);
    }

    fn timer_mode(&self) -> u32 {
        self.lvt[LVT_TIMER - 0x2f] >> 17 & 3
    }

    fn divisor(&self) -> u64 {
        let code = self.divide & 3 | self.divide >> 1 & 4;
        self.ticks * if code == 7 { 1 } else { 2 << code }
    }

    fn start(&mut self, now: u64) {
        self.expires = (self.initial != 0 && self.timer_mode() < 2)
            .then(|| now.saturating_add(u64::from(self.initial) * self.divisor()));
    }

    fn current(&self, now: u64) -> u32 {
        match self.expires {
            Some(at) if self.timer_mode() < 2 => {
                (at.saturating_sub(now)).div_ceil(self.divisor()) as u32
            }
            _ => 0,
        }
    }

    /// IA32_TSC_DEADLINE: 0 unless it is armed.
    pub fn tsc_deadline(&self) -> u64 {
        self.deadline
    }

    /// Writes IA32_TSC_DEADLINE, at clock `now` with that value of the TSC. Does nothing in the other timer modes.
    pub fn set_tsc_deadline(&mut self, value: u64, tsc: u64, now: u64) {
        if self.timer_mode() != 2 {
            return;
        }
        self.deadline = value;
        self.expires = (value != 0).then(|| now.saturating_add(value.saturating_sub(tsc)));
    }

    /// Clock at which the timer fires next, masked or not.
    pub fn expires(&self) -> Option<u64> {
        self.expires
    }

    /// Fires the timer if its time has come, and takes the interrupt that it requests.
    pub fn fire(&mut self, now: u64) -> Option<u8> {
        self.tick(now);
        let vector = self.irr.highest()?;
        self.irr.clear(vector);
        Some(vector)
    }

    /// Fires the timer if its time has come.
    pub(crate) fn tick(&mut self, now: u64) {
        let Some(at) = self.expires.filter(|at| *at <= now) else {
            return;
        };
        let lvt = self.lvt[LVT_TIMER - 0x2f];
        if lvt & MASKED == 0 {
            self.request(lvt as u8);
        }
        self.expires = None;
        match self.timer_mode() {
            1 => {
                let period = (u64::from(self.initial) * self.divisor()).max(1);
                let missed = (now - at) / period;
                self.expires = Some(at.saturating_add((missed + 1).saturating_mul(period)));
            }
            2 => self.deadline = 0,
            _ => {}
        }
    }

    /// Reads a register by its number, the xAPIC offset divided by 16.
    fn read(&self, n: usize, now: u64) -> Option<u32> {
        Some(match n {
            0x02 if self.x2() => self.id,
            0x02 => u32::from(self.xapic_id) << 24,
            // Six LVT entries, no suppression of EOI broadcasts.
            0x03 => 0x14 | 5 << 16,
            0x08 => self.tpr.into(),
            0x0a => self.ppr().into(),
            0x0d if self.x2() => (self.id & 0xffff_fff0) << 12 | 1 << (self.id & 15),
            0x0d => self.ldr,
            0x0e if !self.x2() => self.dfr,
            0x0f => self.svr,
            0x10..=0x17 => self.isr.0[n & 7],
            0x18..=0x1f => self.tmr.0[n & 7],
            0x20..=0x27 => self.irr.0[n & 7],
            0x28 => self.esr,
            0x30 => self.icr as u32,
            0x31 if !self.x2() => (self.icr >> 32) as u32,
            0x32..=0x37 => self.lvt[n - 0x2f],
            0x38 => self.initial,
            0x39 => self.current(now),
            0x3e => self.divide,
            _ => return None,
        })
    }

    fn write(&mut self, n: usize, value: u32, now: u64) -> Option<ApicEffect> {
        match n {
            0x02 if !self.x2() => self.xapic_id = (value >> 24) as u8,
            0x08 => self.tpr = value as u8,
            0x0b => {
                if let Some(v) = self.isr.highest() {
                    self.isr.clear(v);
                    return Some(ApicEffect::End(v));
                }
            }
            0x0d if !self.x2() => self.ldr = value & 0xff00_0000,
            0x0e if !self.x2() => self.dfr = value | 0x0fff_ffff,
            0x0f => {
                self.svr = value & 0x1ff;
                if value & 1 << 8 == 0 {
                    self.lvt.iter_mut().for_each(|l| *l |= MASKED);
                }
            }
            0x28 => self.esr = 0,
            0x30 => {
                self.icr = self.icr & !0xffff_ffff | u64::from(value & !(1 << 12));
                return Some(ApicEffect::Command(
                    self.icr >> 56 << 32 | self.icr & 0xffff_ffff,
                ));
            }
            0x31 => self.icr = self.icr & 0xffff_ffff | u64::from(value & 0xff00_0000) << 32,
            0x32..=0x37 => {
                let off = if self.enabled() { 0 } else { MASKED };
                let before = self.timer_mode();
                self.lvt[n - 0x2f] = value & 0x0007_a7ff | off;
                let after = self.timer_mode();
                // A count goes on when one-shot becomes periodic, or the other way round. A change to or from deadlines
                // disarms the timer (SDM vol. 3, 11.5.4.1).
                if n == LVT_TIMER && before != after && before.max(after) > 1 {
                    self.expires = None;
                    self.deadline = 0;
                }
            }
            0x38 => {
                self.initial = value;
                self.start(now);
            }
            0x3e => {
                self.divide = value & 0xb;
                if self.timer_mode() < 2 && self.expires.is_some() {
                    self.start(now);
                }
            }
            _ => return None,
        }
        Some(ApicEffect::None)
    }

    /// RDMSR of a register in x2APIC mode, 0x800 to 0x8ff. `None` is #GP.
    pub fn read_x2(&self, msr: u32, now: u64) -> Option<u64> {
        if !self.x2() {
            return None;
        }
        match msr {
            0x830 => Some(self.icr),
            0x80b => None,
            _ => self.read(msr as usize & 0xff, now).map(u64::from),
        }
    }

    /// WRMSR of a register in x2APIC mode, 0x800 to 0x8ff. `None` is #GP.
    pub fn write_x2(&mut self, msr: u32, value: u64, now: u64) -> Option<ApicEffect> {
        if !self.x2() {
            return None;
        }
        match msr {
            0x830 if value & X2APIC_COMMAND_RESERVED != 0 => None,
            0x830 => {
                self.icr = value & !(1 << 12);
                Some(ApicEffect::Command(self.icr))
            }
            0x83f if value < 256 => {
                self.request(value as u8);
                Some(ApicEffect::None)
            }
            0x831 | 0x83f => None,
            0x80b | 0x828 if value != 0 => None,
            _ if value >> 32 != 0 => None,
            _ => self.write(msr as usize & 0xff, value as u32, now),
        }
    }

    /// Reads the register page; anything but aligned 4-byte accesses reads as zero.
    pub(crate) fn read_page(&self, offset: usize, data: &mut [u8], now: u64) {
        data.fill(0);
        if data.len() <= 4 && offset & 15 < 4 {
            let value = self.read(offset >> 4, now).unwrap_or(0).to_le_bytes();
            for (to, from) in data.iter_mut().zip(&value[offset & 3..]) {
                *to = *from;
            }
        }
    }

    pub(crate) fn write_page(&mut self, offset: usize, data: &[u8], now: u64) -> ApicEffect {
        match <[u8; 4]>::try_from(data) {
            Ok(bytes) if offset & 15 == 0 => self
                .write(offset >> 4, u32::from_le_bytes(bytes), now)
                .unwrap_or(ApicEffect::None),
            _ => ApicEffect::None,
        }
    }
}

/// The names under which a local APIC is called in interrupt commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApicAddress {
    id: u32,
    x2: bool,
    ldr: u32,
    flat: bool,
}

impl ApicAddress {
    /// The names of APIC number `id` after RESET.
    pub const fn after_reset(id: u32) -> Self {
        Self {
            id,
            x2: false,
            ldr: 0,
            flat: true,
        }
    }

    /// True if the APIC is meant by a destination (Intel SDM volume 3, 11.6.2 and 11.12.9), physical
    /// or logical. Eight bits of ones are a broadcast in xAPIC mode, 32 in both.
    pub const fn accepts(&self, destination: u32, logical: bool) -> bool {
        if destination == u32::MAX || !self.x2 && destination == 0xff {
            return true;
        }
        if !logical {
            return destination == self.id;
        }
        if self.x2 {
            return destination >> 16 == self.id >> 4 && destination >> (self.id & 15) & 1 != 0;
        }
        let name = self.ldr >> 24;
        if self.flat {
            return destination & name != 0;
        }
        destination >> 4 == name >> 4 && destination & name & 15 != 0
    }
}

impl Core {
    /// Carries out what an APIC write asks for.
    pub(crate) fn apply(&mut self, effect: ApicEffect) {
        match effect {
            ApicEffect::None => {}
            ApicEffect::End(vector) => self.bus.end_of_interrupt(vector),
            ApicEffect::Command(icr) => self.interrupt_command(icr),
        }
    }

    fn interrupt_command(&mut self, icr: u64) {
        let vector = icr as u8;
        let fixed = icr >> 8 & 7 == 0;
        let nmi = icr >> 8 & 7 == 4;
        let shorthand = icr >> 18 & 3;
        let destination = (icr >> 32) as u32;
        let physical = icr & 1 << 11 == 0;
        let to_self = match shorthand {
            0 => self.apic.address().accepts(destination, !physical),
            1 | 2 => true,
            _ => false,
        };
        // In xAPIC mode another one may have the same number.
        let alone = shorthand == 0 && physical && self.apic.x2() && destination == self.apic.id();
        if to_self && fixed {
            self.apic.request(vector);
            self.attention = true;
        }
        if to_self && nmi {
            self.receive_nmi();
        }
        if shorthand != 1 && !(alone && (fixed || nmi)) {
            self.bus.ipi(self.apic.id(), icr);
            // Whom it is for should have a turn.
            self.yielded = true;
            self.attention = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn running() -> Apic {
        let mut apic = Apic::new(0);
        assert!(
            apic.set_base(0xfee0_0000 | ENABLED | X2APIC | BSP, 46)
                .is_some()
        );
        assert!(apic.write_x2(0x80f, 0x1ff, 0).is_some());
        apic
    }

    #[test]
    fn a_lower_class_waits_for_the_end_of_a_higher_one() {
        let mut apic = running();
        apic.request(0x51);
        assert_eq!(apic.pending(), Some(0x51));
        apic.accept(0x51);
        apic.request(0x5f);
        apic.request(0x40);
        assert_eq!(apic.pending(), None);
        apic.request(0x60);
        assert_eq!(apic.pending(), Some(0x60));
        apic.set_tpr(0x60);
        assert_eq!(apic.pending(), None);
        apic.set_tpr(0);
        assert!(apic.write_x2(0x80b, 0, 0) == Some(ApicEffect::End(0x51)));
    }

    #[test]
    fn one_shot_fires_once_and_periodic_again() {
        let mut apic = running();
        apic.write_x2(0x832, 0x40, 0).expect("LVT");
        apic.write_x2(0x83e, 0xb, 0).expect("divide by 1");
        apic.write_x2(0x838, 10, 100).expect("initial count");
        assert_eq!(apic.expires(), Some(100 + 10 * TICKS));
        assert_eq!(apic.read_x2(0x839, 100 + 4 * TICKS), Some(6));
        apic.tick(100 + 10 * TICKS);
        assert_eq!((apic.pending(), apic.expires()), (Some(0x40), None));
        apic.write_x2(0x832, 1 << 17 | 0x41, 0).expect("LVT");
        apic.write_x2(0x838, 10, 0).expect("initial count");
        apic.tick(25 * TICKS);
        assert_eq!(apic.expires(), Some(30 * TICKS));
    }

    #[test]
    fn a_count_goes_on_in_the_other_mode_and_ends_with_deadlines() {
        const PERIODIC: u64 = 1 << 17 | 0x40;
        let mut apic = running();
        let mode = |apic: &mut Apic, lvt: u64, now| apic.write_x2(0x832, lvt, now).expect("LVT");
        mode(&mut apic, 0x40, 0);
        apic.write_x2(0x83e, 0xb, 0).expect("divide by 1");
        apic.write_x2(0x838, 10, 0).expect("initial count");
        mode(&mut apic, PERIODIC, 4 * TICKS);
        assert_eq!(apic.read_x2(0x839, 4 * TICKS), Some(6));
        apic.tick(10 * TICKS);
        assert_eq!(apic.expires(), Some(20 * TICKS));
        mode(&mut apic, 0x40, 13 * TICKS);
        assert_eq!(apic.read_x2(0x839, 13 * TICKS), Some(7));
        apic.tick(20 * TICKS);
        // What has ended does not begin again.
        mode(&mut apic, PERIODIC, 21 * TICKS);
        assert_eq!(apic.expires(), None);
        apic.write_x2(0x838, 10, 21 * TICKS).expect("initial count");
        mode(&mut apic, 2 << 17 | 0x40, 22 * TICKS);
        assert_eq!(apic.expires(), None);
    }

    #[test]
    fn the_input_clock_is_the_ratio_that_was_set() {
        let mut apic = Apic::new(3).ticks(100);
        apic.load_base(0xfee0_0000 | ENABLED | X2APIC, 52)
            .expect("x2APIC");
        for (register, value) in [(0x80f, 0x1ff), (0x832, 0x40), (0x83e, 0xb), (0x838, 10)] {
            apic.write_x2(register, value, 7).expect("a register");
        }
        assert_eq!(apic.expires(), Some(1007));
        assert_eq!(
            (apic.fire(1006), apic.read_x2(0x839, 1006)),
            (None, Some(1))
        );
        assert_eq!((apic.fire(1007), apic.fire(9999)), (Some(0x40), None));
        assert_eq!(
            apic.read_x2(0x820 + 2, 9999),
            Some(0),
            "the request was taken"
        );
    }

    #[test]
    fn the_deadline_reads_zero_after_it_fired() {
        let mut apic = running();
        apic.write_x2(0x832, 2 << 17 | 0x42, 0).expect("LVT");
        apic.set_tsc_deadline(5000, 1000, 50);
        assert_eq!(apic.expires(), Some(4050));
        apic.tick(4049);
        assert_eq!(apic.pending(), None);
        apic.tick(4050);
        assert_eq!((apic.pending(), apic.tsc_deadline()), (Some(0x42), 0));
    }

    #[test]
    fn a_deadline_at_the_end_of_time_is_armed_and_never_fires() {
        let mut apic = running();
        apic.write_x2(0x832, (2 << 17) | 0x42, 0).expect("LVT");
        apic.set_tsc_deadline(u64::MAX, 0, 50);
        assert_eq!(apic.expires(), Some(u64::MAX));
    }

    #[test]
    fn destinations_name_apics_physically_and_logically() {
        let mut apic = Apic::new(0x12);
        apic.ldr = 0x0400_0000;
        let flat = apic.address();
        assert!(flat.accepts(0x12, false) && flat.accepts(0xff, false));
        assert!(flat.accepts(0x0c, true) && !flat.accepts(0x08, true));
        apic.dfr = 0x0fff_ffff;
        apic.ldr = 0x2400_0000;
        let cluster = apic.address();
        assert!(cluster.accepts(0x2c, true));
        assert!(!cluster.accepts(0x1c, true) && !cluster.accepts(0x28, true));
        apic.load_base(0xfee0_0000 | ENABLED | X2APIC, 46)
            .expect("x2APIC");
        let x2 = apic.address();
        assert!(x2.accepts(1 << 16 | 4, true) && !x2.accepts(2 << 16 | 4, true));
        assert!(x2.accepts(u32::MAX, false) && !x2.accepts(0xff, false));
    }

    #[test]
    fn reserved_bits_of_an_x2apic_command_fault_and_the_others_are_kept() {
        for bit in 0..64 {
            let mut apic = running();
            let reserved = matches!(bit, 13 | 16 | 17 | 20..=31);
            let written = apic.write_x2(0x830, 1 << bit, 0);
            assert_eq!(written.is_none(), reserved, "bit {bit}");
            let kept = match bit {
                _ if reserved => 0,
                12 => 0,
                bit => 1 << bit,
            };
            assert_eq!(apic.read_x2(0x830, 0), Some(kept), "bit {bit}");
        }
    }

    #[test]
    fn a_vector_below_16_that_was_loaded_is_never_delivered() {
        let mut apic = running();
        apic.irr = Vectors([0xffff, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(apic.pending(), None);
    }

    #[test]
    fn illegal_mode_changes_of_the_apic_base_fault() {
        let mut apic = Apic::new(0);
        let base = 0xfee0_0000;
        assert!(apic.set_base(base | X2APIC, 46).is_none());
        assert!(apic.set_base(base | ENABLED | X2APIC, 46).is_some());
        assert!(apic.set_base(base | ENABLED, 46).is_none());
        assert!(apic.set_base(base, 46).is_some());
        assert!(apic.set_base(base | ENABLED | X2APIC, 46).is_none());
        assert!(apic.set_base(base | ENABLED | 1, 46).is_none());
    }
}
