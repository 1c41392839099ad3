//! The MSRs of the machine-check architecture. No machine check ever happens.

use alloc::vec::Vec;

/// IA32_MCG_CAP: the number of banks, and that there is IA32_MCG_CTL.
const COUNT: u64 = 0xff;
const CTL_P: u64 = 1 << 8;

const MCG_CAP: u32 = 0x179;
const MCG_STATUS: u32 = 0x17a;
const MCG_CTL: u32 = 0x17b;
/// The first bank's first MSR. Each has four: CTL, STATUS, ADDR, MISC.
const BANKS: u32 = 0x400;

#[derive(Default)]
pub(crate) struct Mce {
    cap: u64,
    status: u64,
    ctl: u64,
    banks: Vec<[u64; 4]>,
}

impl Mce {
    /// The MSRs after power-on, with so many banks and such features (IA32_MCG_CAP).
    pub(crate) fn set_up(&mut self, cap: u64) {
        *self = Self {
            cap,
            status: 0,
            ctl: u64::MAX,
            banks: (0..cap & COUNT).map(|_| [u64::MAX, 0, 0, 0]).collect(),
        };
    }

    fn place(index: u32) -> Option<(usize, usize)> {
        let n = index.checked_sub(BANKS)? as usize;
        Some((n / 4, n % 4))
    }

    /// True for the MSRs of the machine-check architecture. Those that this processor lacks read as `None`.
    pub(crate) const fn has(index: u32) -> bool {
        matches!(index, MCG_CAP..=MCG_CTL | BANKS..=0x47f)
    }

    pub(crate) fn read(&self, index: u32) -> Option<u64> {
        match index {
            MCG_CAP => Some(self.cap),
            MCG_STATUS => Some(self.status),
            MCG_CTL => (self.cap & CTL_P != 0).then_some(self.ctl),
            _ => {
                let (bank, register) = Self::place(index)?;
                Some(self.banks.get(bank)?[register])
            }
        }
    }

    /// `None` is #GP. Errors can be cleared, and made if a bank's status takes any value.
    pub(crate) fn write(&mut self, index: u32, value: u64, any_status: bool) -> Option<()> {
        match index {
            MCG_CAP => return None,
            MCG_STATUS => self.status = value & 7,
            MCG_CTL if self.cap & CTL_P != 0 && matches!(value, 0 | u64::MAX) => self.ctl = value,
            MCG_CTL => return None,
            _ => {
                let (bank, register) = Self::place(index)?;
                let place = &mut self.banks.get_mut(bank)?[register];
                // All errors or none; some systems leave out bit 10, or bit 0.
                let all = value | 1 << 10 | 1 == u64::MAX;
                let takes = match register {
                    0 => value == 0 || all,
                    1 => value == 0 || any_status,
                    _ => true,
                };
                if !takes {
                    return None;
                }
                *place = value;
            }
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_has_the_banks_that_it_was_given() {
        let mut mce = Mce::default();
        assert_eq!((mce.read(MCG_CAP), mce.read(MCG_CTL)), (Some(0), None));
        assert_eq!((mce.read(BANKS), mce.write(BANKS, 0, false)), (None, None));
        mce.set_up(CTL_P | 2);
        assert_eq!(mce.write(MCG_CTL, 0, false), Some(()));
        assert_eq!(
            (mce.read(MCG_CTL), mce.write(MCG_CTL, 5, false)),
            (Some(0), None)
        );
        assert_eq!(mce.read(BANKS + 7), Some(0));
        assert_eq!(mce.read(BANKS + 8), None);
        assert_eq!(mce.write(BANKS + 4, !(1 << 10), false), Some(()));
        assert_eq!(mce.write(BANKS + 4, 3, false), None);
        assert_eq!(
            (
                mce.write(BANKS + 5, 1, false),
                mce.write(BANKS + 5, 0, false)
            ),
            (None, Some(()))
        );
        assert_eq!(mce.write(BANKS + 5, 1, true), Some(()));
        assert_eq!(mce.write(BANKS + 6, 77, false), Some(()));
        assert_eq!(mce.read(BANKS + 6), Some(77));
        assert_eq!(mce.write(MCG_CAP, 0, false), None);
    }
}
