//! Making a running vCPU stop.

/// Makes one vCPU leave the guest, from any thread.
///
/// A kick is never lost: if the vCPU is not in the guest, its next
/// [`vcpu_run`](crate::VcpuOps::vcpu_run) returns [`Exit::Interrupted`](crate::Exit::Interrupted)
/// at once. Several kicks before that count as one.
pub trait Kick: Send + Sync {
    /// Kicks it. Does nothing if the vCPU is gone.
    fn kick(&self);
}
