//! Memory encryption: commands, regions, initial pages and the moving of an encryption context.

use alloc::boxed::Box;
use core::any::Any;
use core::fmt;

use crate::{Gpa, Tech, VmId};

/// A technology's own command to a VM or vCPU: the payload of `KVM_MEMORY_ENCRYPT_OP`.
///
/// The numbers are those of the technology (`KVM_TDX_*`, `KVM_SEV_*`).
#[derive(Debug)]
pub struct EncCmd<'a> {
    /// The command.
    pub id: u32,
    /// Its flags.
    pub flags: u32,
    /// Its structure, in the layout of the kernel's header; read and written.
    pub data: &'a mut [u8],
    /// What firmware answered: 0, or its status word. Written also when the command fails.
    pub firmware_status: u64,
}

/// A range of guest memory that will hold encrypted data and must not move
/// (`struct kvm_enc_region`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EncRegion {
    /// The first byte in the address space of the host.
    pub address: u64,
    /// Bytes.
    pub bytes: u64,
}

/// A page that is part of the VM's measured start.
#[derive(Clone, Copy, Debug)]
pub struct InitialPage<'a> {
    /// Where the guest sees it.
    pub gpa: Gpa,
    /// Its contents.
    pub contents: &'a [u8; 4096],
    /// What it holds and whether it is measured.
    pub kind: InitialPageKind,
}

/// What an initial page holds.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InitialPageKind {
    /// Contents are measured (TDH.MEM.PAGE.ADD with TDH.MR.EXTEND; SNP page type NORMAL).
    Measured,
    /// The page's address is measured, its contents are not.
    Unmeasured,
    /// Zeroed by firmware (SNP page type ZERO).
    Zero,
    /// The SNP secrets page.
    Secrets,
    /// The SNP CPUID page.
    Cpuid,
}

/// How a VM takes over another's encryption context.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EncTransfer {
    /// The source loses it (`KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM`).
    Move,
    /// Both use it (`KVM_CAP_VM_COPY_ENC_CONTEXT_FROM`); the taker is a mirror VM.
    Copy,
}

/// An encryption context on its way from one VM to another.
///
/// It is the value that owns the context between
/// [`release_enc_context`](crate::VmOps::release_enc_context) and
/// [`adopt_enc_context`](crate::VmOps::adopt_enc_context); a refused adoption hands it back, so at
/// every moment exactly one place owns it.
pub struct EncContext {
    /// The technology it belongs to.
    pub tech: Tech,
    /// The VM that gave it.
    pub source: VmId,
    /// How it is taken over.
    pub transfer: EncTransfer,
    /// The back end's own state.
    pub state: Box<dyn Any + Send>,
}

impl fmt::Debug for EncContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EncContext")
            .field("tech", &self.tech)
            .field("source", &self.source)
            .field("transfer", &self.transfer)
            .finish_non_exhaustive()
    }
}
