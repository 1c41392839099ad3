//! The traits that back ends implement. Their text is in [`backend_enum!`](crate::backend_enum),
//! which repeats it where an enum of back ends is declared.

use crate::{Result, VcpuId};

backend_enum! { @traits [] [] mod traits; }

pub use traits::{VcpuOps, VmOps};

/// A back end with its vCPU: what [`VmOps`] cannot say, because enum_dispatch knows no associated
/// types. [`backend_enum!`](crate::backend_enum) implements it for the enums.
pub trait Backend: VmOps + Sized {
    /// Its vCPU.
    type Vcpu: VcpuOps + 'static;

    /// Creates a vCPU (`vcpu_precreate` and `vcpu_create` in main.c). After `vm_init`.
    ///
    /// # Errors
    /// [`Error::Exists`](crate::Error::Exists) or [`Error::Invalid`](crate::Error::Invalid) for
    /// the number; [`Error::WrongState`](crate::Error::WrongState) too early or too late.
    fn create_vcpu(&self, id: VcpuId) -> Result<Self::Vcpu>;
}
