//! The register page as a whole, for whoever saves and loads a local APIC.

use super::{Apic, Vectors};

/// Bytes of the page that have registers.
pub const APIC_PAGE_BYTES: usize = 1024;

/// Register numbers.
const ID: usize = 0x02;
const TPR: usize = 0x08;
const LDR: usize = 0x0d;
const DFR: usize = 0x0e;
const SVR: usize = 0x0f;
const ISR: usize = 0x10;
const TMR: usize = 0x18;
const IRR: usize = 0x20;
const ESR: usize = 0x28;
const LVT_CMCI: usize = 0x2f;
const ICR: usize = 0x30;
const ICR_HIGH: usize = 0x31;
const INITIAL: usize = 0x38;
const CURRENT: usize = 0x39;
const DIVIDE: usize = 0x3e;

fn put(page: &mut [u8; APIC_PAGE_BYTES], n: usize, value: u32) {
    page[n * 16..n * 16 + 4].copy_from_slice(&value.to_le_bytes());
}

fn get(page: &[u8; APIC_PAGE_BYTES], n: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&page[n * 16..n * 16 + 4]);
    u32::from_le_bytes(bytes)
}

impl Apic {
    /// The registers at clock `now`, each 4 bytes at 16 times its number, in xAPIC's layout: the upper half of
    /// the interrupt command is apart in x2APIC mode too.
    pub fn save(&self, now: u64) -> [u8; APIC_PAGE_BYTES] {
        let mut page = [0; APIC_PAGE_BYTES];
        for n in 0..APIC_PAGE_BYTES / 16 {
            put(&mut page, n, self.read(n, now).unwrap_or(0));
        }
        put(&mut page, DFR, self.dfr);
        put(&mut page, LVT_CMCI, self.lvt[0]);
        put(&mut page, ICR_HIGH, (self.icr >> 32) as u32);
        page
    }

    /// Loads them at clock `now`. The timer goes on from its current count. Base and TSC deadline are MSRs, and stay;
    /// so does the number in x2APIC mode. Vectors below 16, which nothing can request, are kept as they are given and
    /// never delivered.
    pub fn load(&mut self, page: &[u8; APIC_PAGE_BYTES], now: u64) {
        let vectors = |first: usize| {
            let mut words = [0; 8];
            for (word, n) in words.iter_mut().zip(first..) {
                *word = get(page, n);
            }
            Vectors(words)
        };
        if !self.x2() {
            self.xapic_id = (get(page, ID) >> 24) as u8;
            self.ldr = get(page, LDR) & 0xff00_0000;
            self.dfr = get(page, DFR) | 0x0fff_ffff;
        }
        self.tpr = get(page, TPR) as u8;
        self.svr = get(page, SVR) & 0x1ff;
        self.esr = get(page, ESR);
        self.icr = u64::from(get(page, ICR)) | u64::from(get(page, ICR_HIGH)) << 32;
        let mode = self.timer_mode();
        for (entry, n) in self.lvt.iter_mut().zip(LVT_CMCI..) {
            // 30H and 31H are the interrupt command.
            if !matches!(n, ICR | ICR_HIGH) {
                *entry = get(page, n) & 0x0007_a7ff;
            }
        }
        (self.isr, self.tmr, self.irr) = (vectors(ISR), vectors(TMR), vectors(IRR));
        self.initial = get(page, INITIAL);
        self.divide = get(page, DIVIDE) & 0xb;
        self.go_on(get(page, CURRENT), mode, now);
    }

    /// The timer counts on from a count, unless it counts to a deadline.
    fn go_on(&mut self, current: u32, mode: u32, now: u64) {
        if self.timer_mode() == 2 {
            if mode != 2 {
                (self.expires, self.deadline) = (None, 0);
            }
            return;
        }
        self.deadline = 0;
        let periodic = self.timer_mode() == 1;
        let left = match current {
            0 if periodic => self.initial,
            current => current,
        };
        let runs = self.initial != 0 && left != 0;
        self.expires =
            runs.then(|| now.saturating_add(u64::from(left.min(self.initial)) * self.divisor()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apic::{ENABLED, LVT_TIMER, X2APIC};

    fn apic(x2: bool) -> Apic {
        let mut apic = Apic::new(5);
        if x2 {
            let base = apic.base() | ENABLED | X2APIC;
            assert_eq!(apic.load_base(base, 46), Some(()));
        }
        apic
    }

    #[test]
    fn what_is_saved_is_loaded_in_both_modes() {
        for x2 in [false, true] {
            let mut from = apic(x2);
            let write = |apic: &mut Apic, n: usize, value: u32| {
                assert!(apic.write(n, value, 100).is_some(), "{n:#x}");
            };
            for (n, value) in [
                (SVR, 0x1ff),
                (TPR, 0x20),
                (LVT_TIMER, 0x2_0031),
                (0x35, 0x700),
                (0x37, 0x33),
                (DIVIDE, 3),
                (INITIAL, 1000),
            ] {
                write(&mut from, n, value);
            }
            from.icr = 0x0000_0003_0000_4041;
            from.request_level(0x81);
            from.request(0x52);
            from.accept(0x81);
            // The page has the count alone: what is left of the running tick is lost.
            let now = 100 + 5 * from.divisor();
            let page = from.save(now);
            assert_eq!(get(&page, ID), if x2 { 5 } else { 5 << 24 });
            assert_eq!(get(&page, ICR_HIGH), 3);
            let mut to = apic(x2);
            to.load(&page, now);
            assert_eq!(to.save(now), page);
            assert_eq!(to.expires(), from.expires());
            assert_eq!(to.pending(), from.pending());
        }
    }

    #[test]
    fn any_bytes_are_a_page() {
        let mut apic = apic(false);
        apic.load(&[0xff; APIC_PAGE_BYTES], 7);
        assert_eq!(get(&apic.save(7), SVR), 0x1ff);
        assert_eq!(get(&apic.save(7), IRR), u32::MAX);
        apic.load(&[0; APIC_PAGE_BYTES], 7);
        assert_eq!((apic.expires(), apic.enabled()), (None, false));
    }
}
