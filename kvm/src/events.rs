//! Pending and injected events of a vCPU (`struct kvm_vcpu_events`).

use kvm_bindings::{KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, kvm_vcpu_events};
use kvm_ops::{Call, Error, Exception, Field, Result, control};

use crate::KvmVcpu;
use crate::error::sys;

/// The vector of an NMI, which is no exception.
const NMI: u8 = 2;

impl KvmVcpu {
    pub(crate) fn events(&self) -> Result<kvm_vcpu_events> {
        self.fd().get_vcpu_events().map_err(sys(Call::VcpuEvents))
    }

    /// Changes the events. What the kernel marked as valid when it was read is written back
    /// unchanged, which is no change, because nothing else uses the vCPU meanwhile.
    pub(crate) fn change_events(&self, change: impl FnOnce(&mut kvm_vcpu_events)) -> Result<()> {
        let mut events = self.events()?;
        change(&mut events);
        self.fd()
            .set_vcpu_events(&events)
            .map_err(sys(Call::VcpuEvents))
    }

    pub(crate) fn event_inject_exception(&self, exception: Exception) -> Result<()> {
        let vector = control::exception_vector(exception.vector)?;
        if vector == NMI {
            return Err(Error::Invalid(Field::Vector, vector.into()));
        }
        let pending = self.events()?.exception;
        if pending.injected != 0 || pending.pending != 0 {
            return Err(Error::Exists(Field::Vector, pending.nr.into()));
        }
        self.change_events(|events| {
            events.exception.injected = 1;
            events.exception.nr = vector;
            events.exception.has_error_code = exception.error.is_some().into();
            events.exception.error_code = exception.error.unwrap_or(0);
        })
    }

    pub(crate) fn event_cancel(&self) -> Result<()> {
        self.change_events(|events| {
            events.exception.injected = 0;
            events.exception.pending = 0;
            events.interrupt.injected = 0;
            events.nmi.injected = 0;
            events.nmi.pending = 0;
            events.flags |= KVM_VCPUEVENT_VALID_NMI_PENDING;
        })
    }

    pub(crate) fn event_set_shadow(&self, shadow: u32) -> Result<()> {
        let shadow = match u8::try_from(shadow) {
            Ok(shadow) if shadow & !0b11 == 0 => shadow,
            _ => return Err(Error::Invalid(Field::Flags, shadow.into())),
        };
        self.change_events(|events| {
            events.interrupt.shadow = shadow;
            events.flags |= KVM_VCPUEVENT_VALID_SHADOW;
        })
    }
}
