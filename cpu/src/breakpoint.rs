//! Debug exceptions: breakpoints by DR0 to DR3, single steps, and what DR6 says of them (Intel SDM
//! volume 3, chapter 18).

use crate::fault::Exception;
use crate::flags;
use crate::state::{CR4_DE, Core, Pending, R};

/// DR6: B0 to B3, BD, BS, BT.
const HITS: u64 = 0xf;
const BD: u64 = 1 << 13;
pub(crate) const BS: u64 = 1 << 14;
pub(crate) const BT: u64 = 1 << 15;
/// DR7: L0 to G3, GD.
const ENABLES: u64 = 0xff;
const GD: u64 = 1 << 13;

/// R/W of a breakpoint.
const EXECUTE: u64 = 0;
const WRITE: u64 = 1;
const PORT: u64 = 2;

/// An access that a breakpoint may be for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Watched {
    Execute,
    Read,
    Write,
    Port,
}

impl Core {
    /// Takes note of DR7, the guest's or the debugger's. While a breakpoint is enabled, each instruction runs alone and each access is slow.
    pub(crate) fn update_watch(&mut self) {
        self.watched = self.breakpoints().1 & ENABLES != 0;
        self.attention = true;
        self.update_set();
    }

    /// Bits of DR6 for the enabled breakpoints that an access of `len` bytes meets.
    fn hits(&self, address: u64, len: u64, what: Watched) -> u64 {
        let (at, dr7) = self.breakpoints();
        let met = |n: usize| {
            let kind = dr7 >> (16 + 4 * n) & 3;
            let size = [1, 2, 8, 4][(dr7 >> (18 + 4 * n) & 3) as usize];
            let meant = match what {
                Watched::Execute => kind == EXECUTE,
                Watched::Read => kind == 3,
                Watched::Write => kind == 3 || kind == WRITE,
                Watched::Port => kind == PORT && self.cr4 & CR4_DE != 0,
            };
            let start = at[n] & !(size - 1);
            // The distances wrap as addresses do.
            let inside = address.wrapping_sub(start) < size || start.wrapping_sub(address) < len;
            dr7 >> (2 * n) & 3 != 0 && meant && inside
        };
        (0..4).fold(0, |bits, n| bits | u64::from(met(n)) << n)
    }

    /// Notes an access of the running instruction; the trap comes after it.
    pub(crate) fn watch(&mut self, address: u64, len: usize, what: Watched) {
        self.hit |= self.hits(address, len as u64, what);
    }

    /// #DB before the instruction at RIP, if a breakpoint is on it and RF does not hold it back.
    pub(crate) fn at_breakpoint(&mut self) -> bool {
        if self.system_flags & flags::RF != 0 || self.debug != 0 && !self.quiet {
            return false;
        }
        // After MOV SS Intel's processors take none.
        if self.quiet && !self.cpuid.is_amd() {
            return false;
        }
        let hits = self.hits(self.code_linear(self.rip), 1, Watched::Execute);
        if hits != 0 {
            let exception = self.debug_exception(!HITS, hits);
            if !self.debugger.takes_debug() {
                // The image that is pushed has RF, so that the instruction runs when the handler returns.
                self.system_flags |= flags::RF;
            }
            self.pending = Pending::Fault(exception);
        }
        hits != 0
    }

    /// The running instruction is complete; `step`: TF was set when it began.
    pub(crate) fn completed(&mut self, step: bool) {
        self.debug |= core::mem::take(&mut self.hit);
        let decided = core::mem::take(&mut self.stepped);
        if self.debugger.step || step && !decided {
            self.debug |= BS;
        }
    }

    /// SYSCALL and SYSRET are stepped if TF is set after them, whatever it was before (`before`).
    pub(crate) fn step_at_end(&mut self, before: u64) {
        self.stepped = before & flags::TF != 0;
        if self.system_flags & flags::TF != 0 {
            self.debug |= BS;
            self.attention = true;
        }
    }

    /// #DB for what the last instruction met, unless that was MOV SS or POP SS.
    pub(crate) fn debug_trap(&mut self) -> bool {
        if self.debug == 0 || self.quiet {
            return false;
        }
        let exception = self.debug_exception(!HITS, self.debug);
        if self.debugger.takes_debug() {
            self.debug = 0;
        }
        self.pending = Pending::Fault(exception);
        true
    }

    /// A #DB is delivered: it stands for those that wait, and lets handlers use debug registers.
    pub(crate) fn debug_delivered(&mut self) {
        self.debug = 0;
        self.dr[7] &= !GD;
    }

    /// #DB for MOV of a debug register while DR7.GD protects them.
    pub(crate) fn general_detect(&mut self) -> R<()> {
        if self.breakpoints().1 & GD == 0 {
            return Ok(());
        }
        let exception = self.debug_exception(!0, BD);
        Err(self.fault(exception))
    }

    /// #DB with its bits of DR6. They go to DR6, of which other bits are kept, or with the exit to the debugger.
    fn debug_exception(&mut self, kept: u64, bits: u64) -> Exception {
        let mut exception = Exception::plain(Exception::DB);
        match self.debugger.takes_debug() {
            true => exception.address = Some(bits),
            false => self.dr[6] = self.dr[6] & kept | bits,
        }
        exception
    }
}
