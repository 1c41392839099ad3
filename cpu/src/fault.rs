//! Exceptions, and the events that the processor delivers through its interrupt table.

/// An exception of the architecture (Intel SDM volume 3, 6.15; AMD APM volume 2, 8.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Vector, 0 to 31.
    pub vector: u8,
    /// Error code, for the vectors that push one.
    pub code: Option<u32>,
    /// Address that goes to CR2: page faults only. A #DB for a [`Debugger`](crate::Debugger) has its bits of DR6 here, as VMX
    /// tells them in the exit qualification.
    pub address: Option<u64>,
}

impl Exception {
    pub(crate) const DE: u8 = 0;
    pub(crate) const DB: u8 = 1;
    pub(crate) const NMI: u8 = 2;
    pub(crate) const BP: u8 = 3;
    pub(crate) const OF: u8 = 4;
    pub(crate) const BR: u8 = 5;
    pub(crate) const UD: u8 = 6;
    pub(crate) const NM: u8 = 7;
    pub(crate) const DF: u8 = 8;
    pub(crate) const TS: u8 = 10;
    pub(crate) const NP: u8 = 11;
    pub(crate) const SS: u8 = 12;
    pub(crate) const GP: u8 = 13;
    pub(crate) const PF: u8 = 14;
    pub(crate) const MF: u8 = 16;
    pub(crate) const AC: u8 = 17;
    pub(crate) const XM: u8 = 19;
    pub(crate) const VE: u8 = 20;

    /// An exception without an error code.
    pub const fn plain(vector: u8) -> Self {
        Self {
            vector,
            code: None,
            address: None,
        }
    }

    /// An exception with an error code.
    pub const fn with_code(vector: u8, code: u32) -> Self {
        Self {
            vector,
            code: Some(code),
            address: None,
        }
    }

    /// A page fault at a linear address.
    pub const fn page_fault(code: u32, address: u64) -> Self {
        Self {
            vector: Self::PF,
            code: Some(code),
            address: Some(address),
        }
    }

    /// True for the exceptions that make a double fault of a second one of their class.
    const fn contributory(vector: u8) -> bool {
        matches!(vector, Self::DE | Self::TS | Self::NP | Self::SS | Self::GP)
    }

    /// Follows the table of double faults: the exception that `second` becomes when it is raised
    /// while `first` is delivered. `None` is a triple fault.
    pub(crate) fn combine(first: Option<u8>, second: Self) -> Option<Self> {
        let page_fault_like = |v: u8| v == Self::PF || v == Self::VE;
        let serious = Self::contributory(second.vector) || page_fault_like(second.vector);
        match first {
            Some(Self::DF) if serious => None,
            Some(v) if Self::contributory(v) && Self::contributory(second.vector) => {
                Some(Self::with_code(Self::DF, 0))
            }
            Some(v) if page_fault_like(v) && serious => Some(Self::with_code(Self::DF, 0)),
            _ => Some(second),
        }
    }
}

/// The kinds of events, numbered as VMX and SVM number them in their injection fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// An interrupt from outside.
    Interrupt = 0,
    /// A non-maskable interrupt.
    Nmi = 2,
    /// An exception that the processor found.
    Exception = 3,
    /// INT n.
    Software = 4,
    /// INT1.
    Privileged = 5,
    /// INT3 or INTO.
    SoftwareException = 6,
}

/// An event that goes through the interrupt table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Source of the event.
    pub kind: EventKind,
    /// Entry of the interrupt table.
    pub vector: u8,
    /// Error code to push.
    pub code: Option<u32>,
    /// New value of CR2, for page faults; bits of DR6, for a #DB that leaves.
    pub address: Option<u64>,
    /// Length of the instruction that raised it; used by INT n, INT1, INT3 and INTO, whose return
    /// address is the next instruction.
    pub len: u8,
}

impl Event {
    /// An external interrupt.
    pub const fn interrupt(vector: u8) -> Self {
        Self {
            kind: EventKind::Interrupt,
            vector,
            code: None,
            address: None,
            len: 0,
        }
    }

    /// A non-maskable interrupt.
    pub const fn nmi() -> Self {
        Self {
            kind: EventKind::Nmi,
            vector: Exception::NMI,
            code: None,
            address: None,
            len: 0,
        }
    }

    /// An exception raised by hardware, or injected by a host as if it were.
    pub const fn exception(e: Exception) -> Self {
        Self {
            kind: EventKind::Exception,
            vector: e.vector,
            code: e.code,
            address: e.address,
            len: 0,
        }
    }

    pub(crate) const fn software(kind: EventKind, vector: u8, len: u8) -> Self {
        Self {
            kind,
            vector,
            code: None,
            address: None,
            len,
        }
    }

    /// The interruption-information format of VMX, which SVM's EVENTINJ and EXITINTINFO share in
    /// all fields used here: vector, kind in bits 10:8, error code valid in bit 11, valid in 31.
    pub const fn information(self) -> u32 {
        let code = if self.code.is_some() { 1 << 11 } else { 0 };
        self.vector as u32 | (self.kind as u32) << 8 | code | 1 << 31
    }

    /// True for #DB, of hardware or by INT1.
    pub(crate) const fn is_debug(self) -> bool {
        let kind = matches!(self.kind, EventKind::Exception | EventKind::Privileged);
        kind && self.vector == Exception::DB
    }

    pub(crate) const fn is_software(self) -> bool {
        matches!(
            self.kind,
            EventKind::Software | EventKind::Privileged | EventKind::SoftwareException
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn double_faults_follow_the_table_of_the_manuals() {
        let after = |first: Option<u8>, second: u8| {
            Exception::combine(first, Exception::with_code(second, 0)).map(|e| e.vector)
        };
        assert_eq!(after(None, 13), Some(13));
        for benign in [1, 3, 5, 6, 7, 16, 17, 19] {
            assert_eq!(after(Some(benign), 13), Some(13));
            assert_eq!(after(Some(13), benign), Some(benign));
        }
        for a in [0, 10, 11, 12, 13] {
            for b in [0, 10, 11, 12, 13] {
                assert_eq!(after(Some(a), b), Some(8));
            }
            assert_eq!(after(Some(a), 14), Some(14));
            assert_eq!(after(Some(14), a), Some(8));
            assert_eq!(after(Some(8), a), None);
        }
        assert_eq!(after(Some(14), 14), Some(8));
        assert_eq!(after(Some(8), 14), None);
    }
}
