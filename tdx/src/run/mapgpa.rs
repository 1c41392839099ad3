//! `TDG.VP.VMCALL<MapGPA>`: makes a range private or shared (GHCI; Linux `tdx_map_gpa`).

use kvm_ops::{Exit, Gpa, Host, PAGE_SIZE};

use super::Pending;
use super::vmcall::{ALIGN_ERROR, INVALID_OPERAND, RETRY, SUBFUNC_UNSUPPORTED, SUCCESS};
use crate::TdxVcpu;

/// The largest piece of one exit, as in Linux (`TDX_MAP_GPA_MAX_LEN`): a kick is noticed between
/// two pieces.
const PIECE: u64 = 2 << 20;

/// errnos with which the embedder asks that the guest call again: `EAGAIN` and `EBUSY`.
const TRY_AGAIN: [u64; 2] = [11, 16];

/// The errno of an embedder that converts nothing: `ENOSYS`. So Linux answers whose VMM did not enable
/// `KVM_CAP_EXIT_HYPERCALL`.
const NOT_OFFERED: u64 = 38;

/// A conversion under way: the piece handed out, with the shared bit as the guest gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Conversion {
    next: u64,
    end: u64,
}

/// Checks R12, the start, and R13, the length. `legal` and `shared` tell of an address.
///
/// # Errors
/// The status for the guest.
fn check(
    gpa: u64,
    bytes: u64,
    legal: impl Fn(u64) -> bool,
    shared: impl Fn(u64) -> bool,
) -> Result<Conversion, u64> {
    let end = gpa.checked_add(bytes).ok_or(INVALID_OPERAND)?;
    // An empty range has no last byte.
    let last = end
        .checked_sub(1)
        .filter(|last| *last >= gpa)
        .ok_or(INVALID_OPERAND)?;
    if !legal(gpa) || !legal(last) || shared(gpa) != shared(last) {
        return Err(INVALID_OPERAND);
    }
    if !gpa.is_multiple_of(PAGE_SIZE) || !bytes.is_multiple_of(PAGE_SIZE) {
        return Err(ALIGN_ERROR);
    }
    Ok(Conversion { next: gpa, end })
}

impl<H: Host> TdxVcpu<H> {
    /// R12 the start, whose shared bit says what the range becomes, R13 the length.
    pub(super) fn map_gpa(&mut self) -> Option<Exit> {
        let (gpa, bytes) = (self.run.regs.r12, self.run.regs.r13);
        let legal = |gpa| self.is_legal(gpa);
        match check(gpa, bytes, legal, |gpa| self.is_shared(gpa)) {
            Ok(conversion) => self.hand_out(conversion),
            Err(status) => self.stopped(status, gpa),
        }
    }

    fn hand_out(&mut self, conversion: Conversion) -> Option<Exit> {
        let bytes = PIECE.min(conversion.end - conversion.next);
        let (gfn, to) = self.td.mask.split(Gpa::new(conversion.next));
        let exit = Exit::MapGpaRange {
            gpa: Gpa::new(gfn.get() * PAGE_SIZE),
            pages: bytes / PAGE_SIZE,
            to,
        };
        self.run.leave(Pending::MapGpa(conversion), exit)
    }

    /// Ends the call before its end: R11 says where.
    fn stopped(&mut self, status: u64, at: u64) -> Option<Exit> {
        self.run.regs.r11 = at;
        self.run.finish_call(status)
    }

    /// The embedder answered a piece.
    pub(super) fn map_gpa_answered(&mut self, piece: Conversion) -> Option<Exit> {
        match self.run.value() {
            0 => {}
            errno if TRY_AGAIN.contains(&errno) => return self.stopped(RETRY, piece.next),
            NOT_OFFERED => return self.stopped(SUBFUNC_UNSUPPORTED, piece.next),
            _ => return self.stopped(INVALID_OPERAND, piece.next),
        }
        let next = piece.next.saturating_add(PIECE);
        if next >= piece.end {
            return self.run.finish_call(SUCCESS);
        }
        // A kick wants the vCPU out soon: the guest calls again for the rest.
        if self.record.is_kicked() {
            return self.stopped(RETRY, next);
        }
        self.hand_out(Conversion { next, ..piece })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_input_is_refused_by_its_status_or_taken() {
        for shared_bit in [1u64 << 47, 1 << 51] {
            let s = shared_bit;
            let top = s << 1;
            let ok = |next, bytes| {
                Ok(Conversion {
                    next,
                    end: next + bytes,
                })
            };
            let table = [
                // Ranges that are one.
                (0, 0x1000, ok(0, 0x1000)),
                (0x1000, 0x20_0000, ok(0x1000, 0x20_0000)),
                (s, 0x1000, ok(s, 0x1000)),
                (s - 0x1000, 0x1000, ok(s - 0x1000, 0x1000)),
                (top - 0x1000, 0x1000, ok(top - 0x1000, 0x1000)),
                (0, s, ok(0, s)),
                (s, s, ok(s, s)),
                // Empty, and beyond 64 bits.
                (0, 0, Err(INVALID_OPERAND)),
                (0x1000, 0, Err(INVALID_OPERAND)),
                (0x1000, u64::MAX, Err(INVALID_OPERAND)),
                (0x1000, u64::MAX - 0xfff, Err(INVALID_OPERAND)),
                (u64::MAX, 1, Err(INVALID_OPERAND)),
                (!0xfff, 0x1000, Err(INVALID_OPERAND)),
                // Beyond the TD's width.
                (top, 0x1000, Err(INVALID_OPERAND)),
                (top - 0x1000, 0x2000, Err(INVALID_OPERAND)),
                (1 << 62, 0x1000, Err(INVALID_OPERAND)),
                // Private and shared.
                (s - 0x1000, 0x2000, Err(INVALID_OPERAND)),
                (0, s + 0x1000, Err(INVALID_OPERAND)),
                (0, top, Err(INVALID_OPERAND)),
                // Not whole pages; a range that is wrong in both ways is invalid first.
                (1, 0x1000, Err(ALIGN_ERROR)),
                (0x1000, 1, Err(ALIGN_ERROR)),
                (0x1000, 0xfff, Err(ALIGN_ERROR)),
                (s | 0x800, 0x1000, Err(ALIGN_ERROR)),
                (1, 0, Err(INVALID_OPERAND)),
                (s - 0x800, 0x1000, Err(INVALID_OPERAND)),
            ];
            for (gpa, bytes, expected) in table {
                let found = check(gpa, bytes, |gpa| gpa < top, |gpa| gpa & s != 0);
                assert_eq!(found, expected, "{gpa:#x} {bytes:#x}");
            }
        }
    }
}
