//! Accesses to devices in the middle of an instruction.
//!
//! A processor's instruction is done again from its start when an access of it left. The accesses
//! that were answered so far are replayed to it then, in their order.

/// One access of up to eight bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Access {
    pub(crate) gpa: u64,
    pub(crate) len: u8,
    pub(crate) write: bool,
    pub(crate) data: [u8; 8],
}

impl Access {
    pub(crate) fn new(gpa: u64, data: &[u8], write: bool) -> Self {
        let mut bytes = [0; 8];
        if write {
            bytes[..data.len()].copy_from_slice(data);
        }
        Self {
            gpa,
            len: data.len() as u8,
            write,
            data: bytes,
        }
    }

    fn same_place(&self, other: &Self) -> bool {
        (self.gpa, self.len, self.write) == (other.gpa, other.len, other.write)
    }
}

/// The registers that tell one element of a repeated string instruction from the next.
pub(crate) type Progress = [u64; 4];

/// The accesses of the instruction that is under way.
#[derive(Debug, Default)]
pub(crate) struct Mmio {
    done: Vec<Access>,
    next: usize,
    wanted: Option<Access>,
    progress: Progress,
}

impl Mmio {
    /// The instruction is begun again.
    pub(crate) fn begin(&mut self) {
        self.next = 0;
    }

    /// The instruction is complete or given up.
    pub(crate) fn end(&mut self) {
        self.done.clear();
        self.wanted = None;
    }

    /// Does an access: from the record, or not at all (`None`).
    pub(crate) fn access(&mut self, access: Access) -> Option<[u8; 8]> {
        match self.done.get(self.next) {
            Some(done) if done.same_place(&access) => {
                self.next += 1;
                Some(done.data)
            }
            _ => {
                // The instruction does something else than before.
                self.done.truncate(self.next);
                self.wanted = Some(access);
                None
            }
        }
    }

    /// The access with which the processor left. `progress` is that of the processor now: if it is
    /// not that of the last access, the record belongs to elements that are complete.
    pub(crate) fn leave(&mut self, progress: Progress) -> Option<Access> {
        let wanted = self.wanted.take()?;
        if self.progress != progress {
            self.done.clear();
            self.progress = progress;
        }
        Some(wanted)
    }

    /// Records the answer to it.
    pub(crate) fn answer(&mut self, access: Access) {
        self.done.push(access);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(gpa: u64) -> Access {
        Access::new(gpa, &[0; 4], false)
    }

    fn with(access: Access, value: u8) -> Access {
        Access {
            data: [value; 8],
            ..access
        }
    }

    #[test]
    fn each_access_of_an_instruction_leaves_once() {
        let mut mmio = Mmio::default();
        let here = [1; 4];
        for (n, gpa) in [0x10, 0x20, 0x10].into_iter().enumerate() {
            mmio.begin();
            for (replayed, gpa) in [0x10, 0x20, 0x10][..n].iter().enumerate() {
                assert_eq!(mmio.access(read(*gpa)), Some([replayed as u8; 8]));
            }
            assert_eq!(mmio.access(read(gpa)), None);
            let left = mmio.leave(here).unwrap();
            assert_eq!(left, read(gpa));
            mmio.answer(with(left, n as u8));
        }
        mmio.end();
        mmio.begin();
        assert_eq!(mmio.access(read(0x10)), None, "the next instruction");
    }

    #[test]
    fn elements_that_are_complete_are_not_replayed() {
        let mut mmio = Mmio::default();
        assert_eq!(mmio.access(read(0x10)), None);
        let left = mmio.leave([3, 0, 0, 0]).unwrap();
        mmio.answer(with(left, 7));
        mmio.begin();
        assert_eq!(mmio.access(read(0x10)), Some([7; 8]));
        // The next element reads the same register.
        assert_eq!(mmio.access(read(0x10)), None);
        let left = mmio.leave([2, 0, 0, 0]).unwrap();
        mmio.answer(with(left, 8));
        mmio.begin();
        assert_eq!(mmio.access(read(0x10)), Some([8; 8]));
    }

    #[test]
    fn an_instruction_that_changed_its_mind_leaves_again() {
        let mut mmio = Mmio::default();
        assert_eq!(mmio.access(read(0x10)), None);
        let left = mmio.leave([0; 4]).unwrap();
        mmio.answer(left);
        mmio.begin();
        assert_eq!(mmio.access(read(0x30)), None);
        assert_eq!(mmio.leave([0; 4]), Some(read(0x30)));
    }
}
