//! The parts of a back end that involve a second type or a second VM.

use crate::{Error, Field, Result, VcpuId, VcpuOps, VmOps};

/// A back end with its vCPU type.
///
/// These three operations are apart from [`VmOps`] because enum_dispatch knows neither associated
/// types nor methods of two VMs. [`backend_enum!`](crate::backend_enum) writes them for an enum.
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
    /// torn down. On an error both are as they were.
    ///
    /// # Errors
    /// [`Error::NotOffered`] where the technology has no moves; [`Error::Invalid`] with
    /// [`Field::Vm`] for two VMs of different technologies; [`Error::WrongState`] for a VM that is
    /// not ready; [`Error::Busy`] while another move involves one of the two.
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
