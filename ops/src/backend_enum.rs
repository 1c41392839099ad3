//! The macro that declares an enum of back ends.

/// Declares an enum of back ends and the enum of their vCPUs, and implements
/// [`VmOps`](crate::VmOps), [`VcpuOps`](crate::VcpuOps) and [`Backend`](crate::Backend) for them
/// by a `match`.
///
/// Several pairs may follow each other, and the macro may be called several times in a crate.
/// `#![cfg(..)]` before a pair holds for both of its enums. Both enums have the same variants with
/// the same `#[cfg]`s; the vCPU of a variant is `<Variant as Backend>::Vcpu`. Names of enums are
/// unique in a crate, because enum_dispatch finds them by name.
///
/// An enum may be a back end of another one. Declare more than three back ends that way, vendor
/// first (`Intel(IntelVm), Amd(AmdVm)`): LLVM turns a `match` of four arms into a jump table, which
/// is an indirect branch (see the chapter on benchmarks in the manual).
///
/// ```
/// use kvm_ops_core::kit::{NullVcpu, NullVm};
/// use kvm_ops_core::{VmId, VmOps};
///
/// kvm_ops_core::backend_enum! {
///     pub enum MyVm { Null(NullVm) }
///     pub enum MyVcpu { Null(NullVcpu) }
/// }
///
/// let vm: MyVm = NullVm::new(VmId(7)).into();
/// assert_eq!(vm.id(), VmId(7));
/// # fn main() {}
/// ```
#[macro_export]
macro_rules! backend_enum {
    ($(
        $(#![cfg($cfg:meta)])?

        $(#[$vm_meta:meta])*
        $vm_vis:vis enum $Vm:ident $(<$VmH:ident : $VmB:path>)? {
            $( $(#[$vm_attr:meta])* $VmV:ident($VmT:ty) ),+ $(,)?
        }

        $(#[$vcpu_meta:meta])*
        $vcpu_vis:vis enum $Vcpu:ident $(<$VcpuH:ident : $VcpuB:path>)? {
            $( $(#[$vcpu_attr:meta])* $VcpuV:ident($VcpuT:ty) ),+ $(,)?
        }
    )+) => {
        $(
            $(#[cfg($cfg)])?
            $(#[$vm_meta])*
            $vm_vis enum $Vm $(<$VmH: $VmB>)? {
                $( $(#[$vm_attr])* #[allow(missing_docs)] $VmV($VmT) ),+
            }

            $(#[cfg($cfg)])?
            $(#[$vcpu_meta])*
            $vcpu_vis enum $Vcpu $(<$VcpuH: $VcpuB>)? {
                $( $(#[$vcpu_attr])* #[allow(missing_docs)] $VcpuV($VcpuT) ),+
            }

            $crate::__dispatch_VmOps!([$(#[cfg($cfg)])?] $Vm $(<$VmH>)?,
                enum $Vm $(<$VmH: $VmB>)? { $( $(#[$vm_attr])* $VmV($VmT) ),+ });
            $crate::__dispatch_VcpuOps!([$(#[cfg($cfg)])?] $Vcpu $(<$VcpuH>)?,
                enum $Vcpu $(<$VcpuH: $VcpuB>)? { $( $(#[$vcpu_attr])* $VcpuV($VcpuT) ),+ });

            $(#[cfg($cfg)])?
            impl $(<$VmH: $VmB>)? $crate::Backend for $Vm $(<$VmH>)? {
                type Vcpu = $Vcpu $(<$VmH>)?;

                #[inline]
                fn create_vcpu(&self, id: $crate::VcpuId) -> $crate::Result<Self::Vcpu> {
                    match self {
                        $(
                            $(#[$vm_attr])*
                            Self::$VmV(vm) => {
                                $crate::Backend::create_vcpu(vm, id).map($Vcpu::$VmV)
                            }
                        )+
                    }
                }

                #[inline]
                fn move_context(from: &mut Self, to: &mut Self) -> $crate::Result<()> {
                    match (from, to) {
                        $(
                            $(#[$vm_attr])*
                            (Self::$VmV(from), Self::$VmV(to)) => {
                                $crate::Backend::move_context(from, to)
                            }
                        )+
                        // An enum of one variant has no other pair.
                        #[allow(unreachable_patterns)]
                        (_, to) => $crate::other_technology(to),
                    }
                }

                fn local_send(
                    &mut self,
                    table: &$crate::Arc<$crate::moves::StagingTable>,
                    random: &mut dyn FnMut(&mut [u8]) -> $crate::Result<()>,
                    deliver: &mut dyn FnMut(&$crate::moves::MoveToken) -> $crate::Result<()>,
                ) -> $crate::Result<()> {
                    match self {
                        $(
                            $(#[$vm_attr])*
                            Self::$VmV(vm) => {
                                $crate::Backend::local_send(vm, table, random, deliver)
                            }
                        )+
                    }
                }

                fn local_cancel(&mut self) -> $crate::Result<()> {
                    match self {
                        $(
                            $(#[$vm_attr])*
                            Self::$VmV(vm) => $crate::Backend::local_cancel(vm),
                        )+
                    }
                }

                fn local_receive(
                    &mut self,
                    table: &$crate::moves::StagingTable,
                    token: &$crate::moves::MoveToken,
                    deliver: &mut dyn FnMut($crate::moves::GuestName) -> $crate::Result<()>,
                ) -> $crate::Result<$crate::moves::GuestName> {
                    match self {
                        $(
                            $(#[$vm_attr])*
                            Self::$VmV(vm) => {
                                $crate::Backend::local_receive(vm, table, token, deliver)
                            }
                        )+
                    }
                }

                #[inline]
                fn copy_context(owner: &mut Self, mirror: &mut Self) -> $crate::Result<()> {
                    match (owner, mirror) {
                        $(
                            $(#[$vm_attr])*
                            (Self::$VmV(owner), Self::$VmV(mirror)) => {
                                $crate::Backend::copy_context(owner, mirror)
                            }
                        )+
                        #[allow(unreachable_patterns)]
                        (_, mirror) => $crate::other_technology(mirror),
                    }
                }
            }
        )+
    };
}
