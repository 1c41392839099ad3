//! Memory accesses of a guest program.

use super::exits::{REASON_EPT_VIOLATION, REASON_EXCEPTION_OR_NMI, VmExit};
use super::{Guest, Next, TdExit};
use crate::l2::L2SeptState;
use crate::l2::vmcs::{CTL_SHARED_EPT, PerVm};
use crate::status::Code;
use std::sync::atomic::Ordering;

/// Bits of an EPT entry and of an EPT violation's qualification.
const READ: u64 = 1;
const WRITE: u64 = 2;

/// A memory access, with the buffer to fill or the data to write.
pub(super) enum Access<'a> {
    Read(&'a mut [u8]),
    Write(&'a [u8]),
}

impl Access<'_> {
    pub(super) fn len(&self) -> usize {
        match self {
            Access::Read(b) => b.len(),
            Access::Write(b) => b.len(),
        }
    }
}

impl Guest<'_> {
    /// The machine check of a line that fails its integrity check.
    pub(super) fn poisoned(&mut self) -> Next {
        const VALID_MACHINE_CHECK: u64 = 0x8000_0312;
        self.td.fatal.store(true, Ordering::Release);
        let exit = TdExit::new(
            Code::NON_RECOVERABLE_TD_NON_ACCESSIBLE,
            REASON_EXCEPTION_OR_NMI,
        );
        Next::Leave(Box::new(TdExit {
            r9: VALID_MACHINE_CHECK,
            state: None,
            inaccessible: true,
            ..exit
        }))
    }

    /// Reads or writes guest-physical memory; the error is the exit a fault on the way causes.
    pub(super) fn access(&mut self, gpa: u64, mut access: Access<'_>) -> Result<(), Fault> {
        let len = access.len();
        let mut done = 0;
        while done < len {
            // The end of the address space is beyond every width, so an access across it faults there.
            let at = gpa.saturating_add(done as u64);
            let n = (4096 - (at as usize & 4095)).min(len - done);
            let part = done..done + n;
            match &mut access {
                Access::Read(buf) => self.access_page(at, Access::Read(&mut buf[part]))?,
                Access::Write(data) => self.access_page(at, Access::Write(&data[part]))?,
            }
            done += n;
        }
        Ok(())
    }

    fn access_page(&mut self, gpa: u64, access: Access<'_>) -> Result<(), Fault> {
        let shared = self.td.shared_bit();
        if gpa >> self.td.gpa_width() != 0 {
            return Err(self.violation(gpa, &access));
        }
        if gpa & shared != 0 && self.has_shared_ept() {
            // The shared EPT is the host's; here it maps every page to the same host address.
            let pa = gpa & !shared;
            if !self.p.mem.contains(pa, access.len() as u64) {
                return Err(self.violation(gpa, &access));
            }
            match access {
                Access::Read(buf) => self.p.mem.host_read(pa, buf),
                Access::Write(data) => self.p.mem.host_write(pa, data),
            }
            return Ok(());
        }
        let Some(pa) = self.private_address(gpa, &access) else {
            return Err(self.violation(gpa, &access));
        };
        let key = self.td.key();
        let result = match access {
            Access::Read(buf) => self.p.mem.private_read(pa, buf, key.as_deref()),
            Access::Write(data) => self.p.mem.private_write(pa, data, key.as_deref()),
        };
        result.map_err(|_| Fault::MachineCheck)
    }

    /// Addresses with the shared bit are translated for the VM which runs.
    pub(super) fn has_shared_ept(&self) -> bool {
        match self.ctx.vm() {
            0 => true,
            vm => self.ctx.per_vm(PerVm::Controls, vm) & CTL_SHARED_EPT != 0,
        }
    }

    /// The host address of private memory that the VM which runs may access so.
    pub(super) fn private_address(&self, gpa: u64, access: &Access<'_>) -> Option<u64> {
        let (hpa, level) = match self.ctx.vm() {
            0 => {
                let w = self.td.walk(&self.p.tables, gpa, 0)?;
                let writes = matches!(access, Access::Write(_));
                let accessible = w.content.is_accessible(writes);
                accessible.then_some((w.content.hpa(), w.level))?
            }
            vm => {
                let w = self.td.walk_l2(&self.p.tables, vm, gpa, 0)?;
                let needed = match access {
                    Access::Read(_) => READ,
                    Access::Write(_) => WRITE,
                };
                let allowed = w.content.state() == L2SeptState::Mapped
                    && w.content.permissions() & needed != 0;
                allowed.then_some((w.content.hpa(), w.level))?
            }
        };
        Some(hpa + (gpa & ((1 << (12 + 9 * u32::from(level))) - 1)))
    }

    fn violation(&self, gpa: u64, access: &Access<'_>) -> Fault {
        const GLA_VALID_AND_TRANSLATED: u64 = 0x180;
        let kind = match access {
            Access::Read(_) => READ,
            Access::Write(_) => WRITE,
        };
        // The guest program's linear addresses are its physical ones.
        Fault::Exit(VmExit {
            reason: REASON_EPT_VIOLATION,
            qualification: GLA_VALID_AND_TRANSLATED | kind,
            gpa,
            gla: gpa,
            ..VmExit::default()
        })
    }
}

/// Reasons for which an access did not complete.
pub(super) enum Fault {
    Exit(VmExit),
    MachineCheck,
}
