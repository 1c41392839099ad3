//! Pending and injected events.

use crate::{Error, Field, Result};

/// Pending and injected events of a vCPU, and what masks them (`struct kvm_vcpu_events`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Events {
    /// The exception that the guest takes next.
    pub exception: Option<Exception>,
    /// The interrupt that is injected and not yet delivered.
    pub interrupt: Option<Interrupt>,
    /// The instruction after MOV SS or STI, which takes no interrupt.
    pub shadow: InterruptShadow,
    /// Non-maskable interrupts.
    pub nmi: Nmi,
    /// The vector of a SIPI that came.
    pub sipi_vector: Option<u8>,
    /// System-management mode.
    pub smi: Smi,
    /// A triple fault is pending.
    pub triple_fault: bool,
}

impl Events {
    /// Adds a pending exception (`inject_exception` in main.c).
    ///
    /// # Errors
    /// [`Error::Invalid`] for a vector above 31.
    ///
    /// ```
    /// use kvm_ops_core::{Events, Exception};
    /// let events = Events::default().with_exception(Exception::new(13, Some(0)))?;
    /// assert_eq!(events.exception.map(|e| e.vector), Some(13));
    /// # Ok::<(), kvm_ops_core::Error>(())
    /// ```
    pub const fn with_exception(mut self, exception: Exception) -> Result<Self> {
        if exception.vector > 31 {
            return Err(Error::Invalid(Field::Vector, exception.vector as u64));
        }
        self.exception = Some(exception);
        Ok(self)
    }

    /// Takes back injected events that the guest has not taken (`cancel_injection` in main.c).
    pub const fn without_injections(mut self) -> Self {
        if matches!(
            self.exception,
            Some(Exception {
                delivery: Delivery::Injected,
                ..
            })
        ) {
            self.exception = None;
        }
        self.interrupt = None;
        self.nmi.injected = false;
        self
    }

    /// True if the guest, with interrupts enabled in RFLAGS, would take an NMI now
    /// (`nmi_allowed` in main.c).
    pub const fn nmi_allowed(&self) -> bool {
        !self.nmi.masked && !self.shadow.any()
    }
}

/// An exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// The vector, 0 to 31.
    pub vector: u8,
    /// The error code, for a vector that has one.
    pub error: Option<u32>,
    /// The value for CR2 or DR6, where the platform has not written it yet.
    pub payload: Option<u64>,
    /// The progress of the delivery.
    pub delivery: Delivery,
}

impl Exception {
    /// A pending exception without a payload.
    pub const fn new(vector: u8, error: Option<u32>) -> Self {
        Self {
            vector,
            error,
            payload: None,
            delivery: Delivery::Pending,
        }
    }
}

/// The progress of the delivery of an exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Delivery {
    /// The exception is raised, and intercepts still apply.
    Pending,
    /// The exception is being delivered through the IDT.
    Injected,
}

/// An interrupt that is injected and not yet delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interrupt {
    /// The vector.
    pub vector: u8,
    /// True for INT n.
    pub soft: bool,
}

/// The interrupt shadow (`KVM_X86_SHADOW_INT_*`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InterruptShadow {
    /// The instruction before was MOV SS or POP SS.
    pub mov_ss: bool,
    /// The instruction before was STI.
    pub sti: bool,
}

impl InterruptShadow {
    /// True if either blocks interrupts.
    pub const fn any(&self) -> bool {
        self.mov_ss || self.sti
    }
}

/// Non-maskable interrupts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Nmi {
    /// An NMI is being delivered.
    pub injected: bool,
    /// An NMI waits.
    pub pending: bool,
    /// NMIs are blocked until IRET.
    pub masked: bool,
}

/// System-management interrupts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Smi {
    /// The vCPU is in system-management mode.
    pub smm: bool,
    /// An SMI waits.
    pub pending: bool,
    /// System-management mode interrupted an NMI handler.
    pub inside_nmi: bool,
    /// INIT came in system-management mode.
    pub latched_init: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exceptions_have_vectors_up_to_31() {
        for vector in [0, 14, 31, 32, 255] {
            let events = Events::default().with_exception(Exception::new(vector, None));
            assert_eq!(events.is_ok(), vector < 32, "{vector}");
        }
    }

    #[test]
    fn cancelling_takes_back_only_injected_events() {
        let injected = Exception {
            delivery: Delivery::Injected,
            ..Exception::new(13, Some(0))
        };
        let mut events = Events {
            exception: Some(injected),
            interrupt: Some(Interrupt {
                vector: 32,
                soft: false,
            }),
            nmi: Nmi {
                injected: true,
                pending: true,
                masked: true,
            },
            ..Events::default()
        };
        let left = events.without_injections();
        assert_eq!((left.exception, left.interrupt), (None, None));
        assert_eq!(
            left.nmi,
            Nmi {
                injected: false,
                pending: true,
                masked: true
            }
        );
        events.exception = Some(Exception::new(13, Some(0)));
        assert_eq!(events.without_injections().exception, events.exception);
    }
}
