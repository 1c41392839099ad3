//! The parts of a back end that involve a second type or a second VM.

use alloc::sync::Arc;

use crate::moves::{GuestName, MoveToken, StagingTable};
use crate::{Error, Field, Result, VcpuId, VcpuOps, VmOps};

/// A back end with its vCPU type.
///
/// These operations are apart from [`VmOps`] because enum_dispatch knows neither associated types nor
/// methods of two VMs, and the staged form of a move has two VMs too.
/// [`backend_enum!`](crate::backend_enum) writes them for an enum.
pub trait Backend: VmOps + Sized {
    /// The vCPU of this back end.
    type Vcpu: VcpuOps + 'static;

    /// Creates a vCPU (`vcpu_precreate` and `vcpu_create` in main.c). Call it after
    /// [`vm_init`](VmOps::vm_init).
    ///
    /// # Errors
    /// [`Error::Exists`] or [`Error::Invalid`] for the number; [`Error::WrongState`] too early or
    /// too late.
    ///
    /// ```
    /// use kvm_ops::{Backend, Error, Field, VcpuId, VmOps};
    /// # use kvm_ops::{sim::SimHost, vmx::VmxVm, Host, Vendor, VmParams};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let mut vm = VmxVm::create(&host, host.next_vm_id(), &VmParams::new(2))?;
    /// vm.vm_init()?;
    /// let vcpu = vm.create_vcpu(VcpuId(0))?;
    /// assert_eq!(vm.create_vcpu(VcpuId(0)).err(), Some(Error::Exists(Field::Vcpu, 0)));
    /// # drop(vcpu);
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn create_vcpu(&self, id: VcpuId) -> Result<Self::Vcpu>;

    /// Moves the encryption context of `from`, with the guest's memory and vCPU state, to `to`
    /// (`vm_move_enc_context_from`; KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM). Afterwards `from` can only be
    /// torn down. On an error both are as they were. No page is looked at, so the cost does not
    /// depend on the guest's memory.
    ///
    /// # Errors
    /// [`Error::NotOffered`] where the technology has no moves; [`Error::Invalid`] with
    /// [`Field::Vm`] for a VM that is not fit, as one of another technology or a source that is not
    /// ready, with [`Field::VcpuCount`] where the vCPUs do not fit; [`Error::Poisoned`] for a source
    /// whose guest is gone; [`Error::Busy`] while another move involves one of the two, or while an
    /// exit of an encrypted vCPU waits for its answer: a run with a kick pending takes the answer,
    /// and returns [`Exit::Interrupted`](crate::Exit::Interrupted).
    ///
    /// ```
    /// use kvm_ops::{Backend, Error, Step, Tech, VmOps, sev::SevVm};
    /// # use kvm_ops::{Host, Vendor, VmParams, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Amd);
    /// # let new = || SevVm::create(&host, host.next_vm_id(), Tech::Sev, &VmParams::new(1));
    ///
    /// let (mut from, mut to) = (new()?, new()?);
    /// from.vm_init()?;
    /// from.vm_finalize()?;
    /// let asid = from.asid();
    /// SevVm::move_context(&mut from, &mut to)?;
    /// assert_eq!((to.step(), to.asid()), (Step::Runnable, asid));
    /// assert_eq!(from.asid(), None);
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn move_context(from: &mut Self, to: &mut Self) -> Result<()> {
        let _ = (from, to);
        crate::not_offered!("move_context")
    }

    /// Stages the guest: the token moves it to any VM of this machine, once. Until then it stays with
    /// this VM, which does not run and takes no operation but
    /// [`local_cancel`](Self::local_cancel), its teardown, and for SEV debug commands.
    ///
    /// `random` fills the token from the host's random numbers; `deliver` hands it on. If one of them
    /// fails, nothing was staged.
    ///
    /// # Errors
    /// [`Error::NotOffered`] where the technology has no moves; [`Error::Exists`] for a guest that is
    /// staged already; [`Error::Poisoned`] for one that is gone; [`Error::Again`] if `random` gives no
    /// random numbers; the errors of `random` and `deliver`; as
    /// [`move_context`](Self::move_context) for a VM that may not be its source.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use kvm_ops::moves::StagingTable;
    /// use kvm_ops::{Backend, Step, Tech, VmOps, sev::SevVm};
    /// # use kvm_ops::{Host, Vendor, VmParams, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Amd);
    /// # let new = || SevVm::create(&host, host.next_vm_id(), Tech::SevSnp, &VmParams::new(1));
    /// # let mut random = |out: &mut [u8]| { out.fill(7); Ok(()) };
    ///
    /// let (mut from, mut to) = (new()?, new()?);
    /// from.vm_init()?;
    /// from.vm_finalize()?;
    /// let (table, mut token) = (Arc::new(StagingTable::new()), None);
    /// from.local_send(&table, &mut random, &mut |made| { token = Some(*made); Ok(()) })?;
    /// to.local_receive(&table, &token.unwrap(), &mut |_name| Ok(()))?;
    /// assert_eq!((from.step(), to.step()), (Step::Poisoned, Step::Runnable));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn local_send(
        &mut self,
        table: &Arc<StagingTable>,
        random: &mut dyn FnMut(&mut [u8]) -> Result<()>,
        deliver: &mut dyn FnMut(&MoveToken) -> Result<()>,
    ) -> Result<()> {
        let _ = (table, random, deliver);
        crate::not_offered!("local_send")
    }

    /// Takes the token back; the VM runs on.
    ///
    /// # Errors
    /// [`Error::Busy`] while somebody trades it; [`Error::NotFound`] if the guest is not staged.
    fn local_cancel(&mut self) -> Result<()> {
        crate::not_offered!("local_cancel")
    }

    /// Trades a token for its guest, which goes on here. `deliver` gets the guest's name; if it fails,
    /// nothing has happened.
    ///
    /// # Errors
    /// [`Error::NotFound`] for a token that is not good: never staged here, traded, withdrawn, or
    /// of a VM that is gone. After every other error the token stays good; they are those of
    /// [`move_context`](Self::move_context).
    fn local_receive(
        &mut self,
        table: &StagingTable,
        token: &MoveToken,
        deliver: &mut dyn FnMut(GuestName) -> Result<()>,
    ) -> Result<GuestName> {
        let _ = (table, token, deliver);
        crate::not_offered!("local_receive")
    }

    /// Lets `mirror` use the encryption context of `owner` (`vm_copy_enc_context_from`;
    /// KVM_CAP_VM_COPY_ENC_CONTEXT_FROM). On an error both are as they were.
    ///
    /// # Errors
    /// As [`Backend::move_context`].
    ///
    /// ```
    /// use kvm_ops::{Backend, Tech, VmOps, sev::SevVm};
    /// # use kvm_ops::{Host, Vendor, VmParams, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Amd);
    /// # let new = || SevVm::create(&host, host.next_vm_id(), Tech::Sev, &VmParams::new(1));
    ///
    /// let (mut owner, mut mirror) = (new()?, new()?);
    /// owner.vm_init()?;
    /// owner.vm_finalize()?;
    /// SevVm::copy_context(&mut owner, &mut mirror)?;
    /// assert_eq!(mirror.asid(), owner.asid());
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn copy_context(owner: &mut Self, mirror: &mut Self) -> Result<()> {
        let _ = (owner, mirror);
        crate::not_offered!("copy_context")
    }
}

/// The answer to a move or copy between VMs of different technologies.
#[doc(hidden)]
#[cold]
pub fn other_technology<V: VmOps>(vm: &V) -> Result<()> {
    Err(Error::Invalid(Field::Vm, vm.id().0))
}
