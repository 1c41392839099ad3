//! What a vCPU needs for guest messages: its GHCB, shared memory as the kernel maps it, its channel.

use super::{Exit, Fault, Reply, Stopped, Vcpu};
use crate::running;
use kvm_ops_guest::SharedBuffer;
use kvm_ops_guest::sev::message::{Aes256Gcm, Channel, SECRETS_LEN, Secrets};
use kvm_ops_guest::sev::{GhcbAnswer, GhcbExit, GhcbPort};

/// Shared memory of the guest from an address on, as a kernel has a mapping of it. An access that the
/// host does not let happen unwinds the code under test ([`TestSev::run`](super::TestSev::run)).
#[derive(Debug)]
pub struct Mapping {
    cpu: Vcpu,
    gpa: u64,
}

impl Mapping {
    fn at(&self, offset: usize) -> u64 {
        self.gpa.wrapping_add(offset as u64)
    }
}

impl SharedBuffer for Mapping {
    fn read(&mut self, offset: usize, bytes: &mut [u8]) {
        let read = self.cpu.read_shared(self.at(offset), bytes.len());
        bytes.copy_from_slice(&read.unwrap_or_else(|fault| running::leave(fault.into_stopped())));
    }

    fn write(&mut self, offset: usize, bytes: &[u8]) {
        self.cpu
            .write_shared(self.at(offset), bytes)
            .unwrap_or_else(|fault| running::leave(fault.into_stopped()));
    }
}

/// A vCPU's GHCB: the port of guest requests.
#[derive(Debug)]
pub struct Ghcb {
    page: Mapping,
}

impl GhcbPort for Ghcb {
    /// VMGEXIT. A vCPU that the host does not enter again unwinds the code under test, as with the other
    /// ports.
    fn ghcb_exit(&mut self, exit: GhcbExit) -> GhcbAnswer {
        exit.write(&mut self.page);
        let gpa = self.page.gpa;
        match self.page.cpu.ask_host(Exit::Ghcb { gpa }) {
            Reply::Stop => running::leave(Stopped::denied(Exit::Ghcb { gpa })),
            Reply::Enter | Reply::Value(_) => GhcbAnswer::read(&mut self.page),
        }
    }
}

impl Vcpu {
    /// Shared memory from `gpa` on, as the kernel maps it.
    pub fn mapping(self, gpa: u64) -> Mapping {
        Mapping { cpu: self, gpa }
    }

    /// The vCPU with its GHCB at `gpa`, a page that is shared.
    pub fn ghcb(self, gpa: u64) -> Ghcb {
        let page = self.mapping(gpa);
        Ghcb { page }
    }

    /// The channel to the firmware of a VMPL, with its key from the secrets page at `secrets`. `None`
    /// above VMPL3.
    ///
    /// # Errors
    /// As [`Vcpu::read`].
    pub fn channel(&mut self, secrets: u64, vmpl: u8) -> Result<Option<Channel<Aes256Gcm>>, Fault> {
        let mut page = [0; SECRETS_LEN];
        page.copy_from_slice(&self.read(secrets, SECRETS_LEN)?);
        let secrets = Secrets::new(&page);
        let channel = |key| Channel::new(Aes256Gcm::new(key), vmpl, secrets.sequence(vmpl));
        Ok(secrets.vmpck(vmpl).map(channel))
    }
}
